"""Runs the Triton prefill kernel on cases, under the interpreter."""

import math

import torch
from decode_runs import new_means
from torch import Tensor

from vllm_toptheta.testing.cases import Case, Result


def run(
    case: Case,
    *,
    upto: tuple[int, ...] | None = None,
    take: tuple[int, ...] | None = None,
    pages: tuple[Tensor, Tensor] | None = None,
    rows: int = 64,
) -> Result:
    """Query tokens upto - take to upto - 1 of every sequence, all of them by default.

    Args:
        pages: of `gpu_pages`, and means; None makes them.
        rows: query rows of a tile.
    """
    from vllm_toptheta.kernels.triton.config import PrefillConfig
    from vllm_toptheta.kernels.triton.prefill import prefill_attention

    spec = case.spec
    assert spec.query_lens is not None
    upto = upto or spec.query_lens
    take = take or upto
    chosen = rows_of(case, upto, take)
    kv_cache, means = pages or new_pages(case)
    key_cache, value_cache = kv_cache.split(spec.head_dim, dim=-1)
    result = Result.empty(spec)
    result = Result(**{name: tensor[chosen] for name, tensor in vars(result).items()})
    lens = [n - q + u for n, q, u in zip(spec.lens, spec.query_lens, upto, strict=True)]
    scales = [torch.tensor([scale]) for scale in case.scales]
    k_scale, v_scale = scales if spec.cache_dtype else (None, None)
    prefill_attention(
        # Rows of a wider tensor, as vLLM passes them.
        torch.nn.functional.pad(case.query[chosen], (0, 0, 0, 2))[:, : spec.num_heads],
        key_cache,
        value_cache,
        means,
        case.block_table,
        torch.tensor([0, *take]).cumsum(0).to(torch.int32),
        torch.tensor(lens, dtype=torch.int32),
        case.log_min_prob[chosen],
        sm_scale=spec.sm_scale,
        dense=case.dense[chosen].to(torch.int8),
        out=result.out,
        num_kept=result.num_kept,
        v_tiles_read=result.v_tiles_read,
        kept_mass=result.kept_mass,
        config=PrefillConfig(rows=rows),
        window=spec.window,
        soft_cap=spec.soft_cap,
        sinks=case.sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    result.lifts.zero_()
    return result


def rows_of(case: Case, upto: tuple[int, ...], take: tuple[int, ...]) -> Tensor:
    """Indices of query tokens upto - take to upto - 1 of every sequence."""
    starts = case.query_start_loc.tolist()
    return torch.cat(
        [torch.arange(s + u - t, s + u) for s, u, t in zip(starts, upto, take, strict=False)]
    )


def new_pages(case: Case) -> tuple[Tensor, Tensor]:
    """Pages and the means of all complete groups; NaN where nothing was written."""
    from vllm_toptheta.kernels.triton.means import update_v_means

    kv_cache, means = case.gpu_pages(), new_means(case)
    update_v_means(kv_cache.split(case.spec.head_dim, dim=-1)[1], means, case.slots())
    return kv_cache, means


def run_chunks(case: Case, chunk: int, pages: tuple[Tensor, Tensor] | None = None) -> Result:
    """`chunk` query tokens of every sequence at a time, as a server runs them: what a chunk does
    not hold yet is NaN in the pages."""
    query_lens = case.spec.query_lens
    assert query_lens is not None
    whole, (kv_cache, means) = Result.empty(case.spec), pages or new_pages(case)
    done = (0,) * len(query_lens)
    while done != query_lens:
        take = tuple(min(chunk, q - d) for d, q in zip(done, query_lens, strict=True))
        done = tuple(d + t for d, t in zip(done, take, strict=True))
        held = kv_cache.clone(), means.clone()
        spoil(case, held, done, math.nan)
        part = run(case, upto=done, take=take, pages=held)
        for name, tensor in vars(part).items():
            getattr(whole, name)[rows_of(case, done, take)] = tensor
    return whole


def spoil(case: Case, pages: tuple[Tensor, Tensor], done: tuple[int, ...], value: float) -> None:
    """Fill what no row up to query token `done` sees, and the means of groups seen in part."""
    spec, (kv_cache, means) = case.spec, pages
    assert spec.query_lens is not None
    seen = torch.zeros(case.num_blocks, spec.block_size, dtype=torch.bool)
    for seq, (n, q, d) in enumerate(zip(spec.lens, spec.query_lens, done, strict=True)):
        first = max(n - q + 1 - (spec.window or n), 0)
        position = torch.arange(first, n - q + d)
        block = case.block_table[seq, position // spec.block_size].long()
        seen[block, position % spec.block_size] = True
    kv_cache.transpose(1, 2)[~seen] = value
    whole = seen.unflatten(1, (-1, spec.group_size)).all(-1)
    means.transpose(1, 2)[~whole] = value
