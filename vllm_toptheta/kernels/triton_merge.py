"""Stage two of the decode kernel: the splits' partial results in, the row's output, log-sum-exp and
counts out.
"""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from vllm_toptheta.kernels.triton_tiles import LOG2E


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize=["window", "num_splits", "block_table_stride"],
    do_not_specialize_on_alignment=[
        "block_table_ptr",
        "seq_lens_ptr",
        "dense_ptr",
        "sinks_ptr",
        "v_scale_ptr",
        "lse_ptr",
        "num_kept_ptr",
        "v_rows_read_ptr",
    ],
)
def _merge_kernel(
    value_ptr,
    means_ptr,
    block_table_ptr,
    seq_lens_ptr,
    dense_ptr,
    sinks_ptr,
    v_scale_ptr,
    acc_ptr,
    softmax_ptr,
    best_ptr,
    kept_ptr,
    rows_ptr,
    out_ptr,
    lse_ptr,
    num_kept_ptr,
    v_rows_read_ptr,
    window,
    num_splits,
    out_stride,
    block_table_stride,
    value_block_stride,
    value_head_stride,
    value_slot_stride,
    means_block_stride,
    means_head_stride,
    means_group_stride,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    COMPENSATION: tl.constexpr,
    SINKS: tl.constexpr,
    SCALED: tl.constexpr,
    LSE: tl.constexpr,
):
    """One query head of one sequence; the first head of a group also counts the group's V rows."""
    head = tl.program_id(0)
    seq = tl.program_id(1)
    num_heads = tl.num_programs(0)
    kv_head = head // HEADS
    dim = tl.arange(0, DIM_PADDED)
    is_dim = dim < HEAD_DIM
    seq_len = tl.load(seq_lens_ptr + seq)
    out_row = out_ptr + seq.to(tl.int64) * out_stride + head * HEAD_DIM
    count = seq.to(tl.int64) * num_heads + head
    rows_out = v_rows_read_ptr + seq.to(tl.int64) * (num_heads // HEADS) + kv_head
    if seq_len <= 0:  # padding of a captured batch
        tl.store(out_row + dim, tl.zeros([DIM_PADDED], out_ptr.dtype.element_ty), mask=is_dim)
        tl.store(num_kept_ptr + count, 0)
        tl.store(rows_out, 0)
        if LSE:
            tl.store(lse_ptr + count, float("-inf"))
        return

    begin = tl.maximum(seq_len - window, 0)
    num_tiles = tl.cdiv(seq_len, TILE) - begin // TILE
    per_split = tl.maximum(tl.cdiv(num_tiles, num_splits), MIN_TILES)
    num_active = tl.cdiv(num_tiles, per_split)
    split = tl.arange(0, SPLITS_PADDED)
    active = split < num_active
    row = (seq.to(tl.int64) * num_heads + head) * num_splits + split
    split_max = tl.load(softmax_ptr + row * 2, mask=active, other=float("-inf"))
    split_sum = tl.load(softmax_ptr + row * 2 + 1, mask=active, other=0.0)
    row_max = tl.max(split_max, 0)
    top = row_max
    if SINKS:
        sink = tl.load(sinks_ptr + head)
        top = tl.maximum(row_max, sink)
    denominator = tl.sum(split_sum * tl.exp2((split_max - top) * LOG2E), 0)
    if SINKS:
        denominator += tl.exp2((sink - top) * LOG2E)

    acc = tl.zeros([DIM_PADDED], tl.float32)
    first_row = (seq.to(tl.int64) * num_heads + head) * num_splits
    for start in range(0, num_active, CHUNK):
        index = start + tl.arange(0, CHUNK)
        is_part = index < num_active
        part_max = tl.load(softmax_ptr + (first_row + index) * 2, mask=is_part, other=float("-inf"))
        part = tl.load(
            acc_ptr + (first_row + index)[:, None] * HEAD_DIM + dim[None, :],
            mask=is_part[:, None] & is_dim[None, :],
            other=0.0,
        )
        acc += tl.sum(part * tl.exp2((part_max - top) * LOG2E)[:, None], 0)

    if tl.load(dense_ptr + seq) != 0:
        tl.store(num_kept_ptr + count, seq_len - begin)
        if head % HEADS == 0:
            tl.store(rows_out, seq_len - begin)
    else:
        kept = tl.sum(tl.load(kept_ptr + row, mask=active, other=0), 0)
        if kept == 0:
            kept += 1
            best_split = tl.argmax(split_max, 0)
            position = tl.load(best_ptr + (first_row + best_split) * 2)
            prob = tl.exp2((row_max - top) * LOG2E)
            acc += prob * _best_row_minus_mean(
                value_ptr + kv_head.to(tl.int64) * value_head_stride,
                means_ptr + kv_head.to(tl.int64) * means_head_stride,
                block_table_ptr + seq.to(tl.int64) * block_table_stride,
                position,
                begin,
                seq_len,
                value_block_stride,
                value_slot_stride,
                means_block_stride,
                means_group_stride,
                HEAD_DIM,
                DIM_PADDED,
                BLOCK_SIZE,
                GROUP_SIZE,
                COMPENSATION,
            )
        tl.store(num_kept_ptr + count, kept)
        if head % HEADS == 0:
            rows = tl.load(rows_ptr + (count // HEADS) * num_splits + split, mask=active, other=0)
            extra = _extra_rows(
                softmax_ptr,
                best_ptr,
                kept_ptr,
                count,
                num_splits,
                num_active,
                HEADS,
                HEADS_PADDED,
                SPLITS_PADDED,
            )
            tl.store(rows_out, tl.sum(rows, 0) + extra)

    result = acc / denominator
    if SCALED:
        result = result * tl.load(v_scale_ptr)
    tl.store(out_row + dim, result.to(out_ptr.dtype.element_ty), mask=is_dim)
    if LSE:
        tl.store(lse_ptr + count, top + tl.log2(denominator) / LOG2E)


@triton.jit
def _best_row_minus_mean(
    value_ptr,
    means_ptr,
    block_table_ptr,
    position,
    begin,
    seq_len,
    value_block_stride,
    value_slot_stride,
    means_block_stride,
    means_group_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    COMPENSATION: tl.constexpr,
):
    """V of the row's best key, less the mean that stage one put in its place, [DIM_PADDED]."""
    dim = tl.arange(0, DIM_PADDED)
    is_dim = dim < HEAD_DIM
    block = tl.load(block_table_ptr + position // BLOCK_SIZE).to(tl.int64)
    row = value_ptr + block * value_block_stride
    best = tl.load(
        row + (position % BLOCK_SIZE) * value_slot_stride + dim, mask=is_dim, other=0.0
    ).to(tl.float32)
    if COMPENSATION:
        start = position // GROUP_SIZE * GROUP_SIZE
        if (start < begin) | (start + GROUP_SIZE > seq_len):
            total = tl.zeros([DIM_PADDED], tl.float32)
            for first in range(0, GROUP_SIZE, 16):
                member = start + first + tl.arange(0, 16)
                visible = (member >= begin) & (member < seq_len)
                # A group lies within one block.
                rows = tl.load(
                    row + ((member % BLOCK_SIZE) * value_slot_stride)[:, None] + dim[None, :],
                    mask=visible[:, None] & is_dim[None, :],
                    other=0.0,
                )
                total += tl.sum(rows.to(tl.float32), 0)
            size = tl.minimum(start + GROUP_SIZE, seq_len) - tl.maximum(start, begin)
            best -= total / size
        else:
            mean = means_ptr + block * means_block_stride
            mean += (start % BLOCK_SIZE) // GROUP_SIZE * means_group_stride
            best -= tl.load(mean + dim, mask=is_dim, other=0.0).to(tl.float32)
    return best


@triton.jit
def _extra_rows(
    softmax_ptr,
    best_ptr,
    kept_ptr,
    first_head,
    num_splits,
    num_active,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    """V rows that are read only because they are the best key of heads that reach theta nowhere.

    Args:
        first_head: index of the group's first (seq, head) pair.
    """
    head = tl.arange(0, HEADS_PADDED)
    split = tl.arange(0, SPLITS_PADDED)
    row = (first_head + head)[:, None] * num_splits + split[None, :]
    mask = (head < HEADS)[:, None] & (split < num_active)[None, :]
    split_max = tl.load(softmax_ptr + row * 2, mask=mask, other=float("-inf"))
    kept = tl.sum(tl.load(kept_ptr + row, mask=mask, other=0), 1)
    best_split = tl.argmax(split_max, 1)
    best = best_ptr + ((first_head + head) * num_splits + best_split) * 2
    alone = (head < HEADS) & (kept == 0)
    position = tl.load(best, mask=alone, other=-1)
    shared = tl.load(best + 1, mask=alone, other=1)
    same = (position[:, None] == position[None, :]) & (head[None, :] < head[:, None])
    repeated = tl.max((same & alone[None, :]).to(tl.int32), 1)
    return tl.sum((alone & (shared == 0) & (repeated == 0)).to(tl.int32), 0)
