"""Launches what the GPU backend launches over many steps, and prints as JSON which specialisations
of each kernel Triton would compile.

Runs as a program, because launches can only be recorded where functions are not interpreted.
"""

import json

import decode_launches
import prefill_launches
import step_launches
import torch
from compile_shapes import Shape, pages
from launches import TARGETS, Recorder, recorded, variants
from torch import Tensor

from vllm_toptheta.kernels.layout import NUM_WEIGHTS
from vllm_toptheta.kernels.triton import counts, decode, means, prefill, sketch
from vllm_toptheta.kernels.triton.config import (
    choose_config,
    choose_num_splits,
    choose_prefill_config,
)

# Odd sizes, so that slices of persistent tensors start anywhere.
MAX_ROWS, MAX_BLOCKS = 41, 33
WINDOWS = (1, 128, None)  # of the layers
LAYERS = len(WINDOWS)
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
CONFIG = choose_config(head_dim=HEAD_DIM, warp_size=64)
PREFILL_CONFIG = choose_prefill_config(head_dim=HEAD_DIM, cache_bytes=2)
INT = torch.int32


class Tokens:
    """What kernels read and write per query token."""

    def __init__(self, num_tokens: int) -> None:
        self.log_min_prob = torch.zeros(LAYERS, num_tokens, KV_HEADS)
        self.dense = torch.zeros(LAYERS, num_tokens, dtype=torch.int8)
        self.num_kept, self.lifts, self.v_tiles_read = (
            torch.zeros(LAYERS, num_tokens, KV_HEADS, dtype=INT) for _ in range(3)
        )
        self.kept_mass = torch.zeros(LAYERS, num_tokens, HEADS)
        self.settings = torch.zeros(5, num_tokens)


class Engine:
    """The tensors that stay in place from step to step.

    Args:
        with_sketch: whether pages have a sketch of K, for which blocks have 64 tokens, not 32.
    """

    def __init__(self, *, with_sketch: bool) -> None:
        shape = Shape(head_dim=HEAD_DIM, block_size=64 if with_sketch else 32, sketch=with_sketch)
        *self.cache, self.sketch = pages(shape, KV_HEADS)
        self.block_table = torch.zeros(2 * MAX_ROWS, MAX_BLOCKS, dtype=INT)
        self.seq_lens = torch.zeros(2 * MAX_ROWS, dtype=INT)
        self.query_start_loc = torch.zeros(2 * MAX_ROWS + 1, dtype=INT)
        self.slot_mapping = torch.zeros(4096, dtype=torch.int64)
        self.weights = torch.zeros(LAYERS, HEADS, NUM_WEIGHTS)
        self.held = Tokens(MAX_ROWS)
        layers = torch.zeros(LAYERS, dtype=INT)
        self.layers = counts.CountedLayers(layers, layers, layers.to(torch.int8))
        self.scratch = decode.DecodeScratch.allocate(
            num_rows=MAX_ROWS,
            num_parts=max(n * self.num_splits(n) for n in range(1, MAX_ROWS + 1)),
            max_len=MAX_BLOCKS * shape.block_size,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            block_size=shape.block_size,
            device="cpu",
            sketch=with_sketch,
        )

    def num_splits(self, num_rows: int) -> int:
        return choose_num_splits(num_rows, KV_HEADS, 32, CONFIG.programs_per_unit)

    def decode(self, tokens: Tokens, query: Tensor, out: Tensor, layer: int) -> None:
        """A layer's single-token rows, the first of the batch."""
        rows = len(query)
        decode.decode_attention(
            query,
            *self.cache,
            self.block_table[:rows],
            self.seq_lens[:rows],
            tokens.log_min_prob[layer, :rows],
            tokens.settings[layer, :rows],
            sm_scale=0.125,
            dense=tokens.dense[layer, :rows],
            weights=self.weights[layer],
            out=out,
            num_kept=tokens.num_kept[layer, :rows],
            kept_mass=tokens.kept_mass[layer, :rows],
            lifts=tokens.lifts[layer, :rows],
            scratch=self.scratch,
            num_splits=self.num_splits(rows),
            config=CONFIG,
            sketch=self.sketch,
            window=WINDOWS[layer],
        )

    def prefill(
        self, tokens: Tokens, query: Tensor, out: Tensor, layer: int, num_rows: int, num_reqs: int
    ) -> None:
        """A layer's prompts."""
        rest, requests = slice(num_rows, None), slice(num_rows, num_reqs)
        prefill.prefill_attention(
            query[rest],
            *self.cache,
            self.block_table[requests],
            self.query_start_loc[num_rows : num_reqs + 1],
            self.seq_lens[requests],
            tokens.log_min_prob[layer, rest],
            sm_scale=0.125,
            dense=tokens.dense[layer, rest],
            out=out[rest],
            num_kept=tokens.num_kept[layer, rest],
            v_tiles_read=tokens.v_tiles_read[layer, rest],
            kept_mass=tokens.kept_mass[layer, rest],
            config=PREFILL_CONFIG,
            # One binary for layers with a window and one for those without.
            window=WINDOWS[layer] or 1000,
        )

    def step(self, num_rows: int, num_prompts: int, num_tokens: int) -> None:
        """One step of single-token rows followed by prompts, as the backend launches it."""
        total, num_reqs = num_rows + num_tokens, num_rows + num_prompts
        qkv = torch.empty(total, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=torch.bfloat16)
        query = qkv[:, : HEADS * HEAD_DIM].view(total, HEADS, HEAD_DIM)
        out = torch.empty(total, HEADS, HEAD_DIM, dtype=torch.bfloat16)
        tokens = Tokens(total) if num_prompts else self.held
        for layer in range(LAYERS):
            slots = self.slot_mapping[:total]
            means.update_v_means(*self.cache[1:], slots)
            if self.sketch is not None:
                sketch.update_sketch(self.cache[0], self.sketch, slots)
            if num_rows:
                self.decode(tokens, query[:num_rows], out[:num_rows], layer)
            if num_prompts:
                self.prefill(tokens, query, out, layer, num_rows, num_reqs)
        counts.count_step(
            self.seq_lens[:num_reqs],
            self.query_start_loc[: num_reqs + 1],
            self.layers,
            counts.CountedRows(
                tokens.settings[1],
                tokens.settings[2],
                tokens.dense,
                tokens.num_kept,
                tokens.kept_mass,
                tokens.lifts,
                tokens.v_tiles_read,
            ),
            single=slice(0, num_rows),
            skipped=0,
            prunes_prompts=True,
            out=torch.zeros(num_reqs, LAYERS, len(counts.COLUMNS), dtype=torch.int64),
            heads=torch.zeros(LAYERS, KV_HEADS + HEADS + 2, dtype=torch.int64),
        )


def launch(*, with_sketch: bool) -> list[Recorder]:
    """Steps of all kinds of numbers of rows, alone and with one to three prompts of various
    lengths: Triton tells 1, multiples of 16, and others apart."""
    engine = Engine(with_sketch=with_sketch)
    kernels = decode_launches.KERNELS + prefill_launches.KERNELS + step_launches.KERNELS
    with recorded(*kernels) as recorders:
        for num_rows in (0, 1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, MAX_ROWS - 1):
            if num_rows:
                engine.step(num_rows, 0, 0)
            for num_prompts in (1, 2, 3):
                for num_tokens in (num_prompts, 2 + 17 * num_prompts, 64 * num_prompts):
                    engine.step(num_rows, num_prompts, num_tokens)
    return recorders


def main() -> None:
    for with_sketch in (False, True):
        recorders = launch(with_sketch=with_sketch)
        for target_name, target in TARGETS.items():
            seen: dict[str, set[str]] = {}
            for variant in variants(recorders, target):
                seen.setdefault(variant.kernel, set()).add(variant.key)
            found = {kernel: sorted(keys) for kernel, keys in seen.items()}
            print(json.dumps({"target": target_name, "sketch": with_sketch, "variants": found}))


if __name__ == "__main__":
    main()
