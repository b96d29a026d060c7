"""What a tile of prompt rows does with a tile of keys: K, V and means in, scores and sums out."""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from vllm_toptheta.kernels.triton_tiles import (
    GROUPS_PADDED,
    LOG2E,
    _add_group_means,
    _load_rows,
    _tile_scores,
)


@triton.jit
def _row_scores(
    query,
    key_ptr,
    block,
    position,
    in_cache,
    begin,
    end,
    scale,
    soft_cap,
    key_block_stride,
    key_slot_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Scores [rows, TILE] of keys at positions [TILE], -inf outside of the row's [begin, end)."""
    scores = _tile_scores(
        query,
        key_ptr,
        block,
        position % BLOCK_SIZE,
        in_cache,
        scale,
        soft_cap,
        key_block_stride,
        key_slot_stride,
        HEAD_DIM,
        DIM_PADDED,
        SOFT_CAP,
    )
    visible = position < end[:, None]
    if WINDOW:
        visible = visible & (position >= begin[:, None])
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def _add_scores(scores, old_max, new_max, sum_exp):
    """One step of the online softmax: the sum, the factor on what was summed before, and
    exponentials [rows, TILE].
    """
    # The first tiles of a window show nothing to the tile's last rows.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    alpha = tl.exp2((old_max - shift) * LOG2E)
    probs = tl.exp2((scores - shift[:, None]) * LOG2E)
    return sum_exp * alpha + tl.sum(probs, 1), alpha, probs


@triton.jit
def _spread_partial_groups(
    weights,
    lost_mass,
    tile_start,
    begin,
    end,
    TILE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """Move what rows lose in groups that they see in part to the weights of the visible keys.

    Their mean over the visible keys is not stored anywhere.

    Args:
        weights: [rows, TILE].
        lost_mass: [rows, GROUPS_PADDED].
        begin, end: [rows], the keys a row sees.

    Returns:
        The weights with the spread added; the lost mass of the other groups.
    """
    lane = tl.arange(0, TILE)
    column = tl.arange(0, GROUPS_PADDED)
    visible = (tile_start + lane >= begin[:, None]) & (tile_start + lane < end[:, None])
    for index in tl.static_range(TILE // GROUP_SIZE):
        first = tile_start + index * GROUP_SIZE
        size = tl.minimum(first + GROUP_SIZE, end) - tl.maximum(first, begin)
        is_group = (column == index)[None, :]
        mass = tl.sum(tl.where(is_group, lost_mass, 0.0), 1)
        share = tl.where(size < GROUP_SIZE, mass / tl.maximum(size, 1), 0.0)
        weights += tl.where(visible & (lane // GROUP_SIZE == index), share[:, None], 0.0)
        lost_mass = tl.where(is_group & (size < GROUP_SIZE)[:, None], 0.0, lost_mass)
    return weights, lost_mass


@triton.jit
def _add_weighted(
    acc,
    weights,
    lost_mass,
    query,
    tile_start,
    begin,
    end,
    first_begin,
    last_begin,
    first_end,
    last_end,
    value_ptr,
    means_ptr,
    block_table_ptr,
    value_block_stride,
    value_slot_stride,
    means_block_stride,
    means_group_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    COMPENSATION: tl.constexpr,
):
    """Add weighted V rows of a tile of keys, and lost mass times the mean V of its groups.

    Args:
        acc: [rows, DIM_PADDED].
        weights: [rows, TILE], zero where hidden.
        lost_mass: [rows, GROUPS_PADDED].
        begin, end: [rows], the keys a row sees; first_* and last_* are those of the first and of
            the last row.
    """
    position = tile_start + tl.arange(0, TILE)
    if COMPENSATION:
        if (tile_start < last_begin) | (tile_start + TILE > first_end):
            weights, lost_mass = _spread_partial_groups(
                weights, lost_mass, tile_start, begin, end, TILE, GROUP_SIZE
            )
        # Alone in its branch, the product gets the layout of that with V, and acc need not move.
        if tl.max((lost_mass != 0.0).to(tl.int32)) > 0:
            acc = _add_group_means(
                acc,
                lost_mass,
                query,
                means_ptr,
                block_table_ptr,
                tile_start,
                first_begin,
                last_end,
                means_block_stride,
                means_group_stride,
                HEAD_DIM,
                DIM_PADDED,
                BLOCK_SIZE,
                GROUP_SIZE,
                TILE,
            )
    needed = tl.max((weights != 0.0).to(tl.int32), 0)
    if tl.max(needed, 0) > 0:
        block = tl.load(block_table_ptr + position // BLOCK_SIZE, mask=needed > 0, other=0)
        value = _load_rows(
            value_ptr,
            block,
            position % BLOCK_SIZE,
            needed > 0,
            value_block_stride,
            value_slot_stride,
            HEAD_DIM,
            DIM_PADDED,
        )
        acc = tl.dot(weights.to(query.dtype), value.to(query.dtype), acc)
    return acc
