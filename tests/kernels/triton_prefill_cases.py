"""Prefill cases on the GPU's cache layout: the CPU tests' cases in, what the Triton kernel writes
out.
"""

import math
from dataclasses import dataclass

import torch
from cpu_cases import theta_in_gap, write
from prefill_cases import PrefillCase, PrefillResult
from torch import Tensor

ROWS = 64
"""Query rows of a tile, so that short prompts have several."""

SCALES = (0.5, 2.0)
"""Factors on K and V as float8 stores them."""


@dataclass
class GPUPages:
    """A CPU case's cache as the GPU holds it; NaN where nothing was written.

    Attributes:
        key, value: [num_blocks, num_kv_heads, block_size, head_dim], halves of the same rows.
        means: [num_blocks, num_kv_heads, groups, head_dim].
        scales: factors on stored K and V, or None.
    """

    key: Tensor
    value: Tensor
    means: Tensor
    scales: tuple[float, float] | None = None


def gpu_pages(case: PrefillCase, fp8: torch.dtype | None = None) -> GPUPages:
    """Copy a case's pages; with `fp8` its K and V have to come from `quantise`."""
    views = case.spec.layout.views(case.cache.kv_cache)
    key, value, means = views.key_cache.transpose(2, 3), views.value_cache, views.v_means
    scales = None
    if fp8 is not None:
        scales = SCALES
        key, value = (key / scales[0]).to(fp8), (value / scales[1]).to(fp8)
        means = means / scales[1]
    # Slot-major, as vLLM lays out pages by default.
    rows = torch.cat([key, value], dim=-1).transpose(1, 2).contiguous().transpose(1, 2)
    key, value = rows.split(case.spec.head_dim, dim=-1)
    return GPUPages(key, value, means.contiguous(), scales)


def quantise(case: PrefillCase, dtype: torch.dtype) -> None:
    """Move K and V of a case to what float8 can hold, and its thresholds along."""
    cache = case.cache
    for seq in range(len(case.spec.lens)):
        for tensors, scale in ((cache.keys, SCALES[0]), (cache.values, SCALES[1])):
            stored = (tensors[seq].float() / scale).to(dtype)
            tensors[seq] = (stored.float() * scale).to(case.spec.dtype)
        write(cache, seq)
        scores, start = case.scores(seq), case.rows_of(seq).start
        for row in range(case.query_lens[seq]):
            case.theta[start + row] = theta_in_gap(scores[:, row], case.spec.kept)


def run(
    case: PrefillCase,
    pages: GPUPages | None = None,
    *,
    upto: tuple[int, ...] | None = None,
    take: tuple[int, ...] | None = None,
    rows: int = ROWS,
) -> PrefillResult:
    """Query tokens upto - take to upto - 1 of every sequence, all of them by default."""
    from vllm_toptheta.kernels.triton_config import PrefillConfig
    from vllm_toptheta.kernels.triton_prefill import prefill_attention

    spec = case.spec
    pages = pages or gpu_pages(case)
    upto = upto or case.query_lens
    take = take or upto
    chosen, lens = case.chunk(upto, take)
    result = case.empty(len(chosen))
    wide = torch.full((len(chosen), spec.num_heads + 2, spec.head_dim), math.nan).to(spec.dtype)
    query = wide[:, : spec.num_heads]
    query.copy_(case.query[chosen])
    scales = None if pages.scales is None else [torch.tensor([s]) for s in pages.scales]
    prefill_attention(
        query,
        pages.key,
        pages.value,
        pages.means if spec.compensation else None,
        case.cache.block_table,
        torch.tensor([0, *take]).cumsum(0).to(torch.int32),
        torch.tensor(lens, dtype=torch.int32),
        case.theta[chosen],
        sm_scale=spec.sm_scale,
        dense=case.dense[chosen].to(torch.int8),
        out=result.out,
        num_kept=result.num_kept,
        v_tiles_read=result.v_tiles_read,
        config=PrefillConfig(rows=rows, tile=max(64, spec.group_size)),
        window=spec.window,
        soft_cap=spec.soft_cap,
        sinks=case.cache.sinks,
        k_scale=scales and scales[0],
        v_scale=scales and scales[1],
    )
    return result
