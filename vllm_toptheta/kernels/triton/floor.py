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
    _load_query,
    _load_state,
    _long_range,
)
from vllm_toptheta.kernels.triton.runs import (
    CHUNK_KEYS,
    CHUNK_RUNS,
    RUN,
    _always_kept,
    _list_runs,
    _score_runs,
)
from vllm_toptheta.kernels.triton.sketch import _load_codes
from vllm_toptheta.kernels.triton.tiles import LOG2E, _fit_query


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize=["window", "block_table_stride"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "dense_ptr", "k_scale_ptr"],
)
def _floor_kernel(
    query_ptr,
    key_ptr,
    code_ptr,
    scale_ptr,
    block_table_ptr,
    seq_lens_ptr,
    dense_ptr,
    k_scale_ptr,
    query_codes_ptr,
    query_steps_ptr,
    centre_score_ptr,
    group_max_ptr,
    run_steps_ptr,
    state_ptr,
    best_run_ptr,
    levels_ptr,
    mass_ptr,
    list_ptr,
    place_ptr,
    run_mass_ptr,
    sm_scale,
    soft_cap,
    window,
    max_groups,
    query_stride,
    block_table_stride,
    key_block_stride,
    key_head_stride,
    key_slot_stride,
    sketch_block_stride,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    LIST_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    SKETCH: tl.constexpr,
):
    """One split of a row for one kv head; runs that keep nothing at the last level are not on the
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
    query, scale = _fit_query(query, scale, key_ptr)
    codes_of_query, factor = query, scale
    if SKETCH:
        codes_of_query, factor = _load_codes(
            query_codes_ptr, query_steps_ptr, pair, HEADS, HEADS_PADDED, HEAD_DIM, DIM_PADDED
        )
        factor *= scale
        code_ptr += kv_head.to(tl.int64) * (BLOCK_SIZE * HEAD_DIM)
        scale_ptr += kv_head.to(tl.int64) * (BLOCK_SIZE // GROUP_SIZE)
        centre_score_ptr += pair * HEADS * max_groups
    key_ptr += kv_head.to(tl.int64) * key_head_stride
    block_table_ptr += seq * block_table_stride
    lse, cut = _load_state(state_ptr, rows, is_head)
    best_run = tl.load(best_run_ptr + rows, mask=is_head, other=-1)
    part = pair * tl.num_programs(1) + tl.program_id(1)
    list_ptr += part * CHUNK_RUNS
    place_ptr += part * CHUNK_RUNS
    run_mass_ptr += part * (HEADS * CHUNK_RUNS)

    column = tl.arange(0, LEVELS_PADDED)
    masses = tl.zeros([HEADS_PADDED, LEVELS_PADDED], tl.int32)
    for chunk in range(long_begin, long_end, CHUNK_KEYS // LONG_GROUP):
        listed = _list_runs(
            group_max_ptr,
            run_steps_ptr,
            state_ptr,
            best_run_ptr,
            block_table_ptr,
            list_ptr,
            place_ptr,
            run_mass_ptr,
            pair,
            max_groups,
            chunk * (LONG_GROUP // GROUP_SIZE),
            tl.minimum(chunk + CHUNK_KEYS // LONG_GROUP, long_end) * (LONG_GROUP // GROUP_SIZE),
            begin,
            seq_len,
            last_level,
            HEADS,
            LIST_PADDED,
            BLOCK_SIZE,
            GROUP_SIZE,
        )
        for tile in range(tl.cdiv(listed, TILE // RUN)):
            scores, run, _, _, position, _ = _score_runs(
                query,
                key_ptr,
                list_ptr,
                place_ptr,
                codes_of_query,
                factor,
                code_ptr,
                scale_ptr,
                centre_score_ptr,
                tile,
                listed,
                begin,
                seq_len,
                scale,
                soft_cap,
                max_groups,
                key_block_stride,
                key_slot_stride,
                sketch_block_stride,
                HEADS,
                HEAD_DIM,
                DIM_PADDED,
                BLOCK_SIZE,
                GROUP_SIZE,
                TILE,
                SOFT_CAP,
                SKETCH,
            )
            margin = tl.max(scores - cut[:, None], 0)
            always = _always_kept(scores, run, best_run, position, begin, seq_len, GROUP_SIZE)
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
