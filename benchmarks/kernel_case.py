"""Attention cases for kernels.py: random or captured queries, keys and values in; calls to time,
and what float64 says about some of their rows, out.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_toptheta.kernels import ops, reference
from vllm_toptheta.kernels.decode import DecodeLayer, DecodeRows
from vllm_toptheta.kernels.layout import (
    PROMPT_WEIGHTS,
    UNCALIBRATED_WEIGHTS,
    V_TILE,
    Packing,
    PageLayout,
)
from vllm_toptheta.kernels.sketch import read_groups, sketched_scores

try:
    import vllm
    import vllm.platforms  # registers the operators
    from vllm import _custom_ops as vllm_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
except ImportError:
    vllm_ops = None

KEY_TILE = 128  # of the prompts' kernel
CHECKED_ROWS = 24  # of a prompt, spread evenly: float64 attention of all rows would take minutes
# Largest error against float64 that counts as right, relative to the row's largest output.
MAX_ERROR = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 2e-5}


def stock_isa(dtype: torch.dtype, block_size: int, head_dim: int) -> str | None:
    """What vLLM picks on this machine; None without vLLM."""
    return None if vllm_ops is None else _get_attn_isa(dtype, block_size, head_dim)


@dataclass(frozen=True)
class Shape:
    """One benchmark case, written num_heads/num_kv_heads/head_dim:kv_len:batch."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    kv_len: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read a shape such as 32/8/128:8192:1."""
        try:
            heads, kv_len, batch = text.split(":")
            return cls(*(int(x) for x in heads.split("/")), int(kv_len), int(batch))
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(
                f"expected num_heads/num_kv_heads/head_dim:kv_len:batch, got {text!r}"
            ) from error

    def __str__(self) -> str:
        heads = f"{self.num_heads}/{self.num_kv_heads}/{self.head_dim}"
        return f"{heads} kv_len {self.kv_len} batch {self.batch}"


@dataclass
class Run:
    """Something to time: a call, where its results are, the threshold (None: no pruning), and
    whether it scans the sketch of K."""

    name: str
    min_prob: float | None
    call: Callable[[], None]
    out: Tensor
    num_kept: Tensor | None = None
    v_tiles_read: Tensor | None = None
    kept_mass: Tensor | None = None
    sketch: bool = False


class Case:
    """The last tokens of several sequences, every sequence with its own pages in random order.

    Args:
        query: [batch * query_len, num_heads, head_dim].
        key, value: [batch, kv_len, num_kv_heads, head_dim].
        block_size: tokens per block.
        decode: the query tokens are decode rows, one a sequence.
        min_mass: of decode rows.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        block_size: int,
        decode: bool,
        min_mass: float,
    ) -> None:
        batch, kv_len, num_kv_heads, head_dim = key.shape
        self.query, self.key, self.value = query, key, value
        self.decode, self.min_mass, self.sm_scale = decode, min_mass, head_dim**-0.5
        self.query_len = len(query) // batch
        self.query_start_loc = torch.arange(batch + 1, dtype=torch.int32) * self.query_len
        self.seq_lens = torch.full((batch,), kv_len, dtype=torch.int32)
        self.row_lens = torch.arange(kv_len - self.query_len, kv_len).add(1).repeat(batch)
        packing: Packing = "amx" if stock_isa(query.dtype, block_size, head_dim) == "amx" else "vec"
        self.layout = PageLayout(block_size, head_dim, packing)
        blocks = -(-kv_len // block_size)
        self.num_blocks = blocks * batch + 1
        order = torch.randperm(self.num_blocks - 1, generator=torch.Generator().manual_seed(1)) + 1
        self.block_table = order.to(torch.int32).view(batch, blocks)
        position = torch.arange(kv_len)
        first = self.block_table[:, position // block_size].long() * block_size
        self.slots = (first + position % block_size).flatten()
        self.pages = self._pages(self.layout)
        self.sketched = replace(self.layout, sketch=query.dtype)
        self.sketched_pages = self._pages(self.sketched) if decode else None
        count = min(CHECKED_ROWS, len(query))
        self.checked = torch.linspace(0, len(query) - 1, count).long().unique()

    def _pages(self, layout: PageLayout) -> Tensor:
        shape = (self.num_blocks, self.key.shape[2], layout.block_size, layout.content_elements)
        pages = torch.zeros(shape, dtype=self.query.dtype)
        layout.write(pages, self.slots, self.key.flatten(0, 1), self.value.flatten(0, 1))
        ops.update_side_data(pages, layout, self.slots, target="native")
        return pages

    def stock(self) -> Run | None:
        """vLLM's own kernel, on pages that it packs itself for the isa that it picks here."""
        if vllm_ops is None:
            return None
        dtype, size, head_dim = self.query.dtype, self.layout.block_size, self.layout.head_dim
        isa = stock_isa(dtype, size, head_dim)
        num_kv_heads = self.key.shape[2]
        pages = torch.zeros(self.num_blocks, num_kv_heads, 2 * size, head_dim, dtype=dtype)
        key_cache, value_cache = pages.chunk(2, dim=2)
        vllm_ops.cpu_attn_reshape_and_cache(
            self.key.flatten(0, 1),
            self.value.flatten(0, 1),
            key_cache,
            value_cache,
            self.slots,
            isa,
        )
        metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(self.seq_lens),
            num_heads=self.query.shape[1],
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            seq_lens=self.seq_lens,
            dtype=dtype,
            query_start_loc=self.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
            dynamic_causal=None,
            kv_cache_dtype="auto",
        )
        out = torch.zeros_like(self.query)

        def call() -> None:
            vllm_ops.cpu_attention_with_kv_cache(
                query=self.query,
                key_cache=key_cache,
                value_cache=value_cache,
                output=out,
                query_start_loc=self.query_start_loc,
                seq_lens=self.seq_lens,
                scale=self.sm_scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=self.block_table,
                softcap=0,
                scheduler_metadata=metadata,
                s_aux=None,
            )

        return Run(f"stock {isa}", None, call, out)

    def ours(self, min_prob: float | None, *, sketch: bool = False) -> Run:
        """Our kernel; min_prob None for dense rows, sketch for decode rows that scan it."""
        (rows, num_heads, _), num_kv_heads = self.query.shape, self.key.shape[2]
        name = "sketch" if sketch else "dense" if min_prob is None else "toptheta"
        run = Run(name, min_prob, lambda: None, torch.zeros_like(self.query), sketch=sketch)
        run.num_kept = torch.zeros(rows, num_kv_heads, dtype=torch.int32)
        run.kept_mass = torch.zeros(rows, num_heads)
        pages, layout = (
            (self.sketched_pages, self.sketched) if sketch else (self.pages, self.layout)
        )
        log_min_prob = torch.full((rows, num_kv_heads), math.log(min_prob or 1))
        dense = torch.full((rows,), min_prob is None)
        how: dict[str, Any] = {
            "sm_scale": self.sm_scale,
            "window": None,
            "soft_cap": None,
            "target": "native",
        }
        if self.decode:
            weights = torch.tensor(UNCALIBRATED_WEIGHTS).repeat(num_heads, 1)
            layer = DecodeLayer(0, layout, weights, **how)
            of_step = DecodeRows(
                block_table=self.block_table,
                seq_lens=self.seq_lens,
                log_min_prob=log_min_prob[None],
                min_mass=torch.full((rows,), self.min_mass),
                dense=dense[None],
                num_kept=run.num_kept[None],
                kept_mass=run.kept_mass[None],
                lifts=torch.zeros(1, rows, num_kv_heads, dtype=torch.int32),
            )
            run.call = lambda: layer.attend(of_step, self.query, pages, run.out)
        else:
            run.v_tiles_read = v_tiles_read = torch.zeros(rows, num_kv_heads, dtype=torch.int32)
            run.call = lambda: ops.prefill_attention(
                self.query,
                pages,
                layout,
                self.block_table,
                self.query_start_loc,
                self.seq_lens,
                log_min_prob,
                dense=dense,
                sinks=None,
                out=run.out,
                num_kept=run.num_kept,
                kept_mass=run.kept_mass,
                v_tiles_read=v_tiles_read,
                **how,
            )
        return run

    def error(self, run: Run) -> float:
        """Call once; the largest error of a checked row, relative to its largest output.

        Keys whose probability is the threshold up to rounding may go either way: what that explains
        is taken off.

        Raises:
            ValueError: the run is wrong.
        """
        run.call()
        worst, limit = 0.0, MAX_ERROR[self.query.dtype]
        for row in self.checked.tolist():
            expected, num_kept, spread = self._expected(row, run)
            error = float((run.out[row].double() - expected).abs().max())
            if run.num_kept is not None:
                found, wanted = run.num_kept[row].tolist(), num_kept.tolist()
                flipped = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
                if flipped > 1 + 0.002 * max(wanted):
                    raise ValueError(f"keeps {found} keys, not {wanted}")
                error -= 2 * flipped * (run.min_prob or 0) * spread
            worst = max(worst, error / float(expected.abs().max()))
        if not worst <= limit:
            raise ValueError(f"error {worst:.1e}, at most {limit:.0e} is rounding")
        return worst

    def _expected(self, row: int, run: Run) -> tuple[Tensor, Tensor, float]:
        """Output [num_heads, head_dim], keys kept [num_kv_heads] and the largest V, in float64."""
        seq, length = row // self.query_len, int(self.row_lens[row])
        key, value = self.key[seq, :length].double(), self.value[seq, :length].double()
        query, row_lens = self.query[row : row + 1].double(), torch.tensor([length])
        size, min_prob = self.layout.group_size, run.min_prob
        if run.sketch and self.sketched_pages is not None:
            pages = self.sketched_pages[self.block_table[seq].long()]
            parts, bounds = read_groups(pages, self.sketched)
            scores = sketched_scores(
                query,
                key,
                parts.transpose(1, 2).flatten(0, 1)[:length],
                bounds.transpose(1, 2).flatten(0, 1)[: length // size],
                row_lens,
                group_size=size,
                sm_scale=self.sm_scale,
            )
        else:
            scores = reference.attention_scores(query, key, row_lens, sm_scale=self.sm_scale)
        num_heads, num_kv_heads = len(scores), key.shape[1]
        weights, floor, limit = PROMPT_WEIGHTS, 0.0, -math.inf
        if min_prob is not None:
            floor, limit = self.min_mass, math.log(min_prob)
        threshold = torch.full((num_kv_heads, 1), limit)
        if self.decode:
            weights = PROMPT_WEIGHTS if min_prob is None else UNCALIBRATED_WEIGHTS
            chosen = reference.select(scores, threshold, floor, group_size=size)
        else:
            chosen = reference.select_running(scores, threshold, group_size=size, tile=KEY_TILE)
        out = reference.compensated_output(
            chosen, value, torch.tensor(weights).expand(num_heads, -1), group_size=size
        )
        return out[0], chosen.kept[:, 0].sum(-1), float(value.abs().max())

    def shares(self, run: Run) -> dict[str, float]:
        """What a run keeps, of all rows: keys on its lists, their mass, V tiles."""
        if run.num_kept is None or run.kept_mass is None:
            return {}
        lens = self.row_lens.double()
        found = {
            "kept": float(run.num_kept.double().mean(1).sum() / lens.sum()),
            "kept_mass": float(run.kept_mass.double().mean()),
        }
        if run.v_tiles_read is not None:
            tiles = (lens / V_TILE).ceil().sum()
            found["v_tiles"] = float(run.v_tiles_read.double().mean(1).sum() / tiles)
        return found


def vllm_version() -> str:
    """What stands in a benchmark's head."""
    if vllm_ops is None:
        return "vLLM not installed"
    return f"vLLM {vllm.__version__} ({torch.backends.cpu.get_cpu_capability()})"


def random_tensors(
    shape: Shape, query_len: int, dtype: torch.dtype, query_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of a Case: independent normal numbers, queries times query_scale."""
    generator = torch.Generator().manual_seed(0)
    rows = shape.batch * query_len
    query = torch.randn(rows, shape.num_heads, shape.head_dim, generator=generator) * query_scale
    sizes = (shape.batch, shape.kv_len, shape.num_kv_heads, shape.head_dim)
    key, value = (torch.randn(sizes, generator=generator).to(dtype) for _ in range(2))
    return query.to(dtype), key, value


def captured_tensors(
    path: Path, query_len: int | None, dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    """Name, and query, key and value of a Case, for every layer of a file that `capture` wrote; of
    the queries the last query_len (None: all)."""
    tensors = load_file(path)
    for layer in sorted({int(name.split(".")[1]) for name in tensors}):
        query, key, value = (
            tensors[f"layers.{layer}.{name}"].to(dtype) for name in ("query", "key", "value")
        )
        last = query[-query_len:] if query_len else query
        yield f"layer {layer}, {len(key)} keys", (last.contiguous(), key[None], value[None])


def capture(model: str, text: str, path: Path, tokens: int, rows: int, layers: list[int]) -> None:
    """Write query, key and value of some layers, as attention sees them, for the start of a text.

    Args:
        model: folder of a Hugging Face model.
        text: the text.
        path: a safetensors file: layers.N.query [rows, num_heads, head_dim], layers.N.key and
            layers.N.value [tokens, num_kv_heads, head_dim].
        tokens: of the text that are read.
        rows: last tokens whose queries are kept.
        layers: which; none for all.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: dict[str, Tensor] = {}

    def attend(module, query, key, value, *args, **kwargs):
        if not layers or module.layer_idx in layers:
            for name, x in (("query", query[:, :, -rows:]), ("key", key), ("value", value)):
                found[f"layers.{module.layer_idx}.{name}"] = x[0].transpose(0, 1).contiguous()
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("capture", attend)
    loaded = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="capture"
    )
    ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise ValueError(f"the text has {ids.shape[1]} tokens, --tokens asks for {tokens}")
    with torch.inference_mode():
        loaded(ids, logits_to_keep=1)
    save_file({name: x.to(torch.bfloat16) for name, x in found.items()}, path)
