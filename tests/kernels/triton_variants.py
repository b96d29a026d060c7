"""Launches what the GPU backend launches over many steps, and prints as JSON which specialisations
of each kernel Triton would compile.

Runs as a program, because launches can only be recorded where functions are not interpreted.
"""

import json

import torch
from torch import Tensor
from triton_launches import TARGETS, Recorder, recorded, variants

from vllm_toptheta.kernels import (
    triton_counts,
    triton_decode,
    triton_means,
    triton_prefill,
    triton_theta,
)
from vllm_toptheta.kernels.triton_config import (
    choose_config,
    choose_num_splits,
    choose_prefill_config,
)

# Odd sizes, so that slices of persistent tensors start anywhere.
MAX_ROWS, MAX_BLOCKS = 41, 33
WINDOWS = (1, 128, 300)  # of the layers
LAYERS = len(WINDOWS)
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, GROUP_SIZE = 9, 3, 64, 32, 16
SIZES = {"head_dim": HEAD_DIM, "group_size": GROUP_SIZE}
INT = torch.int32

KERNELS = [
    (triton_decode, "_split_kernel"),
    (triton_decode, "_merge_kernel"),
    (triton_prefill, "_prefill_kernel"),
    (triton_means, "_update_v_means_kernel"),
    (triton_theta, "_lookup_theta_kernel"),
    (triton_counts, "_count_kernel"),
]


class Engine:
    """The tensors that stay in place from step to step."""

    def __init__(self) -> None:
        kv = torch.empty(2, BLOCK_SIZE, KV_HEADS, 2 * HEAD_DIM, dtype=torch.bfloat16)
        self.key, self.value = kv.transpose(1, 2).split(HEAD_DIM, dim=-1)
        groups = BLOCK_SIZE // GROUP_SIZE
        self.means = torch.empty(2, KV_HEADS, groups, HEAD_DIM, dtype=torch.bfloat16)
        self.block_table = torch.zeros(2 * MAX_ROWS, MAX_BLOCKS, dtype=INT)
        self.seq_lens = torch.zeros(2 * MAX_ROWS, dtype=INT)
        self.query_start_loc = torch.zeros(2 * MAX_ROWS + 1, dtype=INT)
        self.slot_mapping = torch.zeros(4096, dtype=torch.int64)
        self.wishes = torch.zeros(4, MAX_ROWS)
        self.theta = torch.zeros(LAYERS, MAX_ROWS, HEADS)
        self.dense = torch.zeros(LAYERS, MAX_ROWS, dtype=torch.int8)
        self.num_kept = torch.zeros(LAYERS, MAX_ROWS, HEADS, dtype=INT)
        self.v_rows_read = torch.zeros(LAYERS, MAX_ROWS, KV_HEADS, dtype=INT)
        self.table = torch.zeros(LAYERS, 4, HEADS, 20)
        layers = torch.zeros(LAYERS)
        self.layers = triton_counts.CountedLayers(
            layers.int(), layers.int(), layers, layers, torch.zeros(4, LAYERS, HEADS)
        )
        self.scratch = triton_decode.DecodeScratch.allocate(
            MAX_ROWS * 64, HEADS, KV_HEADS, HEAD_DIM, "cpu"
        )

    def look_up(self, seq_lens: Tensor, wishes: Tensor, theta: Tensor, dense: Tensor) -> None:
        triton_theta.lookup_theta(
            self.table,
            self.table[..., 0].contiguous(),
            torch.arange(20.0),
            layer_window=self.layers.window,
            layer_k=self.layers.k,
            layer_level=self.layers.level,
            layer_dense=self.layers.k.to(torch.int8),
            seq_lens=seq_lens,
            row_k=wishes[0],
            row_level=wishes[1],
            row_dense=wishes[2],
            min_len=1024,
            out=theta,
            dense=dense,
        )

    def decode(self, query: Tensor, out: Tensor, layer: int) -> None:
        """A layer's single-token rows, the first of the batch."""
        rows, config = len(query), choose_config(**SIZES, cache_bytes=2)
        triton_decode.decode_attention(
            query,
            self.key,
            self.value,
            self.means,
            self.block_table[:rows],
            self.seq_lens[:rows],
            self.theta[layer, :rows],
            sm_scale=0.125,
            dense=self.dense[layer, :rows],
            out=out,
            num_kept=self.num_kept[layer, :rows],
            v_rows_read=self.v_rows_read[layer, :rows],
            scratch=self.scratch,
            num_splits=choose_num_splits(rows, KV_HEADS, 32, config.programs_per_unit),
            config=config,
            window=WINDOWS[layer],
        )

    def prefill(
        self,
        query: Tensor,
        out: Tensor,
        theta: Tensor,
        prompts: triton_counts.CountedPrompts,
        layer: int,
        requests: slice,
    ) -> None:
        """A layer's prompts."""
        triton_prefill.prefill_attention(
            query,
            self.key,
            self.value,
            self.means,
            self.block_table[requests],
            self.query_start_loc[requests.start : requests.stop + 1],
            self.seq_lens[requests],
            theta[layer],
            sm_scale=0.125,
            dense=prompts.dense[layer],
            out=out,
            num_kept=prompts.num_kept[layer],
            v_tiles_read=prompts.v_tiles_read[layer],
            config=choose_prefill_config(**SIZES, cache_bytes=2),
            window=WINDOWS[layer],
        )

    def count(self, num_rows: int, num_reqs: int, prompts: triton_counts.CountedPrompts) -> None:
        """The counts of a step."""
        wishes, results = self.wishes, (self.dense, self.num_kept, self.v_rows_read)
        triton_counts.count_step(
            self.seq_lens[:num_reqs],
            self.query_start_loc[: num_reqs + 1],
            self.layers,
            triton_counts.CountedRows(wishes[3], wishes[1], *results, num_rows),
            prompts if num_reqs > num_rows else None,
            prunes_prompts=True,
            prunes_generated=True,
            out=torch.zeros(num_reqs, LAYERS, len(triton_counts.COLUMNS), dtype=torch.int64),
        )

    def step(self, num_rows: int, num_prompts: int, num_tokens: int) -> None:
        """One step of single-token rows followed by prompts, as the backend launches it."""
        total, num_reqs = num_rows + num_tokens, num_rows + num_prompts
        qkv = torch.empty(total, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=torch.bfloat16)
        query = qkv[:, : HEADS * HEAD_DIM].view(total, HEADS, HEAD_DIM)
        out = torch.empty(total, HEADS, HEAD_DIM, dtype=torch.bfloat16)
        theta = torch.zeros(LAYERS, num_tokens, HEADS)
        prompts = triton_counts.CountedPrompts(
            torch.zeros(LAYERS, num_tokens, dtype=torch.int8),
            torch.zeros(LAYERS, num_tokens, HEADS, dtype=INT),
            torch.zeros(LAYERS, num_tokens, KV_HEADS, dtype=INT),
        )
        if num_rows:
            self.look_up(self.seq_lens[:num_rows], self.wishes, self.theta, self.dense)
        if num_prompts:
            row_lens, by_token = torch.zeros(num_tokens, dtype=INT), torch.zeros(4, num_tokens)
            self.look_up(row_lens, by_token, theta, prompts.dense)
        for layer in range(LAYERS):
            triton_means.update_v_means(self.value, self.means, self.slot_mapping[:total])
            if num_rows:
                self.decode(query[:num_rows], out[:num_rows], layer)
            if num_prompts:
                rest, requests = slice(num_rows, None), slice(num_rows, num_reqs)
                self.prefill(query[rest], out[rest], theta, prompts, layer, requests)
        self.count(num_rows, num_reqs, prompts)


def launch() -> list[Recorder]:
    """Steps of every number of rows, alone and with one to three prompts of various lengths."""
    engine = Engine()
    with recorded(*KERNELS) as recorders:
        for num_rows in range(MAX_ROWS):
            if num_rows:
                engine.step(num_rows, 0, 0)
            for num_prompts in (1, 2, 3):
                for num_tokens in (num_prompts, 2 + 17 * num_prompts, 64 * num_prompts):
                    engine.step(num_rows, num_prompts, num_tokens)
    return recorders


def main() -> None:
    recorders = launch()
    for target_name, target in TARGETS.items():
        seen: dict[str, set[str]] = {}
        for variant in variants(recorders, target):
            seen.setdefault(variant.kernel, set()).add(variant.key)
        print(
            json.dumps({"target": target_name, "variants": {k: sorted(v) for k, v in seen.items()}})
        )


if __name__ == "__main__":
    main()
