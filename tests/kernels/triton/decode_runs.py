"""Runs the Triton decode kernels on cases, under the interpreter."""

import math

import torch
from torch import Tensor

from vllm_toptheta.kernels.sketch import Sketch
from vllm_toptheta.testing.cases import Case, Result


def new_means(case: Case) -> Tensor:
    """Means of no group yet: NaN."""
    spec = case.spec
    groups = spec.block_size // spec.group_size
    shape = (case.num_blocks, spec.num_kv_heads, groups, spec.head_dim)
    return torch.full(shape, math.nan, dtype=spec.dtype)


def poisoned(scratch: object) -> None:
    """Fill scratch, so that whatever is read without being written shows."""
    for tensor in vars(scratch).values():
        if isinstance(tensor, Tensor):
            # Of steps 255: the runs would be left out.
            number = {torch.uint8: 255, torch.int8: 77}.get(tensor.dtype, -(10**6))
            tensor.fill_(math.nan if tensor.is_floating_point() else number)


def run(
    case: Case,
    *,
    num_splits: int = 3,
    tile: int = 64,
    min_tiles: int = 1,
    rows: list[int] | None = None,
    head_major: bool = False,
    pages: tuple[Tensor, Tensor] | None = None,
    sketch: Sketch | None = None,
) -> Result:
    """Means, then the decode kernels.

    Args:
        rows: the part of the batch to run; None for all.
        head_major: heads before slots in the pages.
        pages: of `gpu_pages`, and means; None makes them.
        sketch: of the pages.
    """
    from vllm_toptheta.kernels.triton.config import LaunchConfig
    from vllm_toptheta.kernels.triton.decode import DecodeScratch, decode_attention
    from vllm_toptheta.kernels.triton.means import update_v_means

    spec = case.spec
    chosen = list(range(len(spec.lens))) if rows is None else rows
    kv_cache, means = pages or (case.gpu_pages(head_major=head_major), new_means(case))
    key_cache, value_cache = kv_cache.split(spec.head_dim, dim=-1)
    if pages is None:
        update_v_means(value_cache, means, case.slots())
    result = Result.empty(spec)
    result = Result(**{name: tensor[chosen] for name, tensor in vars(result).items()})
    scratch = DecodeScratch.allocate(
        num_rows=len(chosen),
        num_parts=len(chosen) * num_splits,
        max_len=max(spec.lens),
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=spec.block_size,
        device="cpu",
        sketch=sketch is not None,
    )
    poisoned(scratch)
    scales = [torch.tensor([scale]) for scale in case.scales]
    k_scale, v_scale = scales if spec.cache_dtype else (None, None)
    decode_attention(
        case.query[chosen],
        key_cache,
        value_cache,
        means,
        case.block_table[chosen],
        case.seq_lens[chosen],
        case.log_min_prob[chosen],
        case.min_mass[chosen],
        sm_scale=spec.sm_scale,
        dense=case.dense[chosen].to(torch.int8),
        weights=case.weights,
        out=result.out,
        num_kept=result.num_kept,
        kept_mass=result.kept_mass,
        lifts=result.lifts,
        scratch=scratch,
        num_splits=num_splits,
        config=LaunchConfig(tile=tile, min_tiles=min_tiles),
        sketch=sketch,
        window=spec.window,
        soft_cap=spec.soft_cap,
        sinks=case.sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return result
