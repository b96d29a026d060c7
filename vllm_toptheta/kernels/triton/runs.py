"""Runs of keys that may hold a kept one: how `scan` notes them, and how the steps after `select`
list those of a part of a row.

Few keys of a group are kept. Rows of K are 256 bytes or so each for itself, so that runs of few
keys are read as fast as whole tiles, and tiles for tl.dot are made of runs from anywhere.
"""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from vllm_toptheta.kernels.triton.rows import _load_state
from vllm_toptheta.kernels.triton.sketch import _sketched_scores
from vllm_toptheta.kernels.triton.tiles import _log2_scores

RUN = tl.constexpr(8)
"""Keys of a run, as many as an instruction of tensor cores has columns: the maximum over them needs
no other warp."""

CHUNK_KEYS = tl.constexpr(8192)
"""Keys whose runs are listed at a time, whole long groups: a list has room for all of their runs.
"""

CHUNK_RUNS = tl.constexpr(CHUNK_KEYS.value // RUN.value)

_STEPS = tl.constexpr(8)
"""Steps of an octave in which a run's greatest score lies below its group's."""

_RUNS_AT_ONCE = tl.constexpr(2048)
"""Of all heads: as many as are in flight without filling the registers."""


@triton.jit
def _count_steps(runs, top):
    """Steps from a group's greatest score down to a run's, rounded up, so that 0 are the same
    score; at most 255.

    Args:
        runs: greatest scores, -inf where nothing is visible.
        top: of their groups, finite.
    """
    # What subtracting rounds off must not make a run seem lower than it is.
    steps = (top - runs) * (_STEPS * (1 - 2.0**-20))
    return tl.ceil(tl.minimum(steps, 255.0)).to(tl.uint8)


@triton.jit
def _list_runs(
    group_max_ptr,
    run_steps_ptr,
    state_ptr,
    best_run_ptr,
    block_table_ptr,
    list_ptr,
    place_ptr,
    mass_ptr,
    pair,
    max_groups,
    first,
    last,
    begin,
    seq_len,
    level,
    HEADS: tl.constexpr,
    LIST_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """List the runs of the groups from `first` up to `last`, CHUNK_RUNS at most, that may hold a
    key kept at this level: those of groups that the row sees in part, those of the heads' best
    keys, and those whose greatest score may be great enough.

    Args:
        block_table_ptr: of the row.
        list_ptr: of this program, [CHUNK_RUNS], written: the runs.
        place_ptr: of this program, [CHUNK_RUNS], written: where in the cache they are, counted in
            runs.
        mass_ptr: of this program, [HEADS, CHUNK_RUNS], set to 0.
        LIST_PADDED: HEADS as a power of 2.

    Returns:
        How many there are.
    """
    RUNS: tl.constexpr = GROUP_SIZE // RUN
    AT_ONCE: tl.constexpr = min(_RUNS_AT_ONCE // LIST_PADDED, CHUNK_RUNS)
    GROUPS: tl.constexpr = AT_ONCE // RUNS
    head = tl.arange(0, LIST_PADDED)
    is_head = head < HEADS
    rows = pair * HEADS + head
    _, cut = _load_state(state_ptr, rows, is_head)
    best_group = tl.load(best_run_ptr + rows, mask=is_head, other=0) // RUNS
    of_run = tl.arange(0, RUNS)
    # Offsets of 32 bits from here on: their sums take half the instructions.
    group_max_ptr += pair * HEADS * max_groups
    run_steps_ptr += pair * HEADS * max_groups * RUNS
    listed = 0
    # Other threads may still be reading the last list.
    tl.debug_barrier()
    for at in tl.range(first, last, GROUPS, num_stages=1):
        group = at + tl.arange(0, GROUPS)
        start = group * GROUP_SIZE
        visible = (group < last) & (start + GROUP_SIZE > begin) & (start < seq_len)
        mask = is_head[:, None] & visible[None, :]
        place = (head * max_groups)[:, None] + group[None, :]
        top = tl.load(group_max_ptr + place, mask=mask, other=float("-inf"))
        steps = tl.load(
            run_steps_ptr + place[:, :, None] * RUNS + of_run[None, None, :],
            mask=mask[:, :, None],
            other=255,
        )
        # How many steps a listed run may have. Some more than there are is safe, for whatever
        # subtracting rounds off; a run's own were rounded up by less than one.
        room = tl.minimum((top - cut[:, None] + level) * _STEPS + 2.0**-4, 255.0)
        most = tl.where(room >= 0, tl.floor(room) + 1, -1.0).to(tl.int32)
        most = tl.where(best_group[:, None] == group[None, :], tl.maximum(most, 0), most)
        partial = (start < begin) | (start + GROUP_SIZE > seq_len)
        most = tl.where(mask, tl.where(partial[None, :], 255, most), -1)
        wanted = tl.max((steps.to(tl.int32) <= most[:, :, None]).to(tl.int32), 0)
        at_run = start[:, None] + of_run[None, :] * RUN
        wanted = tl.where((at_run + RUN > begin) & (at_run < seq_len), wanted, 0)
        wanted = tl.reshape(wanted, [AT_ONCE])
        entry = listed + tl.cumsum(wanted, 0) - 1
        block = tl.load(block_table_ptr + start // BLOCK_SIZE, mask=visible, other=0)
        first_run = block * (BLOCK_SIZE // RUN) + start % BLOCK_SIZE // RUN
        in_cache = first_run[:, None] + of_run[None, :]
        run = at * RUNS + tl.arange(0, AT_ONCE)
        tl.store(list_ptr + entry, run, mask=wanted > 0)
        tl.store(place_ptr + entry, tl.reshape(in_cache, [AT_ONCE]), mask=wanted > 0)
        mass = (head * CHUNK_RUNS)[:, None, None] + ((group - first) * RUNS)[None, :, None]
        tl.store(
            mass_ptr + mass + of_run[None, None, :],
            tl.zeros([LIST_PADDED, GROUPS, RUNS], tl.float32),
            mask=is_head[:, None, None] & (group < last)[None, :, None],
        )
        listed += tl.sum(wanted, 0)
    tl.debug_barrier()
    return listed


@triton.jit
def _score_runs(
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
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SKETCH: tl.constexpr,
):
    """Scores of a tile of listed runs, the same as `scan`'s.

    Args:
        centre_score_ptr: of the row and kv head, [HEADS, max_groups], from `_centres_kernel`.

    Returns:
        Scores [heads, TILE], -inf where hidden; and of each lane, [TILE]: its run or -2, its block
        and slot in the cache, its position, and whether the row sees it.
    """
    lane = tl.arange(0, TILE)
    entry = tile * (TILE // RUN) + lane // RUN
    is_listed = entry < listed
    run = tl.load(list_ptr + entry, mask=is_listed, other=-2)
    place = tl.load(place_ptr + entry, mask=is_listed, other=0)
    block = place // (BLOCK_SIZE // RUN)
    slot = place % (BLOCK_SIZE // RUN) * RUN + lane % RUN
    position = run * RUN + lane % RUN
    visible = (position >= begin) & (position < seq_len)
    if SKETCH:
        head = tl.arange(0, query.shape[0])
        group = run // (GROUP_SIZE // RUN)
        # Of a kv head's query heads all or none.
        first_centre = tl.load(centre_score_ptr + group, mask=is_listed, other=0.0)
        by_key = is_listed & (first_centre == float("inf"))
        by_sketch = is_listed & (first_centre < float("inf"))
        centre = tl.load(
            centre_score_ptr + (head * max_groups)[:, None] + group[None, :],
            mask=(head < HEADS)[:, None] & by_sketch[None, :],
            other=0.0,
        )
        of_group = block.to(tl.int64) * (sketch_block_stride // 4) + slot // GROUP_SIZE
        step = tl.load(scale_ptr + of_group, mask=by_sketch, other=0.0)
        scores = _sketched_scores(
            codes_of_query,
            factor[:, None] * step[None, :],
            centre,
            code_ptr,
            block,
            slot,
            by_sketch,
            soft_cap,
            sketch_block_stride,
            HEAD_DIM,
            DIM_PADDED,
            SOFT_CAP,
        )
        if tl.max(by_key.to(tl.int32), 0) > 0:
            exact = _log2_scores(
                query,
                key_ptr,
                block,
                slot,
                by_key,
                scale,
                soft_cap,
                key_block_stride,
                key_slot_stride,
                HEAD_DIM,
                DIM_PADDED,
                SOFT_CAP,
            )
            scores = tl.where(by_key[None, :], exact, scores)
    else:
        scores = _log2_scores(
            query,
            key_ptr,
            block,
            slot,
            is_listed,
            scale,
            soft_cap,
            key_block_stride,
            key_slot_stride,
            HEAD_DIM,
            DIM_PADDED,
            SOFT_CAP,
        )
    scores = tl.where(visible[None, :], scores, float("-inf"))
    return scores, run, block, slot, position, visible


@triton.jit
def _always_kept(scores, run, best_run, position, begin, seq_len, GROUP_SIZE: tl.constexpr):
    """Keys [TILE] that no threshold drops: those of groups that the row sees in part, whose mean is
    not stored, and each head's best key.

    Args:
        scores: [heads, TILE], -inf where hidden.
        run, position: [TILE], of the keys.
        best_run: [heads], where the head's best key is; -1 for heads of padding.
    """
    start = position // GROUP_SIZE * GROUP_SIZE
    kept = (start < begin) | (start + GROUP_SIZE > seq_len)
    is_here = best_run[:, None] == run[None, :]
    if tl.max(tl.max(is_here.to(tl.int32), 0), 0) > 0:
        best = tl.argmax(tl.where(is_here, scores, float("-inf")), 1)
        at_best = (tl.arange(0, scores.shape[1])[None, :] == best[:, None]) & is_here
        kept = kept | (tl.max(at_best.to(tl.int32), 0) > 0)
    return kept
