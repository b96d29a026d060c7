"""The contract of the CPU kernels for prompts and side data, and what this machine can do; decode
rows have theirs in decode.py.

The target is explicit: `target="native"` (C++) or `target="eager"` (the specification in PyTorch).
A request is honoured or raises; ask `available_target()` which one there is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_toptheta.kernels import eager
from vllm_toptheta.kernels.checks import (
    check,
    check_block_table,
    check_rows,
    check_scores,
    describe,
    not_a_multiple,
    unknown_target,
)
from vllm_toptheta.kernels.cpu import native, prefill
from vllm_toptheta.kernels.cpu.calls import PrefillCall
from vllm_toptheta.kernels.cpu.calls import Target as Target
from vllm_toptheta.kernels.layout import PageLayout


class Availability(NamedTuple):
    """The best target here, and why it is not the native one (None when it is)."""

    target: Target
    reason: str | None


def available_target() -> Availability:
    """Say which target this machine can run."""
    found = native.load_native()
    return Availability("eager" if found.library is None else "native", found.reason)


def update_side_data(
    kv_cache: Tensor, layout: PageLayout, slot_mapping: Tensor, *, target: Target
) -> None:
    """Store the mean V, and where the layout has one the sketch of K, of every group whose last
    slot is in `slot_mapping`.

    Call it after each write to the cache, with the slots that were written. A group that is not
    complete has no valid side data, and no kernel reads it.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, content], see PageLayout; its side data
            is updated.
        layout: the page layout.
        slot_mapping: [num_tokens] int64, block * block_size + offset; negative entries are padding.
        target: "native" or "eager".

    Raises:
        ValueError: an argument has another shape or dtype, or a slot lies outside the cache.
        RuntimeError: `target` is not available here.
    """
    layout.check(kv_cache)
    if slot_mapping.dtype != torch.int64 or slot_mapping.dim() != 1:
        raise ValueError(f"slot_mapping must be [num_tokens] int64, got {describe(slot_mapping)}")
    if target == "native":
        native.update_side_data(kv_cache, layout, slot_mapping.contiguous())
    elif target == "eager":
        eager.update_side_data(kv_cache, layout, slot_mapping)
    else:
        raise unknown_target(target)


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
    _check_prompts(call, num_seqs)
    check("query_start_loc", query_start_loc, (num_seqs + 1,), torch.int32)
    check("v_tiles_read", v_tiles_read, (num_tokens, kv_cache.shape[1]), torch.int32)
    if target == "native":
        prefill.prefill_native(call)
    elif target == "eager":
        prefill.prefill_eager(call)
    else:
        raise unknown_target(target)


def _check_prompts(call: PrefillCall, num_seqs: int) -> None:
    """Raise ValueError unless the arguments fit together."""
    query, kv_cache, layout = call.query, call.kv_cache, call.layout
    layout.check(kv_cache)
    if query.dim() != 3:
        raise ValueError(f"query must be [num_rows, num_heads, head_dim], got {list(query.shape)}")
    num_rows, num_heads, _ = query.shape
    num_kv_heads, head_dim = kv_cache.shape[1], layout.head_dim
    if num_heads % num_kv_heads:
        raise not_a_multiple(num_heads, num_kv_heads)
    row, per_kv_head = (num_rows, num_heads, head_dim), (num_rows, num_kv_heads)
    check_rows("query", query, row, kv_cache.dtype, (head_dim, 1))
    check_rows("out", call.out, row, kv_cache.dtype, (head_dim, 1))
    check_rows("log_min_prob", call.log_min_prob, per_kv_head, torch.float32, (1,))
    check("dense", call.dense, (num_rows,), torch.bool)
    check("num_kept", call.num_kept, per_kv_head, torch.int32)
    check("kept_mass", call.kept_mass, (num_rows, num_heads), torch.float32)
    check_block_table(call.block_table, num_seqs)
    check("seq_lens", call.seq_lens, (num_seqs,), torch.int32)
    if call.sinks is not None:
        check("sinks", call.sinks, (num_heads,), torch.float32)
    check_scores(call.window, call.soft_cap)
