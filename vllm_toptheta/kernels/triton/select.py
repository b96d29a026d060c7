"""Step two of the decode kernels: a row's denominator, the scores from which its keys are kept, and
the runs of its heads' best keys."""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from vllm_toptheta.kernels.triton.rows import LEVELS_PADDED, MAX_LIFTS, STATE
from vllm_toptheta.kernels.triton.runs import RUN
from vllm_toptheta.kernels.triton.tiles import LOG2E

_CHUNK = tl.constexpr(64)
"""Tiles of one step over a row."""


@triton.jit
def _load_groups(
    group_max_ptr,
    group_sum_ptr,
    rows,
    is_head,
    tile,
    first,
    last,
    max_groups,
    index,
    GROUPS: tl.constexpr,
):
    """The groups of this index in tiles [_CHUNK] from `first` up to `last`: greatest scores and
    sums, [heads, _CHUNK]."""
    place = (rows * max_groups)[:, None] + (tile * GROUPS + index)[None, :]
    mask = is_head[:, None] & ((tile >= first) & (tile < last))[None, :]
    top = tl.load(group_max_ptr + place, mask=mask, other=float("-inf"))
    return top, tl.load(group_sum_ptr + place, mask=mask, other=0.0)


@triton.jit
def _bound_masses(
    group_max_ptr,
    group_sum_ptr,
    rows,
    is_head,
    first,
    last,
    begin,
    seq_len,
    max_groups,
    level,
    lse,
    cut,
    row_max,
    best_tile,
    edge_first,
    edge_last,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """At least and at most what each head keeps at a level, [heads]: of a group that holds a key
    that is kept one key or all of them."""
    # A head's best key is kept in any case; where its tile is an edge it may be counted below.
    counted = (row_max - cut >= -level) | (best_tile == edge_first) | (best_tile == edge_last)
    least = tl.where(counted, 0.0, tl.exp2(row_max - lse))
    most = tl.zeros_like(least)
    GROUPS: tl.constexpr = TILE // GROUP_SIZE
    for chunk in range(first // _CHUNK, tl.cdiv(last, _CHUNK)):
        tile = chunk * _CHUNK + tl.arange(0, _CHUNK)
        is_best = (best_tile[:, None] == tile[None, :]) & is_head[:, None]
        has_best = tl.max(is_best.to(tl.int32), 0) > 0
        for index in tl.static_range(GROUPS):
            top, total = _load_groups(
                group_max_ptr,
                group_sum_ptr,
                rows,
                is_head,
                tile,
                first,
                last,
                max_groups,
                index,
                GROUPS,
            )
            start = tile * TILE + index * GROUP_SIZE
            partial = (start < begin) | (start + GROUP_SIZE > seq_len)
            reaches = top - cut[:, None] >= -level
            may_keep = (tl.max(reaches.to(tl.int32), 0) > 0) | has_best | partial
            best = tl.exp2(top - lse[:, None])
            mass = total * best
            most += tl.sum(tl.where(may_keep[None, :], mass, 0.0), 1)
            sure = tl.where(reaches, best, 0.0)
            least += tl.sum(tl.where(partial[None, :], mass, sure), 1)
    return least, most


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize=["window", "log_min_prob_stride"],
    do_not_specialize_on_alignment=[
        "seq_lens_ptr",
        "dense_ptr",
        "log_min_prob_ptr",
        "min_mass_ptr",
        "sinks_ptr",
    ],
)
def _select_kernel(
    seq_lens_ptr,
    dense_ptr,
    log_min_prob_ptr,
    min_mass_ptr,
    sinks_ptr,
    group_max_ptr,
    group_sum_ptr,
    run_steps_ptr,
    state_ptr,
    best_run_ptr,
    levels_ptr,
    mass_ptr,
    window,
    max_groups,
    log_min_prob_stride,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SINKS: tl.constexpr,
):
    """One row and kv head. Everything is summed in one order, so that equal rows get equal bits."""
    kv_head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + seq)
    if (seq_len <= 0) | (tl.load(dense_ptr + seq) != 0):
        return
    begin = tl.maximum(seq_len - window, 0)
    first = begin // TILE
    last = tl.cdiv(seq_len, TILE)
    GROUPS: tl.constexpr = TILE // GROUP_SIZE
    head = tl.arange(0, HEADS_PADDED)
    is_head = head < HEADS
    pair = seq * tl.num_programs(0) + kv_head
    rows = pair * HEADS + head

    # Heads of padding have no keys; what they start with keeps their numbers finite.
    row_max = tl.where(is_head, float("-inf"), 0.0)
    row_sum = tl.where(is_head, 0.0, 1.0)
    best_tile = tl.zeros([HEADS_PADDED], tl.int32)
    for chunk in range(first // _CHUNK, tl.cdiv(last, _CHUNK)):
        tile = chunk * _CHUNK + tl.arange(0, _CHUNK)
        tile_max = tl.full([HEADS_PADDED, _CHUNK], float("-inf"), tl.float32)
        for index in tl.static_range(GROUPS):
            top, _ = _load_groups(
                group_max_ptr,
                group_sum_ptr,
                rows,
                is_head,
                tile,
                first,
                last,
                max_groups,
                index,
                GROUPS,
            )
            tile_max = tl.maximum(tile_max, top)
        chunk_max = tl.max(tile_max, 1)
        best = chunk * _CHUNK + tl.argmax(tile_max, 1)
        best_tile = tl.where(chunk_max > row_max, best, best_tile)
        new_max = tl.maximum(row_max, chunk_max)
        row_sum = row_sum * tl.exp2(row_max - new_max)
        for index in tl.static_range(GROUPS):
            top, total = _load_groups(
                group_max_ptr,
                group_sum_ptr,
                rows,
                is_head,
                tile,
                first,
                last,
                max_groups,
                index,
                GROUPS,
            )
            row_sum += tl.sum(total * tl.exp2(top - new_max[:, None]), 1)
        row_max = new_max

    lse = row_max + tl.log2(row_sum)
    denominator = lse
    if SINKS:
        sink = tl.load(sinks_ptr + kv_head * HEADS + head, mask=is_head, other=0.0) * LOG2E
        shift = tl.maximum(lse, sink)
        denominator = shift + tl.log2(tl.exp2(lse - shift) + tl.exp2(sink - shift))
    log_min_prob = tl.load(log_min_prob_ptr + seq * log_min_prob_stride + kv_head)
    cut = denominator + log_min_prob * LOG2E
    tl.store(state_ptr + rows * STATE, lse, mask=is_head)
    tl.store(state_ptr + rows * STATE + 1, cut, mask=is_head)
    tl.store(state_ptr + rows * STATE + 2, tl.exp2(lse - denominator), mask=is_head)
    # Of two best keys the first: no other run is 0 steps below the greatest score of all.
    run = best_tile[:, None] * (TILE // RUN) + tl.arange(0, TILE // RUN)[None, :]
    group = (rows * max_groups)[:, None] + run * RUN // GROUP_SIZE
    top = tl.load(group_max_ptr + group, mask=is_head[:, None], other=float("-inf"))
    place = (rows * max_groups * (GROUP_SIZE // RUN))[:, None] + run
    steps = tl.load(run_steps_ptr + place, mask=is_head[:, None], other=1)
    is_best = (top == row_max[:, None]) & (steps == 0)
    tl.store(best_run_ptr + rows, tl.min(tl.where(is_best, run, 2**30), 1), mask=is_head)
    lse = tl.where(is_head, lse, float("inf"))
    cut = tl.where(is_head, cut, float("inf"))

    # Tiles with a partial group: its keys are all kept.
    edge_first = tl.where(begin % GROUP_SIZE == 0, -1, first)
    edge_last = tl.where(seq_len % GROUP_SIZE == 0, -1, last - 1)

    # The level lies between the first one at which every head may keep enough, and the first one
    # at which it does for sure. Where these differ the floor kernel looks at the keys.
    min_mass = tl.load(min_mass_ptr + seq)
    first_level = 0
    last_level = 0
    if min_mass > 0.0:
        level = 0
        last_level = MAX_LIFTS
        while level < last_level:
            least, most = _bound_masses(
                group_max_ptr,
                group_sum_ptr,
                rows,
                is_head,
                first,
                last,
                begin,
                seq_len,
                max_groups,
                level,
                lse,
                cut,
                row_max,
                best_tile,
                edge_first,
                edge_last,
                GROUP_SIZE,
                TILE,
            )
            if tl.min(tl.where(is_head, most, 1.0), 0) < min_mass:
                first_level = level + 1
            if tl.min(tl.where(is_head, least, 1.0), 0) >= min_mass:
                last_level = level
            level += 1
    tl.store(levels_ptr + pair * 2, first_level)
    tl.store(levels_ptr + pair * 2 + 1, last_level)
    if first_level < last_level:
        column = tl.arange(0, LEVELS_PADDED)
        tl.store(
            mass_ptr + rows[:, None] * LEVELS_PADDED + column[None, :],
            tl.zeros([HEADS_PADDED, LEVELS_PADDED], tl.int32),
            mask=is_head[:, None],
        )
