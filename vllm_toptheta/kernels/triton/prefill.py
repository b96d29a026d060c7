"""Launches the prefill kernel: several query tokens of a sequence on a GPU."""

import torch
import triton
from torch import Tensor

from vllm_toptheta.kernels.layout import V_TILE, group_size_of
from vllm_toptheta.kernels.triton.checks import (
    check_contiguous,
    check_log_min_prob,
    check_scales,
    check_tensors,
)
from vllm_toptheta.kernels.triton.config import PrefillConfig
from vllm_toptheta.kernels.triton.prefill_kernel import _prefill_kernel


def prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    v_means: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    log_min_prob: Tensor,
    *,
    sm_scale: float,
    dense: Tensor,
    out: Tensor,
    num_kept: Tensor,
    v_tiles_read: Tensor,
    kept_mass: Tensor,
    config: PrefillConfig,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Attend query tokens of several sequences, causally, by the rule of prompt rows:
    `reference.select_running` with tiles of V_TILE keys, and PROMPT_WEIGHTS.

    Row i of a sequence with q query tokens and n cached keys sees the first n - q + i + 1 keys. The
    kept set depends neither on the batch nor on how a prompt was cut into chunks. Every tile of
    rows reads K once, and of V the rows that any row of the tile keeps; where there are none in a
    tile of keys the product with V is left out.

    Args:
        query: [num_tokens, num_heads, head_dim] bfloat16 or float16, sequence after sequence; the
            first stride is free.
        key_cache: [num_blocks, num_kv_heads, block_size, head_dim], the query's dtype or a float8;
            strides are free but the last, which is 1. It holds the keys of the query tokens.
        value_cache: as key_cache, with the same strides.
        v_means: [num_blocks, num_kv_heads, block_size // group_size, head_dim] in the query's
            dtype, valid for complete groups.
        block_table: [num_seqs, max_blocks] int32, the first stride is free; only entries of visible
            keys are read.
        query_start_loc: [num_seqs + 1] int32, first query token of each sequence; from 0 to
            num_tokens.
        seq_lens: [num_seqs] int32, cached keys of the sequence, those of its queries included.
        log_min_prob: [num_tokens, num_kv_heads] float32, natural logarithm; the first stride is
            free.
        sm_scale: factor on q.k.
        dense: [num_tokens] int8, rows that keep every key where not 0.
        out: [num_tokens, num_heads, head_dim], written; the first stride is free.
        num_kept: [num_tokens, num_kv_heads] int32, written: keys kept, all visible ones on dense
            rows.
        v_tiles_read: [num_tokens, num_kv_heads] int32, written: runs of V_TILE keys, aligned to
            position 0, with a kept key.
        kept_mass: [num_tokens, num_heads] float32, written: the kept keys' share of the probability
            of all keys, 1 on dense rows.
        config: launch parameters; no kept set depends on them.
        window: a row sees its last `window` keys; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for none.
        sinks: [num_heads] float32, an extra logit in the denominator; None for none.
        k_scale: [1] float32, factor on stored K; None for 1.
        v_scale: [1] float32, factor on stored V and means; both scales or neither are given.

    Raises:
        ValueError: an argument has another shape, dtype or layout, or a size is not supported.
            The contents of query_start_loc and seq_lens are on the device and not looked at.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    num_seqs, heads = seq_lens.shape[0], num_heads // num_kv_heads
    check_tensors(query, key_cache, value_cache, v_means, block_table, num_seqs, out)
    heads_padded = triton.next_power_of_2(heads)
    tokens = config.rows // heads_padded
    if config.rows % heads_padded or not 1 <= tokens <= V_TILE:
        raise ValueError(
            f"config needs rows that are {heads_padded} times 1 to {V_TILE} tokens, got {config}"
        )
    shape = (num_tokens, num_kv_heads)
    check_log_min_prob(log_min_prob, num_tokens, num_kv_heads)
    check_contiguous(
        (
            ("query_start_loc", query_start_loc, (num_seqs + 1,), torch.int32),
            ("seq_lens", seq_lens, (num_seqs,), torch.int32),
            ("dense", dense, (num_tokens,), torch.int8),
            ("num_kept", num_kept, shape, torch.int32),
            ("v_tiles_read", v_tiles_read, shape, torch.int32),
            ("kept_mass", kept_mass, (num_tokens, num_heads), torch.float32),
            ("sinks", sinks, (num_heads,), torch.float32),
        )
    )
    check_scales(k_scale, v_scale)
    if num_tokens == 0:
        return

    _prefill_kernel[(num_tokens // tokens + 2 * num_seqs, num_kv_heads)](
        query,
        key_cache,
        value_cache,
        v_means,
        block_table,
        query_start_loc,
        seq_lens,
        log_min_prob,
        dense,
        sinks,
        k_scale,
        v_scale,
        out,
        num_kept,
        v_tiles_read,
        kept_mass,
        sm_scale,
        soft_cap or 0.0,
        window or 0,
        num_seqs,
        query.stride(0),
        out.stride(0),
        block_table.stride(0),
        log_min_prob.stride(0),
        *key_cache.stride()[:3],
        *v_means.stride()[:3],
        HEADS=heads,
        HEADS_PADDED=heads_padded,
        TOKENS=tokens,
        HEAD_DIM=head_dim,
        DIM_PADDED=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        GROUP_SIZE=group_size_of(block_size),
        TILE=V_TILE,
        WINDOW=window is not None,
        SOFT_CAP=bool(soft_cap),
        SINKS=sinks is not None,
        SCALED=k_scale is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
