"""Prefill cases for `bench_kernels`: a shape in; calls to time, and what float64 says about some of
their rows, out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_toptheta.kernels.api import V_TILE, PageLayout, prefill_attention, update_v_means

CHECKED_ROWS = 48  # of a prompt, spread evenly: float64 attention of all rows would take minutes


@dataclass
class PrefillCase:
    """Prompts whose last query_len tokens are computed against their whole cache."""

    num_heads: int
    layout: PageLayout
    kv_cache: Tensor
    query: Tensor
    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    checked: Tensor  # rows of the batch that are compared with float64

    @property
    def sm_scale(self) -> float:
        """The usual factor on q.k."""
        return float(self.layout.head_dim**-0.5)

    @property
    def row_lens(self) -> Tensor:
        """Keys that each query token sees: [num_tokens]."""
        query_lens = self.query_start_loc.diff()
        spans = zip(self.seq_lens.tolist(), query_lens.tolist(), strict=True)
        return torch.cat([torch.arange(n - q, n) + 1 for n, q in spans])

    def theta(self, k: int) -> Tensor:
        """Thresholds that keep k keys a row on average: scores of normal keys are normal.

        Returns:
            [num_tokens, num_heads] float32.
        """
        spread = self.query.float().norm(dim=-1) * self.sm_scale
        share = (k / self.row_lens.double()).clamp(max=1)
        quantile = torch.special.ndtri(1 - share)
        return (spread * quantile[:, None]).float()

    def expected(self, theta: Tensor | None) -> Tensor:
        """Checked rows in float64 with group compensation; theta None for dense."""
        views, size = self.layout.views(self.kv_cache), self.layout.group_size
        num_kv_heads = self.kv_cache.shape[1]
        rows = []
        row_lens = self.row_lens
        for row in self.checked.tolist():
            seq = int(torch.searchsorted(self.query_start_loc, row, right=True)) - 1
            length = int(row_lens[row])
            table = self.block_table[seq, : -(-length // self.layout.block_size)].long()
            key = views.key_cache[table].permute(1, 2, 0, 3).flatten(2)[..., :length].double()
            value = views.value_cache[table].transpose(0, 1).flatten(1, 2)[:, :length].double()
            query = self.query[row].view(num_kv_heads, -1, self.layout.head_dim).double()
            scores = (query @ key) * self.sm_scale
            weights = torch.softmax(scores, -1)
            if theta is not None:
                limit = theta[row].view(num_kv_heads, -1, 1).double()
                kept = (scores >= limit).scatter_(-1, scores.argmax(-1, keepdim=True), True)
                lost = torch.nn.functional.pad(weights * ~kept, (0, -length % size))
                lost = lost.unflatten(-1, (-1, size)).sum(-1)
                visible = torch.full((lost.shape[-1],), size)
                visible[-1] -= -length % size
                share = (lost / visible).repeat_interleave(size, -1)[..., :length]
                weights = weights * kept + share
            rows.append((weights @ value).flatten(0, 1))
        return torch.stack(rows)


def make_prefill_case(
    num_heads: int,
    num_kv_heads: int,
    layout: PageLayout,
    kv_len: int,
    query_len: int,
    batch: int,
    dtype: torch.dtype,
) -> PrefillCase:
    """Fill a cache with independent normal keys and values, its blocks in random order."""
    generator = torch.Generator().manual_seed(0)
    blocks = -(-kv_len // layout.block_size)
    num_blocks = blocks * batch + 1
    pages = (num_blocks, num_kv_heads, layout.block_size, layout.content_elements)
    kv_cache = torch.zeros(pages, dtype=dtype)
    views = layout.views(kv_cache)
    for part in (views.key_cache, views.value_cache):
        for block in part:
            block.copy_(torch.randn(block.shape, generator=generator))
    update_v_means(kv_cache, layout, torch.arange(num_blocks * layout.block_size), impl="native")
    order = torch.randperm(num_blocks - 1, generator=generator) + 1
    tokens = batch * query_len
    return PrefillCase(
        num_heads,
        layout,
        kv_cache,
        torch.randn(tokens, num_heads, layout.head_dim, generator=generator).to(dtype),
        order.to(torch.int32).view(batch, blocks),
        torch.arange(batch + 1, dtype=torch.int32) * query_len,
        torch.full((batch,), kv_len, dtype=torch.int32),
        torch.linspace(0, tokens - 1, min(CHECKED_ROWS, tokens)).long().unique(),
    )


def vllm_call(case: PrefillCase, out: Tensor) -> Callable[[], None]:
    """vLLM's own kernel on the same pages."""
    from vllm import _custom_ops as vllm_ops

    views, head_dim = case.layout.views(case.kv_cache), case.layout.head_dim
    metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(case.seq_lens),
        num_heads=case.num_heads,
        num_kv_heads=case.kv_cache.shape[1],
        head_dim=head_dim,
        seq_lens=case.seq_lens,
        dtype=case.query.dtype,
        query_start_loc=case.query_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa="vec" if head_dim % 32 == 0 else "vec16",
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )

    def call() -> None:
        vllm_ops.cpu_attention_with_kv_cache(
            query=case.query,
            key_cache=views.key_cache_vllm,
            value_cache=views.value_cache,
            output=out,
            query_start_loc=case.query_start_loc,
            seq_lens=case.seq_lens,
            scale=case.sm_scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=case.block_table,
            softcap=0,
            scheduler_metadata=metadata,
            s_aux=None,
        )

    return call


def own_call(
    case: PrefillCase, theta: Tensor | None, out: Tensor, num_kept: Tensor, v_tiles_read: Tensor
) -> Callable[[], None]:
    """Our kernel: Top-theta, or dense when theta is None."""
    limits = torch.zeros(case.query.shape[:2]) if theta is None else theta
    dense = torch.full((len(case.query),), theta is None)

    def call() -> None:
        prefill_attention(
            case.query,
            case.kv_cache,
            case.layout,
            case.block_table,
            case.query_start_loc,
            case.seq_lens,
            limits,
            sm_scale=case.sm_scale,
            dense=dense,
            compensation=True,
            window=None,
            soft_cap=None,
            sinks=None,
            out=out,
            num_kept=num_kept,
            v_tiles_read=v_tiles_read,
            impl="native",
        )

    return call


def largest_error(case: PrefillCase, out: Tensor, expected: Tensor) -> float:
    """Largest error of a checked row, relative to the largest output of that row."""
    error = (out[case.checked].double() - expected).abs().flatten(1).max(1).values
    return float((error / expected.abs().flatten(1).max(1).values).max())


def kept_fraction(case: PrefillCase, num_kept: Tensor) -> float:
    """Kept over visible keys."""
    return float(num_kept.double().mean(1).sum() / case.row_lens.double().sum())


def v_tile_fraction(case: PrefillCase, v_tiles_read: Tensor) -> float:
    """V tiles read over visible ones."""
    visible = (case.row_lens + V_TILE - 1) // V_TILE
    return float(v_tiles_read.double().mean(1).sum() / visible.double().sum())
