"""What a tile of prompt rows does with a tile of keys."""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from vllm_toptheta.kernels.triton.tiles import GROUPS_PADDED, _dot_means, _load_rows, _log2_scores

_NOTHING = tl.constexpr(-3e38)  # above the -inf of hidden keys


@triton.jit
def _find_seq(query_start_loc_ptr, row_tile, num_seqs, TOKENS: tl.constexpr):
    """The sequence of a row tile, by bisection.

    Sequence s owns the row tiles from query_start_loc[s] // TOKENS + 2s on: always enough, wherever
    its first query token lies, and known without a look at other sequences.
    """
    low = row_tile * 0
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        is_later = tl.load(query_start_loc_ptr + middle) // TOKENS + 2 * middle > row_tile
        low = tl.where(is_later, low, middle)
        high = tl.where(is_later, middle, high)
    return low


@triton.jit
def _visible_scores(
    query,
    key_ptr,
    block,
    offset,
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
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Scores [rows, TILE] of keys at positions [TILE] as exponents of 2, -inf outside of the rows'
    [begin, end)."""
    scores = _log2_scores(
        query,
        key_ptr,
        block,
        offset,
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
def _add_scores(scores, max_score, sum_exp):
    """One step of the online softmax.

    Returns:
        The new maximum and sum, the factor on what was summed before, and exponentials.
    """
    new_max = tl.maximum(max_score, tl.max(scores, 1))
    # The first tiles of a window show nothing to the tile's last rows.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    alpha = tl.exp2(max_score - shift)
    probs = tl.exp2(scores - shift[:, None])
    return new_max, sum_exp * alpha + tl.sum(probs, 1), alpha, probs


@triton.jit
def _kept_keys(scores, limit, TOKENS: tl.constexpr, HEADS_PADDED: tl.constexpr, TILE: tl.constexpr):
    """Keys [TOKENS, TILE] that a token keeps: those whose score reaches the limit [rows] of any of
    its heads."""
    margin = scores - tl.maximum(limit, _NOTHING)[:, None]
    return tl.max(tl.reshape(margin, [TOKENS, HEADS_PADDED, TILE]), 1) >= 0.0


@triton.jit
def _by_head(kept, TOKENS: tl.constexpr, HEADS_PADDED: tl.constexpr, TILE: tl.constexpr):
    """[TOKENS, TILE] as [rows, TILE]."""
    wide = tl.broadcast_to(kept[:, None, :], [TOKENS, HEADS_PADDED, TILE])
    return tl.reshape(wide, [TOKENS * HEADS_PADDED, TILE])


@triton.jit
def _add_means(
    acc,
    lost_mass,
    means_ptr,
    block_table_ptr,
    tile,
    first_begin,
    last_end,
    means_block_stride,
    means_group_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add the lost mass [rows, GROUPS_PADDED] of a tile's groups times their stored mean V.

    Groups outside of [first_begin, last_end), which no row sees completely, lose nothing.
    """
    group = tl.arange(0, GROUPS_PADDED)
    start = tile * TILE + group * GROUP_SIZE
    whole = (group * GROUP_SIZE < TILE) & (start >= first_begin) & (start + GROUP_SIZE <= last_end)
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
    return _dot_means(lost_mass, means, acc)
