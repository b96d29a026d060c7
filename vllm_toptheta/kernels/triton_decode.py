"""The GPU decode kernel: queries, a paged KV cache and thresholds in, outputs and counts out.

Same semantics as the CPU kernel. Two launches, both fit for CUDA graphs: the grid depends on the
batch size alone, and everything that varies from step to step is read from device memory.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vllm_toptheta.kernels.triton_checks import (
    MAX_HEADS_PER_KV_HEAD,
    NO_WINDOW,
    check_contiguous,
    check_scales,
    check_tensors,
    check_tile,
)
from vllm_toptheta.kernels.triton_config import MAX_SPLITS, LaunchConfig
from vllm_toptheta.kernels.triton_merge import _merge_kernel
from vllm_toptheta.kernels.triton_split import _split_kernel


@dataclass(frozen=True)
class DecodeScratch:
    """Partial results of the splits; one set serves all layers, because stage two of a layer
    empties it.

    Attributes:
        acc: float32, [num_heads, head_dim] per (sequence, split).
        softmax: float32, running maximum and sum per (sequence, head, split).
        best: int32, position of the best key and whether another head keeps it.
        kept: int32, keys kept per (sequence, head, split).
        rows: int32, V rows read per (sequence, kv head, split).
        num_parts: (sequence, split) pairs there is room for.
    """

    acc: Tensor
    softmax: Tensor
    best: Tensor
    kept: Tensor
    rows: Tensor
    num_parts: int

    @classmethod
    def allocate(
        cls,
        num_parts: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
    ) -> "DecodeScratch":
        """Room for a number of (sequence, split) pairs."""

        def empty(size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(num_parts * size, dtype=dtype, device=device)

        return cls(
            acc=empty(num_heads * head_dim, torch.float32),
            softmax=empty(num_heads * 2, torch.float32),
            best=empty(num_heads * 2, torch.int32),
            kept=empty(num_heads, torch.int32),
            rows=empty(num_kv_heads, torch.int32),
            num_parts=num_parts,
        )


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    v_means: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    theta: Tensor,
    *,
    sm_scale: float,
    dense: Tensor,
    out: Tensor,
    num_kept: Tensor,
    v_rows_read: Tensor,
    scratch: DecodeScratch,
    num_splits: int,
    config: LaunchConfig,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """Attend one query token per sequence to its cached keys, keeping the keys whose score reaches
    theta.

    The denominator runs over all visible keys and a row's best key is always kept; with `v_means`
    the mass that a group of tokens loses is multiplied with the mean V of the group's visible keys.
    The kept set depends neither on the batch nor on the number of splits. V rows that no head of a
    kv head keeps are not read, except in the at most two groups that a row sees in part.

    Args:
        query: [num_seqs, num_heads, head_dim] bfloat16 or float16; the first stride is free.
        key_cache: [num_blocks, num_kv_heads, block_size, head_dim], the query's dtype or a float8;
            strides are free but the last, which is 1.
        value_cache: as key_cache, with the same strides.
        v_means: [num_blocks, num_kv_heads, block_size // group_size, head_dim] in the query's
            dtype, valid for complete groups; None drops the lost mass.
        block_table: [num_seqs, max_blocks] int32, the first stride is free; only entries of visible
            keys are read.
        seq_lens: [num_seqs] int32, cached keys of the row, its own included; 0 for padding, which
            yields zeros.
        theta: [num_seqs, num_heads] float32, units of q.k * sm_scale (after soft cap); the first
            stride is free.
        sm_scale: factor on q.k.
        dense: [num_seqs] int8, rows that take the dense path and ignore theta where not 0.
        out: [num_seqs, num_heads, head_dim], written; the first stride is free.
        num_kept: [num_seqs, num_heads] int32, written: keys kept (all visible ones on dense rows).
        v_rows_read: [num_seqs, num_kv_heads] int32, written: V rows that any head of the group
            keeps.
        scratch: room for num_seqs * num_splits parts.
        num_splits: parts a row is cut into.
        config: launch parameters.
        window: a row sees its last `window` keys; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for none.
        sinks: [num_heads] float32, an extra logit in the denominator; None for none.
        k_scale: [1] float32, factor on stored K; None for 1.
        v_scale: [1] float32, factor on stored V and means; both scales or neither are given.
        lse: [num_seqs, num_heads] float32, written with the log of the denominator, sinks included;
            None for none.

    Raises:
        ValueError: an argument has another shape, dtype or layout, or a size is not supported.
    """
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    group_size = config.tile if v_means is None else block_size // max(v_means.shape[2], 1)
    check_tensors(query, key_cache, value_cache, v_means, block_table, num_seqs, out)
    check_tile(config.tile, group_size)
    _check_splits(num_splits, num_seqs, scratch)
    check_contiguous(
        (
            ("seq_lens", seq_lens, (num_seqs,), torch.int32),
            ("dense", dense, (num_seqs,), torch.int8),
            ("num_kept", num_kept, (num_seqs, num_heads), torch.int32),
            ("v_rows_read", v_rows_read, (num_seqs, num_kv_heads), torch.int32),
            ("sinks", sinks, (num_heads,), torch.float32),
            ("lse", lse, (num_seqs, num_heads), torch.float32),
        )
    )
    check_scales(k_scale, v_scale)
    if num_seqs == 0:
        return

    mean_strides = (0, 0, 0) if v_means is None else v_means.stride()[:3]
    heads = num_heads // num_kv_heads
    dim_padded = triton.next_power_of_2(head_dim)
    span = NO_WINDOW if window is None else window
    _split_kernel[(num_kv_heads, num_splits, num_seqs)](
        query,
        key_cache,
        value_cache,
        value_cache if v_means is None else v_means,
        block_table,
        seq_lens,
        theta,
        dense,
        k_scale,
        scratch.acc,
        scratch.softmax,
        scratch.best,
        scratch.kept,
        scratch.rows,
        sm_scale,
        soft_cap or 0.0,
        span,
        query.stride(0),
        block_table.stride(0),
        theta.stride(0),
        *key_cache.stride()[:3],
        *mean_strides,
        HEADS=heads,
        HEADS_PADDED=MAX_HEADS_PER_KV_HEAD,
        HEAD_DIM=head_dim,
        DIM_PADDED=dim_padded,
        BLOCK_SIZE=block_size,
        GROUP_SIZE=group_size,
        TILE=config.tile,
        MIN_TILES=config.min_tiles,
        COMPENSATION=v_means is not None,
        SOFT_CAP=bool(soft_cap),
        SCALED=k_scale is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    _merge_kernel[(num_heads, num_seqs)](
        value_cache,
        value_cache if v_means is None else v_means,
        block_table,
        seq_lens,
        dense,
        sinks,
        v_scale,
        scratch.acc,
        scratch.softmax,
        scratch.best,
        scratch.kept,
        scratch.rows,
        out,
        lse,
        num_kept,
        v_rows_read,
        span,
        num_splits,
        out.stride(0),
        block_table.stride(0),
        *value_cache.stride()[:3],
        *mean_strides,
        HEADS=heads,
        HEADS_PADDED=triton.next_power_of_2(heads),
        HEAD_DIM=head_dim,
        DIM_PADDED=dim_padded,
        BLOCK_SIZE=block_size,
        GROUP_SIZE=group_size,
        TILE=config.tile,
        MIN_TILES=config.min_tiles,
        # One binary for every number of splits, which differs between batch sizes.
        SPLITS_PADDED=MAX_SPLITS,
        CHUNK=16 if head_dim <= 128 else 8,
        COMPENSATION=v_means is not None,
        SINKS=sinks is not None,
        SCALED=v_scale is not None,
        LSE=lse is not None,
        num_warps=4,
    )


def _check_splits(num_splits: int, num_seqs: int, scratch: DecodeScratch) -> None:
    if not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits must be 1 to {MAX_SPLITS}, got {num_splits}")
    if num_seqs * num_splits > scratch.num_parts:
        raise ValueError(
            f"scratch has room for {scratch.num_parts} parts, {num_seqs} sequences of "
            f"{num_splits} splits need "
            f"{num_seqs * num_splits}"
        )
