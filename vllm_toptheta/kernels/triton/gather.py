"""Step four of the decode kernels: V rows of the keys that are kept, and the stored means of groups
that lose mass, summed per split of a row. Dense rows take an ordinary online softmax here."""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from vllm_toptheta.kernels.layout import NUM_WEIGHTS as _NUM_WEIGHTS
from vllm_toptheta.kernels.triton.rows import (
    LEVELS_PADDED,
    LONG_GROUP,
    _chosen_level,
    _find_tile,
    _load_query,
    _load_state,
    _long_range,
    _tile_range,
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
from vllm_toptheta.kernels.triton.tiles import (
    LOG2E,
    _dot_means,
    _fit_query,
    _load_rows,
    _log2_scores,
)

NUM_WEIGHTS = tl.constexpr(_NUM_WEIGHTS)

_MEANS_AT_ONCE = tl.constexpr(64)
"""Of groups, whole long ones. With 16 their weights take four times as long, and nothing else takes
less."""


@triton.jit
def _store_masses(run_mass_ptr, list_ptr, tile, listed, first_run, masses, is_head):
    """Store what a tile's runs keep, masses [heads, runs], where `_sum_means` looks for it."""
    RUNS: tl.constexpr = masses.shape[1]
    entry = tile * RUNS + tl.arange(0, RUNS)
    is_listed = entry < listed
    run = tl.load(list_ptr + entry, mask=is_listed, other=0) - first_run
    place = (tl.arange(0, masses.shape[0]) * CHUNK_RUNS)[:, None] + run[None, :]
    tl.store(run_mass_ptr + place, masses, mask=is_head[:, None] & is_listed[None, :])


@triton.jit
def _sum_means(
    group_max_ptr,
    group_sum_ptr,
    state_ptr,
    run_mass_ptr,
    acc,
    total,
    pair,
    max_groups,
    weights_ptr,
    means_ptr,
    block_table_ptr,
    long_begin,
    long_end,
    begin,
    seq_len,
    means_block_stride,
    means_group_stride,
    HEADS: tl.constexpr,
    LIST_PADDED: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Stored means of a chunk's whole groups.

    Args:
        run_mass_ptr: of this program, [heads, CHUNK_RUNS]: what is kept of runs from `long_begin`
            on.
        acc, total: of the chunks before: the weighted sum [HEADS_PADDED, DIM_PADDED] of the means,
            each head's HEADS_PADDED // LIST_PADDED times, and their plain sum [DIM_PADDED].
        weights_ptr: [HEADS, NUM_WEIGHTS], of the kv head.

    Returns:
        acc and total with those of this chunk.
    """
    PER_LONG: tl.constexpr = LONG_GROUP // GROUP_SIZE
    LONGS: tl.constexpr = _MEANS_AT_ONCE // PER_LONG
    RUNS: tl.constexpr = GROUP_SIZE // RUN
    COPIES: tl.constexpr = HEADS_PADDED // LIST_PADDED
    head = tl.arange(0, LIST_PADDED)
    is_head = head < HEADS
    rows = pair * HEADS + head
    lse, _ = _load_state(state_ptr, rows, is_head)
    weight = weights_ptr + head * NUM_WEIGHTS
    on_short = tl.load(weight + 2, mask=is_head, other=0.0)
    on_long = tl.load(weight + 3, mask=is_head, other=0.0)
    on_all = tl.load(weight + 4, mask=is_head, other=0.0)
    needs_total = tl.max(tl.abs(on_all), 0) > 0.0
    if (tl.max(tl.abs(on_short) + tl.abs(on_long), 0) > 0.0) | needs_total:
        run = tl.arange(0, RUNS)
        last = long_end * PER_LONG
        group_max_ptr += pair * HEADS * max_groups
        group_sum_ptr += pair * HEADS * max_groups
        # Once or twice: a pipeline would be longer than what it shortens.
        for first in tl.range(long_begin * PER_LONG, last, _MEANS_AT_ONCE, num_stages=1):
            group = first + tl.arange(0, _MEANS_AT_ONCE)
            start = group * GROUP_SIZE
            whole = (group < last) & (start >= begin) & (start + GROUP_SIZE <= seq_len)
            block = tl.load(block_table_ptr + start // BLOCK_SIZE, mask=whole, other=0)
            means = _load_rows(
                means_ptr,
                block,
                start % BLOCK_SIZE // GROUP_SIZE,
                whole,
                means_block_stride,
                means_group_stride,
                HEAD_DIM,
                DIM_PADDED,
            )
            mask = is_head[:, None] & whole[None, :]
            place = (head * max_groups)[:, None] + group[None, :]
            top = tl.load(group_max_ptr + place, mask=mask, other=float("-inf"))
            mass = tl.load(group_sum_ptr + place, mask=mask, other=0.0)
            place = (head * CHUNK_RUNS)[:, None] + ((group - long_begin * PER_LONG) * RUNS)
            of_runs = tl.load(
                run_mass_ptr + place[:, :, None] + run[None, None, :],
                mask=mask[:, :, None],
                other=0.0,
            )
            lost = mass * tl.exp2(top - lse[:, None]) - tl.sum(of_runs, 2)
            by_long = tl.reshape(lost, [LIST_PADDED, LONGS, PER_LONG])
            counts = tl.sum(tl.reshape(whole.to(tl.int32), [LONGS, PER_LONG]), 1)
            share = on_long[:, None] * tl.sum(by_long, 2) / tl.maximum(counts, 1)[None, :]
            weights = on_short[:, None, None] * by_long + share[:, :, None]
            weights = tl.reshape(weights, [LIST_PADDED, 1, _MEANS_AT_ONCE])
            weights = tl.broadcast_to(weights, [LIST_PADDED, COPIES, _MEANS_AT_ONCE])
            # Of groups that are not whole a mean was read as 0.
            acc = _dot_means(tl.reshape(weights, [HEADS_PADDED, _MEANS_AT_ONCE]), means, acc)
            if needs_total:
                total += tl.sum(means.to(tl.float32), 0)
    return acc, total


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize=["window", "block_table_stride"],
    do_not_specialize_on_alignment=[
        "block_table_ptr",
        "seq_lens_ptr",
        "dense_ptr",
        "min_mass_ptr",
        "weights_ptr",
        "k_scale_ptr",
    ],
)
def _gather_kernel(
    query_ptr,
    key_ptr,
    code_ptr,
    scale_ptr,
    value_ptr,
    means_ptr,
    block_table_ptr,
    seq_lens_ptr,
    dense_ptr,
    min_mass_ptr,
    weights_ptr,
    k_scale_ptr,
    query_codes_ptr,
    query_steps_ptr,
    centre_score_ptr,
    group_max_ptr,
    group_sum_ptr,
    run_steps_ptr,
    state_ptr,
    best_run_ptr,
    levels_ptr,
    mass_ptr,
    list_ptr,
    place_ptr,
    run_mass_ptr,
    acc_ptr,
    on_means_ptr,
    mean_sum_ptr,
    softmax_ptr,
    kept_ptr,
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
    means_block_stride,
    means_head_stride,
    means_group_stride,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    LIST_PADDED: tl.constexpr,
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
    """One split of a row for one kv head.

    Value pointers share the key's strides: K and V are halves of the same rows. Probabilities are
    shares of all keys' mass; a sink's part comes in at the end.
    """
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    num_splits = tl.num_programs(1)
    seq_len = tl.load(seq_lens_ptr + seq)
    is_dense = tl.load(dense_ptr + seq) != 0
    begin, tile_begin, tile_end = _tile_range(seq_len, window, split, num_splits, TILE, MIN_TILES)
    _, long_begin, long_end = _long_range(seq_len, window, split, num_splits)
    is_empty = long_begin >= long_end
    if is_dense:
        is_empty = tile_begin >= tile_end
    if is_empty:
        return

    head = tl.arange(0, HEADS_PADDED)
    dim = tl.arange(0, DIM_PADDED)
    lane = tl.arange(0, TILE)
    is_head = head < HEADS
    pair = seq * tl.num_programs(0) + kv_head
    rows = pair * HEADS + head
    parts = rows * num_splits + split
    at_part = parts[:, None] * HEAD_DIM + dim[None, :]
    part_mask = is_head[:, None] & (dim < HEAD_DIM)[None, :]
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
    value_ptr += kv_head.to(tl.int64) * key_head_stride
    means_ptr += kv_head.to(tl.int64) * means_head_stride
    block_table_ptr += seq * block_table_stride
    acc = tl.zeros([HEADS_PADDED, DIM_PADDED], tl.float32)
    total = tl.zeros([HEADS_PADDED], tl.float32)

    if is_dense:
        # V does not wait for the scores here, so that its loads are in flight together with K's.
        max_score = tl.full([HEADS_PADDED], float("-inf"), tl.float32)
        for tile in range(tile_begin, tile_end):
            position = tile * TILE + lane
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
            alpha = tl.exp2(max_score - new_max)
            probs = tl.exp2(scores - new_max[:, None])
            max_score = new_max
            total = total * alpha + tl.sum(probs, 1)
            acc = tl.dot(probs.to(query.dtype), value.to(query.dtype), acc * alpha[:, None])
        tl.store(acc_ptr + at_part, acc, mask=part_mask)
        tl.store(softmax_ptr + parts * 2, max_score, mask=is_head)
        tl.store(softmax_ptr + parts * 2 + 1, total, mask=is_head)
    else:
        lse, cut = _load_state(state_ptr, rows, is_head)
        best_run = tl.load(best_run_ptr + rows, mask=is_head, other=-1)
        level = _chosen_level(
            levels_ptr + pair * 2,
            mass_ptr + pair * HEADS * LEVELS_PADDED,
            tl.load(min_mass_ptr + seq),
            HEADS,
            HEADS_PADDED,
        )
        part = pair * num_splits + split
        list_ptr += part * CHUNK_RUNS
        place_ptr += part * CHUNK_RUNS
        run_mass_ptr += part * (HEADS * CHUNK_RUNS)
        num_kept = 0
        on_means = tl.zeros([HEADS_PADDED, DIM_PADDED], tl.float32)
        mean_sum = tl.zeros([DIM_PADDED], tl.float32)
        PER_LONG: tl.constexpr = LONG_GROUP // GROUP_SIZE
        for chunk in range(long_begin, long_end, CHUNK_KEYS // LONG_GROUP):
            chunk_end = tl.minimum(chunk + CHUNK_KEYS // LONG_GROUP, long_end)
            first_run = chunk * (LONG_GROUP // RUN)
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
                chunk * PER_LONG,
                chunk_end * PER_LONG,
                begin,
                seq_len,
                level,
                HEADS,
                LIST_PADDED,
                BLOCK_SIZE,
                GROUP_SIZE,
            )
            for tile in range(tl.cdiv(listed, TILE // RUN)):
                scores, run, block, slot, position, visible = _score_runs(
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
                kept = tl.max(scores - cut[:, None], 0) >= -level
                kept |= _always_kept(scores, run, best_run, position, begin, seq_len, GROUP_SIZE)
                kept &= visible
                num_kept += tl.sum(kept.to(tl.int32), 0)
                probs = tl.where(kept[None, :], tl.exp2(scores - lse[:, None]), 0.0)
                total += tl.sum(probs, 1)
                RUNS: tl.constexpr = TILE // RUN
                of_runs = tl.sum(tl.reshape(probs, [HEADS_PADDED, RUNS, RUN]), 2)
                _store_masses(run_mass_ptr, list_ptr, tile, listed, first_run, of_runs, is_head)
                value = _load_rows(
                    value_ptr,
                    block,
                    slot,
                    kept,
                    key_block_stride,
                    key_slot_stride,
                    HEAD_DIM,
                    DIM_PADDED,
                )
                acc = tl.dot(probs.to(query.dtype), value.to(query.dtype), acc)
            # What other threads of this program stored about runs is read next.
            tl.debug_barrier()
            on_means, mean_sum = _sum_means(
                group_max_ptr,
                group_sum_ptr,
                state_ptr,
                run_mass_ptr,
                on_means,
                mean_sum,
                pair,
                max_groups,
                weights_ptr + kv_head * HEADS * NUM_WEIGHTS,
                means_ptr,
                block_table_ptr,
                chunk,
                chunk_end,
                begin,
                seq_len,
                means_block_stride,
                means_group_stride,
                HEADS,
                LIST_PADDED,
                HEADS_PADDED,
                HEAD_DIM,
                DIM_PADDED,
                BLOCK_SIZE,
                GROUP_SIZE,
            )
        # Of a head's copies the first.
        COPIES: tl.constexpr = HEADS_PADDED // LIST_PADDED
        means_at = (pair * HEADS + head // COPIES) * num_splits + split
        is_first = (head % COPIES == 0) & (head // COPIES < HEADS)
        tl.store(
            on_means_ptr + means_at[:, None] * HEAD_DIM + dim[None, :],
            on_means,
            mask=is_first[:, None] & (dim < HEAD_DIM)[None, :],
        )
        tl.store(mean_sum_ptr + part * HEAD_DIM + dim, mean_sum, mask=dim < HEAD_DIM)
        tl.store(acc_ptr + at_part, acc, mask=part_mask)
        tl.store(softmax_ptr + parts * 2, tl.zeros_like(total), mask=is_head)
        tl.store(softmax_ptr + parts * 2 + 1, total, mask=is_head)
        tl.store(kept_ptr + part, num_kept)
