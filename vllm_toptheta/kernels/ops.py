"""The contract of the CPU kernels: queries, a paged KV cache and thresholds in, outputs out.

The target is explicit: `target="native"` (C++) or `target="eager"` (the specification in PyTorch).
A request is honoured or raises; ask `available_target()` what this machine can do.

What a row keeps stands in reference.py: every key that has at least a threshold's probability for
some query head, decided once per row and kv head.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vllm_toptheta.kernels import eager
from vllm_toptheta.kernels.cpu import native, prefill
from vllm_toptheta.kernels.cpu.calls import AttentionCall, DecodeCall, PrefillCall
from vllm_toptheta.kernels.layout import NUM_WEIGHTS, PageLayout

Target = Literal["native", "eager"]


class Availability(NamedTuple):
    """The best target here, and why it is not the native one (None when it is)."""

    target: Target
    reason: str | None


def available_target() -> Availability:
    """Say which target this machine can run."""
    found = native.load_native()
    return Availability("eager" if found.library is None else "native", found.reason)


def update_v_means(
    kv_cache: Tensor, layout: PageLayout, slot_mapping: Tensor, *, target: Target
) -> None:
    """Store the mean V of every group whose last slot is in `slot_mapping`.

    Call it after each write to the cache, with the slots that were written. A group that is not
    complete has no valid mean, and no kernel reads it.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, content], see PageLayout; its means are
            updated.
        layout: the page layout.
        slot_mapping: [num_tokens] int64, block * block_size + offset; negative entries are padding.
        target: "native" or "eager".

    Raises:
        ValueError: an argument has another shape or dtype, or a slot lies outside the cache.
        RuntimeError: `target` is not available here.
    """
    layout.check(kv_cache)
    if slot_mapping.dtype != torch.int64 or slot_mapping.dim() != 1:
        raise ValueError(f"slot_mapping must be [num_tokens] int64, got {_describe(slot_mapping)}")
    if target == "native":
        native.update_v_means(kv_cache, layout, slot_mapping.contiguous())
    elif target == "eager":
        eager.update_v_means(kv_cache, layout, slot_mapping)
    else:
        raise _unknown_target(target)


def decode_attention(
    query: Tensor,
    kv_cache: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    seq_lens: Tensor,
    log_min_prob: Tensor,
    min_mass: Tensor,
    *,
    sm_scale: float,
    dense: Tensor,
    weights: Tensor,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    out: Tensor,
    num_kept: Tensor,
    kept_mass: Tensor,
    lifts: Tensor,
    target: Target,
) -> None:
    """Attend one query token per sequence to the cached keys that have enough probability.

    The rule is `reference.select`, the output `reference.compensated_output`. What is kept depends
    neither on the batch nor on how the work is cut.

    Args:
        query: [num_seqs, num_heads, head_dim] in the cache dtype; the first stride is free.
        kv_cache: [num_blocks, num_kv_heads, block_size, content], see PageLayout.
        layout: the page layout.
        block_table: [num_seqs, max_blocks] int32, the first stride is free; only entries of visible
            keys are read.
        seq_lens: [num_seqs] int32, cached keys of the row, its own included; 0 for padding, which
            yields zeros.
        log_min_prob: [num_seqs, num_kv_heads] float32, natural logarithm of the probability from
            which a key is kept; -inf keeps all keys. The first stride is free.
        min_mass: [num_seqs] float32, share of the probability that is kept at least: until then
            the row's thresholds halve. 0 for no floor.
        sm_scale: factor on q.k.
        dense: [num_seqs] bool, rows that keep every key.
        weights: [num_heads, NUM_WEIGHTS] float32, what stands for the lost mass.
        window: a row sees its last `window` keys; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for none.
        sinks: [num_heads] float32, an extra logit in the denominator; None for none.
        out: [num_seqs, num_heads, head_dim] in the cache dtype, written; the first stride is free.
        num_kept: [num_seqs, num_kv_heads] int32, written: V rows on the list of a kv head (all
            visible ones on dense rows).
        kept_mass: [num_seqs, num_heads] float32, written: the kept keys' share of the probability
            of all keys; 1 for dense rows and padding.
        lifts: [num_seqs, num_kv_heads] int32, written: how often the threshold halved.
        target: "native" or "eager".

    Raises:
        ValueError: an argument has another shape, dtype or layout, or a block id lies outside the
            cache.
        RuntimeError: `target` is not available here.
    """
    call = DecodeCall(
        query=query,
        kv_cache=kv_cache,
        layout=layout,
        block_table=block_table,
        seq_lens=seq_lens,
        log_min_prob=log_min_prob,
        sm_scale=sm_scale,
        dense=dense,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        out=out,
        num_kept=num_kept,
        kept_mass=kept_mass,
        min_mass=min_mass,
        weights=weights,
        lifts=lifts,
    )
    num_seqs = query.shape[0]
    _check_call(call, num_seqs)
    _check("min_mass", min_mass, (num_seqs,), torch.float32)
    _check("weights", weights, (query.shape[1], NUM_WEIGHTS), torch.float32)
    _check("lifts", lifts, (num_seqs, kv_cache.shape[1]), torch.int32)
    if target == "native":
        native.decode_attention(call)
    elif target == "eager":
        eager.decode_attention(call)
    else:
        raise _unknown_target(target)


def prefill_attention(
    query: Tensor,
    kv_cache: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    log_min_prob: Tensor,
    *,
    sm_scale: float,
    dense: Tensor,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    out: Tensor,
    num_kept: Tensor,
    v_tiles_read: Tensor,
    kept_mass: Tensor,
    target: Target,
) -> None:
    """Attend query tokens of several sequences, causally, to the keys that have enough probability.

    Row i of a sequence with q query tokens and n cached keys sees the first n - q + i + 1 keys. The
    rule is `reference.select_running`, the output `reference.compensated_output` with
    PROMPT_WEIGHTS. What is kept depends neither on the batch nor on how a prompt was cut into
    chunks.

    Args:
        query: [num_tokens, num_heads, head_dim] in the cache dtype, sequence after sequence; the
            first stride is free.
        kv_cache: [num_blocks, num_kv_heads, block_size, content], see PageLayout; it holds the keys
            of the query tokens, and the V means of every group that they complete.
        layout: the page layout.
        block_table: [num_seqs, max_blocks] int32, the first stride is free; only entries of visible
            keys are read.
        query_start_loc: [num_seqs + 1] int32, first query token of each sequence; from 0 to
            num_tokens.
        seq_lens: [num_seqs] int32, cached keys of the sequence, those of its queries included.
        log_min_prob: [num_tokens, num_kv_heads] float32, natural logarithm of the probability from
            which a key is kept; -inf keeps all keys. The first stride is free.
        sm_scale: factor on q.k.
        dense: [num_tokens] bool, rows that keep every key.
        window: a row sees its last `window` keys; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for none.
        sinks: [num_heads] float32, an extra logit in the denominator; None for none.
        out: [num_tokens, num_heads, head_dim] in the cache dtype, written; the first stride is
            free.
        num_kept: [num_tokens, num_kv_heads] int32, written: keys that a kv head's query heads keep
            together, all visible ones on dense rows.
        v_tiles_read: [num_tokens, num_kv_heads] int32, written: runs of V_TILE keys, aligned to
            position 0, in which any head of the group keeps a key; the row skips the V of all
            others.
        kept_mass: [num_tokens, num_heads] float32, written: the kept keys' share of the probability
            of all keys; 1 for dense rows.
        target: "native" or "eager".

    Raises:
        ValueError: an argument has another shape, dtype or layout, a block id lies outside the
            cache, or the lengths do not fit together.
        RuntimeError: `target` is not available here.
    """
    call = PrefillCall(
        query=query,
        kv_cache=kv_cache,
        layout=layout,
        block_table=block_table,
        seq_lens=seq_lens,
        log_min_prob=log_min_prob,
        sm_scale=sm_scale,
        dense=dense,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        out=out,
        num_kept=num_kept,
        kept_mass=kept_mass,
        query_start_loc=query_start_loc,
        v_tiles_read=v_tiles_read,
    )
    num_tokens, num_seqs = query.shape[0], seq_lens.shape[0]
    _check_call(call, num_seqs)
    _check("query_start_loc", query_start_loc, (num_seqs + 1,), torch.int32)
    _check("v_tiles_read", v_tiles_read, (num_tokens, kv_cache.shape[1]), torch.int32)
    if target == "native":
        prefill.prefill_native(call)
    elif target == "eager":
        prefill.prefill_eager(call)
    else:
        raise _unknown_target(target)


def _check_call(call: AttentionCall, num_seqs: int) -> None:
    """Raise ValueError unless what decode and prefill share fits together."""
    query, kv_cache, layout = call.query, call.kv_cache, call.layout
    layout.check(kv_cache)
    if query.dim() != 3:
        raise ValueError(f"query must be [num_rows, num_heads, head_dim], got {list(query.shape)}")
    num_rows, num_heads, _ = query.shape
    num_kv_heads, head_dim = kv_cache.shape[1], layout.head_dim
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
    row, per_kv_head = (num_rows, num_heads, head_dim), (num_rows, num_kv_heads)
    _check_rows("query", query, row, kv_cache.dtype, (head_dim, 1))
    _check_rows("out", call.out, row, kv_cache.dtype, (head_dim, 1))
    _check_rows("log_min_prob", call.log_min_prob, per_kv_head, torch.float32, (1,))
    _check("dense", call.dense, (num_rows,), torch.bool)
    _check("num_kept", call.num_kept, per_kv_head, torch.int32)
    _check("kept_mass", call.kept_mass, (num_rows, num_heads), torch.float32)
    if call.block_table.dim() != 2:
        raise ValueError(
            f"block_table must be [num_seqs, max_blocks], got {list(call.block_table.shape)}"
        )
    table = (num_seqs, call.block_table.shape[1])
    _check_rows("block_table", call.block_table, table, torch.int32, (1,))
    _check("seq_lens", call.seq_lens, (num_seqs,), torch.int32)
    if call.sinks is not None:
        _check("sinks", call.sinks, (num_heads,), torch.float32)
    if call.window is not None and call.window <= 0:
        raise ValueError(f"window must be positive or None, got {call.window}")
    if call.soft_cap is not None and call.soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive or None, got {call.soft_cap}")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless the tensor has this shape and dtype and is contiguous."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        raise _wrong_tensor(name, tensor, shape, dtype)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def _check_rows(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    row_strides: tuple[int, ...],
) -> None:
    """Like _check, with any stride between the rows."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        raise _wrong_tensor(name, tensor, shape, dtype)
    if tensor.stride()[1:] != row_strides and not tensor.is_contiguous():
        raise ValueError(f"the rows of {name} must be contiguous, got strides {tensor.stride()}")


def _wrong_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> ValueError:
    wanted = f"{list(shape)} {dtype} on the CPU"
    return ValueError(f"{name} must be {wanted}, got {_describe(tensor)}")


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _unknown_target(target: str) -> ValueError:
    return ValueError(f'target must be "native" or "eager", got {target!r}')
