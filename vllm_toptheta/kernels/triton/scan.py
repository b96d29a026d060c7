"""Step one of the decode kernels: every visible key is scored once, and of each compensation group
a head's greatest score and sum of exponentials are noted, and how far below it the greatest score
of each run of keys lies. It knows no threshold."""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from vllm_toptheta.kernels.triton.rows import _find_tile, _load_query, _tile_range
from vllm_toptheta.kernels.triton.runs import RUN, _count_steps
from vllm_toptheta.kernels.triton.sketch import (
    _exact_range,
    _load_codes,
    _sketched_scores,
)
from vllm_toptheta.kernels.triton.tiles import LOG2E, _fit_query, _log2_scores


@triton.jit
def _note_tile(
    scores,
    group_max_ptr,
    group_sum_ptr,
    run_steps_ptr,
    rows,
    is_head,
    tile,
    max_groups,
    GROUP_SIZE: tl.constexpr,
):
    """Store what is noted of a tile's groups and runs; scores [heads, TILE], -inf where hidden."""
    HEADS_PADDED: tl.constexpr = scores.shape[0]
    TILE: tl.constexpr = scores.shape[1]
    GROUPS: tl.constexpr = TILE // GROUP_SIZE
    RUNS: tl.constexpr = TILE // RUN
    lane = tl.arange(0, TILE)
    run = tl.arange(0, RUNS)
    runs = tl.max(tl.reshape(scores, [HEADS_PADDED, RUNS, RUN]), 2)
    for index in tl.static_range(GROUPS):
        of_group = scores
        of_runs = runs
        if GROUPS > 1:
            of_group = tl.where((lane // GROUP_SIZE == index)[None, :], scores, float("-inf"))
            of_runs = of_group
        top = tl.max(of_runs, 1)
        # A window may show nothing of the first groups.
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(of_group - shift[:, None]), 1)
        group = rows * max_groups + tile * GROUPS + index
        tl.store(group_max_ptr + group, top, mask=is_head)
        tl.store(group_sum_ptr + group, total, mask=is_head)
        place = (rows * max_groups * (GROUP_SIZE // RUN) + tile * RUNS)[:, None] + run[None, :]
        tl.store(
            run_steps_ptr + place,
            _count_steps(runs, shift[:, None]),
            mask=is_head[:, None] & (run * RUN // GROUP_SIZE == index)[None, :],
        )


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize=["window", "block_table_stride"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "dense_ptr", "k_scale_ptr"],
)
def _scan_kernel(
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
    group_sum_ptr,
    run_steps_ptr,
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
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    SKETCH: tl.constexpr,
):
    """One split of a row for one kv head; dense rows need no scan."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + seq)
    begin, tile_begin, tile_end = _tile_range(
        seq_len, window, split, tl.num_programs(1), TILE, MIN_TILES
    )
    if (tile_begin >= tile_end) | (tl.load(dense_ptr + seq) != 0):
        return

    head = tl.arange(0, HEADS_PADDED)
    lane = tl.arange(0, TILE)
    key_ptr += kv_head.to(tl.int64) * key_head_stride
    block_table_ptr += seq * block_table_stride
    rows = (seq * tl.num_programs(0) + kv_head) * HEADS + head
    is_head = head < HEADS
    if SKETCH:
        wide = kv_head.to(tl.int64)
        pair = seq * tl.num_programs(0) + kv_head
        codes_of_query, factor = _load_codes(
            query_codes_ptr, query_steps_ptr, pair, HEADS, HEADS_PADDED, HEAD_DIM, DIM_PADDED
        )
        of_first_head = centre_score_ptr + pair * HEADS * max_groups
        trusted, first_exact, last_exact = _exact_range(of_first_head, tile_begin, tile_end)
        factor *= sm_scale * LOG2E
        code_ptr += wide * (BLOCK_SIZE * HEAD_DIM)
        scale_ptr += wide * (BLOCK_SIZE // TILE)
        # Of groups that are scored with K something is noted, which the next loop replaces.
        for tile in range(tile_begin, tl.where(trusted > 0, tile_end, tile_begin)):
            position = tile * TILE + lane
            block, offset = _find_tile(block_table_ptr, tile, position < seq_len, BLOCK_SIZE, TILE)
            centre = tl.load(centre_score_ptr + rows * max_groups + tile, mask=is_head, other=0.0)
            step = tl.load(
                scale_ptr
                + block.to(tl.int64) * (sketch_block_stride // 4)
                + tile % (BLOCK_SIZE // TILE)
            )
            scores = _sketched_scores(
                codes_of_query,
                (factor * step)[:, None],
                centre[:, None],
                code_ptr,
                block,
                offset,
                position < seq_len,
                soft_cap,
                sketch_block_stride,
                HEAD_DIM,
                DIM_PADDED,
                SOFT_CAP,
            )
            _note_tile(
                scores,
                group_max_ptr,
                group_sum_ptr,
                run_steps_ptr,
                rows,
                is_head,
                tile,
                max_groups,
                GROUP_SIZE,
            )
        # Whatever thread wrote what.
        tl.debug_barrier()
        tile_begin = first_exact
        tile_end = last_exact
    query = _load_query(
        query_ptr + seq * query_stride, kv_head, HEADS, HEADS_PADDED, HEAD_DIM, DIM_PADDED
    )
    scale = sm_scale * LOG2E
    if SCALED:
        scale = scale * tl.load(k_scale_ptr)
    query, scale = _fit_query(query, scale, key_ptr)
    for tile in range(tile_begin, tile_end):
        end = seq_len
        heads = HEADS
        if SKETCH:
            by_key = tl.load(of_first_head + tile) == float("inf")
            end = tl.where(by_key, seq_len, 0)
            heads = tl.where(by_key, HEADS, 0)
        position = tile * TILE + lane
        visible = (position >= begin) & (position < end)
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
        _note_tile(
            tl.where(visible[None, :], scores, float("-inf")),
            group_max_ptr,
            group_sum_ptr,
            run_steps_ptr,
            rows,
            head < heads,
            tile,
            max_groups,
            GROUP_SIZE,
        )
