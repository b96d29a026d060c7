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

RUN = tl.constexpr(8)
"""Keys of a run, as many as an instruction of tensor cores has columns: the maximum over them needs
no other warp."""

CHUNK_KEYS = tl.constexpr(4096)
"""Keys whose runs are listed at a time, whole long groups: a list has room for all of their runs.
"""

CHUNK_RUNS = tl.constexpr(CHUNK_KEYS.value // RUN.value)

PLACE = tl.constexpr(16)
"""Elements that places of rows in the cache are counted in: 32 bits are enough, and the compiler
sees that loads may be wide."""

_STEPS = tl.constexpr(8)
"""Steps of an octave in which a run's greatest score lies below its group's."""

_SCORES_AT_ONCE = tl.constexpr(1024)
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
    key_block_stride,
    key_slot_stride,
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
    """List the runs from `first` up to `last`, at most CHUNK_RUNS, that may hold a key kept at this
    level: those of groups that the row sees in part, those of the heads' best keys, and those whose
    greatest score may be great enough.

    Args:
        block_table_ptr: of the row.
        list_ptr: of this program, [CHUNK_RUNS], written: the runs.
        place_ptr: of this program, [CHUNK_RUNS], written: where their first keys are, in PLACE
            elements.
        mass_ptr: of this program, [HEADS, CHUNK_RUNS], set to 0.
        LIST_PADDED: HEADS as a power of 2.

    Returns:
        How many there are.
    """
    RUNS: tl.constexpr = GROUP_SIZE // RUN
    head = tl.arange(0, LIST_PADDED)
    is_head = head < HEADS
    rows = pair * HEADS + head
    _, cut = _load_state(state_ptr, rows, is_head)
    best_run = tl.load(best_run_ptr + rows, mask=is_head, other=-1)
    AT_ONCE: tl.constexpr = min(_SCORES_AT_ONCE // LIST_PADDED, CHUNK_RUNS)
    listed = 0
    # Other threads may still be reading the last list.
    tl.debug_barrier()
    for at in tl.range(first, last, AT_ONCE, num_stages=1):
        run = at + tl.arange(0, AT_ONCE)
        start = run * RUN
        visible = (run < last) & (start + RUN > begin) & (start < seq_len)
        block = tl.load(block_table_ptr + start // BLOCK_SIZE, mask=visible, other=0)
        mask = is_head[:, None] & visible[None, :]
        group = (rows * max_groups)[:, None] + (run // RUNS)[None, :]
        top = tl.load(group_max_ptr + group, mask=mask, other=float("-inf"))
        at_run = (rows * max_groups * RUNS)[:, None] + run[None, :]
        steps = tl.load(run_steps_ptr + at_run, mask=mask, other=0).to(tl.float32)
        most = top - tl.maximum(steps - 1, 0.0) / _STEPS
        wanted = (most - cut[:, None] >= -level) | (best_run[:, None] == run[None, :])
        group_start = start // GROUP_SIZE * GROUP_SIZE
        partial = (group_start < begin) | (group_start + GROUP_SIZE > seq_len)
        is_listed = ((tl.max(wanted.to(tl.int32), 0) > 0) | partial) & visible
        entry = listed + tl.cumsum(is_listed.to(tl.int32), 0) - 1
        place = block.to(tl.int64) * key_block_stride + start % BLOCK_SIZE * key_slot_stride
        tl.store(list_ptr + entry, run, mask=is_listed)
        tl.store(place_ptr + entry, (place // PLACE).to(tl.int32), mask=is_listed)
        tl.store(
            mass_ptr + head[:, None] * CHUNK_RUNS + (run - first)[None, :],
            tl.zeros([LIST_PADDED, AT_ONCE], tl.float32),
            mask=is_head[:, None] & (run < last)[None, :],
        )
        listed += tl.sum(is_listed.to(tl.int32), 0)
    tl.debug_barrier()
    return listed


@triton.jit
def _load_runs(list_ptr, place_ptr, tile, listed, TILE: tl.constexpr):
    """A tile of listed runs.

    Returns:
        Of each lane, [TILE]: whether it has a run, its run or -2, where in the cache that starts,
        and its key in it.
    """
    lane = tl.arange(0, TILE)
    entry = tile * (TILE // RUN) + lane // RUN
    is_listed = entry < listed
    run = tl.load(list_ptr + entry, mask=is_listed, other=-2)
    place = tl.load(place_ptr + entry, mask=is_listed, other=0)
    return is_listed, run, place.to(tl.int64) * PLACE, lane % RUN


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
