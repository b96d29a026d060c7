"""Thresholds of a step on the device: the table, row lengths and each row's k in, theta and the
dense rows out.

One launch serves every layer of a step. Decode kernels then take theta as it stands, so that each
has neither a second launch nor a chain of dependent loads before its first K tile.
"""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

DENSE_NONE, DENSE_SHORT, DENSE_WINDOW, DENSE_LAYER, DENSE_ROW = range(5)
"""Why a row of a layer runs dense: not at all, few keys, a window not larger than k, the layer or
the row is excluded.
"""

_NONE = tl.constexpr(DENSE_NONE)
_SHORT = tl.constexpr(DENSE_SHORT)
_WINDOW = tl.constexpr(DENSE_WINDOW)
_LAYER = tl.constexpr(DENSE_LAYER)
_ROW = tl.constexpr(DENSE_ROW)


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize=["num_seqs", "min_len", "out_layer_stride", "dense_layer_stride"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "row_k_ptr", "row_level_ptr", "row_dense_ptr"],
)
def _lookup_theta_kernel(
    theta_ptr,
    slope_ptr,
    knots_ptr,
    layer_window_ptr,
    layer_k_ptr,
    layer_level_ptr,
    layer_dense_ptr,
    seq_lens_ptr,
    row_k_ptr,
    row_level_ptr,
    row_dense_ptr,
    out_ptr,
    dense_ptr,
    num_seqs,
    min_len,
    out_layer_stride,
    dense_layer_stride,
    NUM_LEVELS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    NUM_KNOTS: tl.constexpr,
    KNOTS_PADDED: tl.constexpr,
    SEQS: tl.constexpr,
):
    layer = tl.program_id(1)
    seq = tl.program_id(0) * SEQS + tl.arange(0, SEQS)
    is_seq = seq < num_seqs
    window = tl.load(layer_window_ptr + layer)
    own_k = tl.load(layer_k_ptr + layer)
    own_level = tl.load(layer_level_ptr + layer)
    length = tl.load(seq_lens_ptr + seq, mask=is_seq, other=1)
    length = tl.minimum(length, window)
    k = tl.load(row_k_ptr + seq, mask=is_seq, other=1.0)
    level = tl.load(row_level_ptr + seq, mask=is_seq, other=0.0)
    k = tl.where(own_k > 0, own_k, k)
    level = tl.where(own_k > 0, own_level, level)

    row_dense = tl.load(row_dense_ptr + seq, mask=is_seq, other=0) != 0
    layer_dense = tl.load(layer_dense_ptr + layer) != 0
    short = length.to(tl.float32) <= tl.maximum(k, min_len)
    reason = tl.where(short, _SHORT, _NONE)
    reason = tl.where(k >= window.to(tl.float32), _WINDOW, reason)
    reason = tl.where(layer_dense, _LAYER, reason)
    reason = tl.where(row_dense, _ROW, reason)
    dense = dense_ptr + layer.to(tl.int64) * dense_layer_stride + seq
    tl.store(dense, reason.to(tl.int8), mask=is_seq)

    # Between which knots, and between which levels.
    at = tl.log2(tl.maximum(length, 1).to(tl.float32))
    knot = tl.arange(0, KNOTS_PADDED)
    knots = tl.load(knots_ptr + knot, mask=knot < NUM_KNOTS, other=float("inf"))
    upper = tl.sum((knots[None, :] < at[:, None]).to(tl.int32), 1)
    upper = tl.minimum(tl.maximum(upper, 1), NUM_KNOTS - 1)
    below = tl.load(knots_ptr + upper - 1)
    above = tl.load(knots_ptr + upper)
    last = tl.load(knots_ptr + NUM_KNOTS - 1)
    weight = tl.minimum(tl.maximum((at - below) / (above - below), 0.0), 1.0)
    beyond = tl.maximum(at - last, 0.0)
    lower_level = tl.minimum(level.to(tl.int32), tl.maximum(NUM_LEVELS - 2, 0))
    upper_level = tl.minimum(lower_level + 1, NUM_LEVELS - 1)
    level_weight = level - lower_level.to(tl.float32)

    head = tl.arange(0, HEADS_PADDED)
    mask = is_seq[:, None] & (head < NUM_HEADS)[None, :]
    base = layer * NUM_LEVELS
    low = ((base + lower_level) * NUM_HEADS)[:, None] + head[None, :]
    high = ((base + upper_level) * NUM_HEADS)[:, None] + head[None, :]
    theta_low = _at_length(theta_ptr, slope_ptr, low, upper, weight, beyond, mask, NUM_KNOTS)
    theta_high = _at_length(theta_ptr, slope_ptr, high, upper, weight, beyond, mask, NUM_KNOTS)
    theta = _lerp(theta_low, theta_high, level_weight[:, None])
    out = out_ptr + layer.to(tl.int64) * out_layer_stride
    tl.store(out + seq[:, None] * NUM_HEADS + head[None, :], theta, mask=mask)


@triton.jit
def _lerp(low, high, weight):
    # Exact at both ends: a table says "keep all" by a huge negative theta, in which low + (high -
    # low) would drown.
    return low * (1.0 - weight) + high * weight


@triton.jit
def _at_length(theta_ptr, slope_ptr, row, upper, weight, beyond, mask, NUM_KNOTS: tl.constexpr):
    """Theta [seqs, heads] of one level per row, at the row's length."""
    pointers = theta_ptr + row * NUM_KNOTS + upper[:, None]
    low = tl.load(pointers - 1, mask=mask, other=0.0)
    high = tl.load(pointers, mask=mask, other=0.0)
    slope = tl.load(slope_ptr + row, mask=mask, other=0.0)
    return _lerp(low, high, weight[:, None]) + slope * beyond[:, None]


def lookup_theta(
    theta_table: Tensor,
    slope_table: Tensor,
    log2_lengths: Tensor,
    *,
    layer_window: Tensor,
    layer_k: Tensor,
    layer_level: Tensor,
    layer_dense: Tensor,
    seq_lens: Tensor,
    row_k: Tensor,
    row_level: Tensor,
    row_dense: Tensor,
    min_len: int,
    out: Tensor,
    dense: Tensor,
) -> None:
    """Look up theta of every (layer, row, head) and decide which rows run dense.

    Theta is linear in log2(length) between knots, along the slope past the last, and linear in the
    level position between levels. A layer with its own k ignores the rows' k. Of several reasons to
    run dense the strongest is reported: row, layer, window, short.

    Args:
        theta_table: [num_layers, num_levels, num_heads, num_knots] float32.
        slope_table: [num_layers, num_levels, num_heads] float32, theta per doubling past the last
            knot.
        log2_lengths: [num_knots] float32, ascending, at least two.
        layer_window: [num_layers] int32, keys a row sees at most; the largest int32 for all.
        layer_k: [num_layers] float32, the layer's own k; 0 where the row's k counts.
        layer_level: [num_layers] float32, level position of layer_k.
        layer_dense: [num_layers] int8, layers that run dense.
        seq_lens: [num_seqs] int32.
        row_k: [at least num_seqs] float32, mean keys a row keeps.
        row_level: [at least num_seqs] float32, position of row_k among the levels: index of the
            lower one plus the weight of the upper one.
        row_dense: [at least num_seqs] float32, rows that run dense where not 0.
        min_len: rows that see at most this many keys, or k, run dense.
        out: [num_layers, max_seqs, num_heads] float32, the first num_seqs rows are written; the
            first stride is free.
        dense: [num_layers, max_seqs] int8, written likewise with DENSE_* codes.

    Raises:
        ValueError: a shape or dtype is wrong.
    """
    num_layers, num_levels, num_heads, num_knots = theta_table.shape
    num_seqs = seq_lens.shape[0]
    for name, tensor, dtype, length in (
        ("layer_window", layer_window, torch.int32, num_layers),
        ("layer_k", layer_k, torch.float32, num_layers),
        ("layer_level", layer_level, torch.float32, num_layers),
        ("layer_dense", layer_dense, torch.int8, num_layers),
        ("log2_lengths", log2_lengths, torch.float32, num_knots),
        ("seq_lens", seq_lens, torch.int32, num_seqs),
        ("row_k", row_k, torch.float32, num_seqs),
        ("row_level", row_level, torch.float32, num_seqs),
        ("row_dense", row_dense, torch.float32, num_seqs),
        ("out", out[0, :, 0], torch.float32, num_seqs),
        ("dense", dense[0], torch.int8, num_seqs),
    ):
        if tensor.dtype != dtype or tensor.dim() != 1 or tensor.shape[0] < length:
            raise ValueError(
                f"{name} must hold at least {length} {dtype}, got {list(tensor.shape)} "
                f"{tensor.dtype}"
            )
    if slope_table.shape != (num_layers, num_levels, num_heads) or num_knots < 2:
        raise ValueError(
            f"slope_table {list(slope_table.shape)} does not belong to theta_table "
            f"{list(theta_table.shape)}"
        )
    if num_seqs == 0:
        return
    block = 8
    _lookup_theta_kernel[(triton.cdiv(num_seqs, block), num_layers)](
        theta_table,
        slope_table,
        log2_lengths,
        layer_window,
        layer_k,
        layer_level,
        layer_dense,
        seq_lens,
        row_k,
        row_level,
        row_dense,
        out,
        dense,
        num_seqs,
        min_len,
        out.stride(0),
        dense.stride(0),
        NUM_LEVELS=num_levels,
        NUM_HEADS=num_heads,
        HEADS_PADDED=triton.next_power_of_2(num_heads),
        NUM_KNOTS=num_knots,
        KNOTS_PADDED=triton.next_power_of_2(num_knots),
        SEQS=block,
        num_warps=2,
    )
