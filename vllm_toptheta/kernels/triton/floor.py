"""Step three of the decode kernels, where `select` could not tell how often a row's threshold
halves: the mass that each head keeps at the levels in question."""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from vllm_toptheta.kernels.triton.rows import (
    LEVELS_PADDED,
    LONG_GROUP,
    MASS_UNIT,
    _always_kept,
    _find_tile,
    _load_query,
    _load_state,
    _long_range,
)
from vllm_toptheta.kernels.triton.tiles import LOG2E, _log2_scores


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize=["window", "block_table_stride"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "dense_ptr", "k_scale_ptr"],
)
def _floor_kernel(
    query_ptr,
    key_ptr,
    block_table_ptr,
    seq_lens_ptr,
    dense_ptr,
    k_scale_ptr,
    state_ptr,
    best_tile_ptr,
    levels_ptr,
    mass_ptr,
    tiles_ptr,
    starts_ptr,
    sm_scale,
    soft_cap,
    window,
    max_longs,
    query_stride,
    block_table_stride,
    key_block_stride,
    key_head_stride,
    key_slot_stride,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One split of a row for one kv head; tiles that keep nothing at the last level are not on the
    list."""
    kv_head = tl.program_id(0)
    seq = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + seq)
    if (seq_len <= 0) | (tl.load(dense_ptr + seq) != 0):
        return
    pair = seq * tl.num_programs(0) + kv_head
    first_level = tl.load(levels_ptr + pair * 2)
    last_level = tl.load(levels_ptr + pair * 2 + 1)
    begin, long_begin, long_end = _long_range(seq_len, window, tl.program_id(1), tl.num_programs(1))
    if (first_level >= last_level) | (long_begin >= long_end):
        return

    head = tl.arange(0, HEADS_PADDED)
    is_head = head < HEADS
    rows = pair * HEADS + head
    query = _load_query(
        query_ptr + seq * query_stride, kv_head, HEADS, HEADS_PADDED, HEAD_DIM, DIM_PADDED
    )
    scale = sm_scale * LOG2E
    if SCALED:
        scale = scale * tl.load(k_scale_ptr)
    key_ptr += kv_head.to(tl.int64) * key_head_stride
    block_table_ptr += seq * block_table_stride
    lse, cut = _load_state(state_ptr, rows, is_head)
    best_tile = tl.load(best_tile_ptr + rows, mask=is_head, other=-1)
    tiles_ptr += pair * (max_longs * (LONG_GROUP // TILE))
    starts_ptr += pair * (max_longs + 1)

    column = tl.arange(0, LEVELS_PADDED)
    masses = tl.zeros([HEADS_PADDED, LEVELS_PADDED], tl.int32)
    for index in range(tl.load(starts_ptr + long_begin), tl.load(starts_ptr + long_end)):
        tile = tl.load(tiles_ptr + index)
        position = tile * TILE + tl.arange(0, TILE)
        visible = (position >= begin) & (position < seq_len)
        block, offset = _find_tile(block_table_ptr, tile, visible, BLOCK_SIZE, TILE)
        scores = _log2_scores(
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
        margin = tl.max(scores - cut[:, None], 0)
        always = _always_kept(scores, tile, best_tile, begin, seq_len, GROUP_SIZE, TILE)
        probs = tl.exp2(scores - lse[:, None])
        for level in range(first_level, last_level):
            kept = always | (margin >= -level)
            mass = tl.sum(tl.where(kept[None, :], probs, 0.0), 1)
            units = (mass * MASS_UNIT + 0.5).to(tl.int32)
            masses += tl.where((column == level)[None, :], units[:, None], 0)
    wanted = (column >= first_level) & (column < last_level)
    tl.atomic_add(
        mass_ptr + rows[:, None] * LEVELS_PADDED + column[None, :],
        masses,
        mask=is_head[:, None] & wanted[None, :],
        sem="relaxed",
    )
