"""How the decode kernels cut rows into tiles and splits, and what they pass to each other about a
row.

A row's visible keys are [begin, seq_len). Tiles, compensation groups and long groups start at
absolute multiples of their sizes, so that a score is computed the same way however rows are cut.
"""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from vllm_toptheta.kernels.layout import LONG_GROUP as _LONG_GROUP
from vllm_toptheta.kernels.layout import MAX_LIFTS as _MAX_LIFTS

LONG_GROUP = tl.constexpr(_LONG_GROUP)
MAX_LIFTS = tl.constexpr(_MAX_LIFTS)
LEVELS_PADDED = tl.constexpr(16)
"""Columns of the masses by level, of which MAX_LIFTS are in use."""

MASS_UNIT = tl.constexpr(1 << 30)
"""Masses that decide about lifts are summed as integers of this unit: whatever the order, the sum
is the same."""

STATE = tl.constexpr(3)
"""Of a query head: log2 of the sum over its keys, the score from which keys are kept before lifts,
and the keys' share of the denominator, which is 1 without a sink."""


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
def _long_range(seq_len, window, split, num_splits):
    """The first visible key, and the long groups of one split."""
    return _tile_range(seq_len, window, split, num_splits, LONG_GROUP, 1)


@triton.jit
def _num_active(seq_len, window, num_splits, TILE: tl.constexpr, MIN_TILES: tl.constexpr):
    """Splits that have keys."""
    num_tiles = tl.cdiv(seq_len, TILE) - tl.maximum(seq_len - window, 0) // TILE
    return tl.cdiv(num_tiles, tl.maximum(tl.cdiv(num_tiles, num_splits), MIN_TILES))


@triton.jit
def _find_tile(block_table_ptr, tile, rows, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Blocks, one or [TILE], and offsets [TILE] in them of a tile's keys.

    Args:
        block_table_ptr: of the row.
        rows: [TILE] bool, keys whose blocks are looked up; not empty.
    """
    lane = tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(block_table_ptr + tile // (BLOCK_SIZE // TILE))
        offset = tile % (BLOCK_SIZE // TILE) * TILE + lane
    elif TILE % BLOCK_SIZE == 0:
        index = tile * (TILE // BLOCK_SIZE) + lane // BLOCK_SIZE
        block = tl.load(block_table_ptr + index, mask=rows, other=0)
        offset = lane % BLOCK_SIZE
    else:
        position = tile * TILE + lane
        block = tl.load(block_table_ptr + position // BLOCK_SIZE, mask=rows, other=0)
        offset = position % BLOCK_SIZE
    return block, offset


@triton.jit
def _load_query(
    query_ptr,
    kv_head,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """[HEADS_PADDED, DIM_PADDED] of a row's query heads of one kv head."""
    head = tl.arange(0, HEADS_PADDED)
    dim = tl.arange(0, DIM_PADDED)
    return tl.load(
        query_ptr + ((kv_head * HEADS + head) * HEAD_DIM)[:, None] + dim[None, :],
        mask=(head < HEADS)[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _load_state(state_ptr, row, is_head):
    """log2 of the sum over keys and the kept scores' lower end, [heads]; heads of padding have no
    mass and keep nothing."""
    lse = tl.load(state_ptr + row * STATE, mask=is_head, other=float("inf"))
    cut = tl.load(state_ptr + row * STATE + 1, mask=is_head, other=float("inf"))
    return lse, cut


@triton.jit
def _chosen_level(levels_ptr, mass_ptr, min_mass, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr):
    """How often the threshold of a row and kv head halves.

    Args:
        levels_ptr: of the row and kv head: the first and the last level that it may be.
        mass_ptr: of its first query head: what is kept at each level.
    """
    first = tl.load(levels_ptr)
    last = tl.load(levels_ptr + 1)
    chosen = last
    if first < last:
        head = tl.arange(0, HEADS_PADDED)
        level = tl.arange(0, LEVELS_PADDED)
        mass = tl.load(
            mass_ptr + head[:, None] * LEVELS_PADDED + level[None, :],
            mask=(head < HEADS)[:, None],
            other=MASS_UNIT,
        )
        enough = tl.min(mass, 0).to(tl.float32) / MASS_UNIT >= min_mass
        enough = enough & (level >= first) & (level < last)
        chosen = tl.min(tl.where(enough, level, last), 0)
    return chosen
