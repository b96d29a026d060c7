"""Stage one of the decode kernel: one part of one row's keys in, unnormalised output, softmax state
and counts out.

A program owns one sequence, one kv head and one split of the row. Tiles start at absolute multiples
of the tile size, so a score is computed the same way however the row is cut; theta is absolute, so
the kept set is too.
"""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from vllm_toptheta.kernels.triton_tiles import (
    LOG2E,
    _add_group_means,
    _load_rows,
    _sum_groups,
    _tile_scores,
)


@triton.jit
def _tile_range(seq_len, window, split, num_splits, TILE: tl.constexpr, MIN_TILES: tl.constexpr):
    """The first visible key, and the tiles of one split; both ends are equal where it has none."""
    begin = tl.maximum(seq_len - window, 0)
    first = begin // TILE
    last = tl.cdiv(seq_len, TILE)
    per_split = tl.maximum(tl.cdiv(last - first, num_splits), MIN_TILES)
    start = tl.minimum(first + split * per_split, last)
    return begin, start, tl.minimum(start + per_split, last)


@triton.jit
def _spread_partial_groups(
    weights, probs, kept, visible, position, begin, seq_len, GROUP_SIZE: tl.constexpr
):
    """Spread what the row's partial groups lose over their visible rows.

    Only the group at the window's start and the one at the row's end can be partial; their mean
    over the visible rows is not stored anywhere, so these rows are read.

    Returns:
        The weights with the spread added, and the mask of the rows in partial groups.
    """
    group = position // GROUP_SIZE
    last = seq_len // GROUP_SIZE
    # An aligned start is no partial group; neither is the group that is the tail already.
    first = tl.where(begin % GROUP_SIZE == 0, -1, begin // GROUP_SIZE)
    tail = visible & (group == last)  # empty where the row ends with a group
    head = visible & (group == first) & (group != last)
    dropped = tl.where(kept, 0.0, probs)
    tail_lost = tl.sum(tl.where(tail[None, :], dropped, 0.0), 1)
    head_lost = tl.sum(tl.where(head[None, :], dropped, 0.0), 1)
    tail_size = tl.maximum(tl.sum(tail.to(tl.int32), 0), 1)
    head_size = tl.maximum(tl.sum(head.to(tl.int32), 0), 1)
    weights += tl.where(tail[None, :], (tail_lost / tail_size)[:, None], 0.0)
    weights += tl.where(head[None, :], (head_lost / head_size)[:, None], 0.0)
    return weights, head | tail


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize=["window", "block_table_stride", "theta_stride"],
    do_not_specialize_on_alignment=[
        "block_table_ptr",
        "seq_lens_ptr",
        "theta_ptr",
        "dense_ptr",
        "k_scale_ptr",
    ],
)
def _split_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    means_ptr,
    block_table_ptr,
    seq_lens_ptr,
    theta_ptr,
    dense_ptr,
    k_scale_ptr,
    acc_ptr,
    softmax_ptr,
    best_ptr,
    kept_ptr,
    rows_ptr,
    sm_scale,
    soft_cap,
    window,
    query_stride,
    block_table_stride,
    theta_stride,
    key_block_stride,
    key_head_stride,
    key_slot_stride,
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
    COMPENSATION: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One split. Scratch, indexed by (seq, head, split): acc [HEAD_DIM] and softmax (max, sum)
    float32, best (position, whether another head keeps it) and kept int32; rows by (seq, kv head,
    split) int32.

    Value pointers share the key's strides: K and V are halves of the same rows.
    """
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2)
    num_kv_heads = tl.num_programs(0)
    num_splits = tl.num_programs(1)
    seq_len = tl.load(seq_lens_ptr + seq)
    begin, tile_begin, tile_end = _tile_range(seq_len, window, split, num_splits, TILE, MIN_TILES)
    if tile_begin >= tile_end:
        return

    head = tl.arange(0, HEADS_PADDED)
    dim = tl.arange(0, DIM_PADDED)
    is_head = head < HEADS
    query_head = kv_head * HEADS + head
    query = tl.load(
        query_ptr + seq.to(tl.int64) * query_stride + query_head[:, None] * HEAD_DIM + dim[None, :],
        mask=is_head[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    scale = sm_scale
    if SCALED:
        scale = sm_scale * tl.load(k_scale_ptr)
    key_ptr += kv_head.to(tl.int64) * key_head_stride
    value_ptr += kv_head.to(tl.int64) * key_head_stride
    means_ptr += kv_head.to(tl.int64) * means_head_stride
    block_table_ptr += seq.to(tl.int64) * block_table_stride

    max_score = tl.full([HEADS_PADDED], float("-inf"), tl.float32)
    sum_exp = tl.zeros([HEADS_PADDED], tl.float32)
    acc = tl.zeros([HEADS_PADDED, DIM_PADDED], tl.float32)
    num_kept = tl.zeros([HEADS_PADDED], tl.int32)
    best_position = tl.zeros([HEADS_PADDED], tl.int32)
    best_shared = tl.zeros([HEADS_PADDED], tl.int32)
    rows_read = 0
    lane = tl.arange(0, TILE)

    if tl.load(dense_ptr + seq) != 0:
        # V does not wait for the scores here, so that its loads are in flight together with K's.
        for tile in range(tile_begin, tile_end):
            position = tile * TILE + lane
            visible = (position >= begin) & (position < seq_len)
            block = tl.load(block_table_ptr + position // BLOCK_SIZE, mask=visible, other=0)
            offset = position % BLOCK_SIZE
            scores = _tile_scores(
                query,
                key_ptr,
                block,
                offset,
                visible,
                scale,
                soft_cap,
                key_block_stride,
                key_slot_stride,
                HEAD_DIM,
                DIM_PADDED,
                SOFT_CAP,
            )
            scores = tl.where(visible[None, :], scores, float("-inf"))
            value = _load_rows(
                value_ptr,
                block,
                offset,
                visible,
                key_block_stride,
                key_slot_stride,
                HEAD_DIM,
                DIM_PADDED,
            )
            new_max = tl.maximum(max_score, tl.max(scores, 1))
            alpha = tl.exp2((max_score - new_max) * LOG2E)
            probs = tl.exp2((scores - new_max[:, None]) * LOG2E)
            max_score = new_max
            sum_exp = sum_exp * alpha + tl.sum(probs, 1)
            acc = tl.dot(probs.to(query.dtype), value.to(query.dtype), acc * alpha[:, None])
    else:
        theta = tl.load(
            theta_ptr + seq.to(tl.int64) * theta_stride + query_head,
            mask=is_head,
            other=float("inf"),
        )
        for tile in range(tile_begin, tile_end):
            position = tile * TILE + lane
            visible = (position >= begin) & (position < seq_len)
            block = tl.load(block_table_ptr + position // BLOCK_SIZE, mask=visible, other=0)
            offset = position % BLOCK_SIZE
            scores = _tile_scores(
                query,
                key_ptr,
                block,
                offset,
                visible,
                scale,
                soft_cap,
                key_block_stride,
                key_slot_stride,
                HEAD_DIM,
                DIM_PADDED,
                SOFT_CAP,
            )
            scores = tl.where(visible[None, :], scores, float("-inf"))
            tile_max = tl.max(scores, 1)
            kept = (scores >= theta[:, None]) & visible[None, :]
            any_head = tl.max(kept.to(tl.int32), 0)
            num_kept += tl.sum(kept.to(tl.int32), 1)
            rows_read += tl.sum(any_head, 0)

            # The row's best key is kept even below theta. Whether a split's best is the row's best
            # is known to the merge only, so it is noted here; heads that reach theta need no note.
            is_best = (tile_max > max_score) & (tile_max < theta) & is_head
            if tl.max(is_best.to(tl.int32), 0) > 0:
                index = tl.argmax(scores, 1)
                at_best = lane[None, :] == index[:, None]
                shared = tl.max(tl.where(at_best, any_head[None, :], 0), 1)
                best_position = tl.where(is_best, tile * TILE + index, best_position)
                best_shared = tl.where(is_best, shared, best_shared)

            new_max = tl.maximum(max_score, tile_max)
            alpha = tl.exp2((max_score - new_max) * LOG2E)
            probs = tl.exp2((scores - new_max[:, None]) * LOG2E)
            max_score = new_max
            sum_exp = sum_exp * alpha + tl.sum(probs, 1)
            acc = acc * alpha[:, None]
            weights = tl.where(kept, probs, 0.0)
            rows = any_head > 0
            lost = tl.where(kept, 0.0, probs)
            if COMPENSATION:
                tile_start = tile * TILE
                is_edge = (tile_start < begin) | (tile_start + TILE > seq_len)
                if is_edge:
                    weights, partial = _spread_partial_groups(
                        weights, probs, kept, visible, position, begin, seq_len, GROUP_SIZE
                    )
                    rows = rows | partial
            if tl.max(rows.to(tl.int32), 0) > 0:
                # Read again rather than kept: registers are scarcer here than the first-level cache
                # is slow.
                again = tl.load(block_table_ptr + position // BLOCK_SIZE, mask=rows, other=0)
                value = _load_rows(
                    value_ptr,
                    again,
                    offset,
                    rows,
                    key_block_stride,
                    key_slot_stride,
                    HEAD_DIM,
                    DIM_PADDED,
                )
                acc = tl.dot(weights.to(query.dtype), value.to(query.dtype), acc)
            if COMPENSATION:
                acc = _add_group_means(
                    acc,
                    _sum_groups(lost, HEADS_PADDED, GROUP_SIZE, TILE),
                    query,
                    means_ptr,
                    block_table_ptr,
                    tile * TILE,
                    begin,
                    seq_len,
                    means_block_stride,
                    means_group_stride,
                    HEAD_DIM,
                    DIM_PADDED,
                    BLOCK_SIZE,
                    GROUP_SIZE,
                    TILE,
                )

    num_heads = num_kv_heads * HEADS
    row = (seq.to(tl.int64) * num_heads + query_head) * num_splits + split
    tl.store(
        acc_ptr + row[:, None] * HEAD_DIM + dim[None, :],
        acc,
        mask=is_head[:, None] & (dim < HEAD_DIM)[None, :],
    )
    tl.store(softmax_ptr + row * 2, max_score, mask=is_head)
    tl.store(softmax_ptr + row * 2 + 1, sum_exp, mask=is_head)
    tl.store(best_ptr + row * 2, best_position, mask=is_head)
    tl.store(best_ptr + row * 2 + 1, best_shared, mask=is_head)
    tl.store(kept_ptr + row, num_kept, mask=is_head)
    tl.store(rows_ptr + (seq.to(tl.int64) * num_kv_heads + kv_head) * num_splits + split, rows_read)
