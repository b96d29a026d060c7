"""The GPU prefill kernel: queries, a paged KV cache and thresholds in, outputs and counts out.

Same semantics as the CPU kernel. One launch and one pass over K: theta is absolute, so a tile knows
at once what it keeps, and the denominator only rescales sums. What a pass learns too late is that
a row reached theta nowhere and keeps its best key: such rows take that key's V in place of what it
lost to its group's mean, at the end, once for all rows of a tile.
"""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_toptheta.kernels.cpu_prefill import V_TILE
from vllm_toptheta.kernels.triton_checks import (
    check_contiguous,
    check_scales,
    check_tensors,
    check_tile,
)
from vllm_toptheta.kernels.triton_config import PrefillConfig
from vllm_toptheta.kernels.triton_split import (
    GROUPS_PADDED,
    LOG2E,
    _add_group_means,
    _load_rows,
    _sum_groups,
    _tile_scores,
)

_V_TILE = tl.constexpr(V_TILE)
_KEEP_ALL = tl.constexpr(-3e38)  # above the -inf of hidden keys


@triton.jit
def _find_seq(query_start_loc_ptr, row_tile, num_seqs, TOKENS: tl.constexpr):
    """The sequence of a row tile, by bisection.

    Sequence s owns the row tiles from query_start_loc[s] // TOKENS + s on: always enough, and known
    without a look at other sequences.
    """
    low = row_tile * 0
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        is_later = tl.load(query_start_loc_ptr + middle) // TOKENS + middle > row_tile
        low = tl.where(is_later, low, middle)
        high = tl.where(is_later, middle, high)
    return low


@triton.jit
def _add_scores(scores, max_score, sum_exp):
    """One step of the online softmax: the maximum, the sum, the factor on what was summed before,
    and exponentials [rows, TILE].
    """
    new_max = tl.maximum(max_score, tl.max(scores, 1))
    # The first tiles of a window show nothing to the tile's last rows.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    alpha = tl.exp2((max_score - shift) * LOG2E)
    probs = tl.exp2((scores - shift[:, None]) * LOG2E)
    return new_max, sum_exp * alpha + tl.sum(probs, 1), alpha, probs


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


@triton.jit
def _extra_tiles(alone, position, TOKENS: tl.constexpr, HEADS_PADDED: tl.constexpr):
    """V tiles [TOKENS] that a token reads only for best keys of heads that reach theta nowhere.

    Args:
        alone: [rows] bool, heads whose best key lies in a V tile that no other head keeps a key in.
        position: [rows], of the best key.
    """
    v_tile = tl.reshape(position // _V_TILE, [TOKENS, HEADS_PADDED])
    alone = tl.reshape(alone.to(tl.int32), [TOKENS, HEADS_PADDED])
    head = tl.arange(0, HEADS_PADDED)
    same = (v_tile[:, :, None] == v_tile[:, None, :]) & (head[None, :] < head[:, None])[None]
    repeated = tl.max(tl.where(same, alone[:, None, :], 0), 2)
    return tl.sum(alone * (1 - repeated), 1)


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize=["window", "num_seqs", "block_table_stride", "theta_stride"],
    do_not_specialize_on_alignment=[
        "block_table_ptr",
        "query_start_loc_ptr",
        "seq_lens_ptr",
        "theta_ptr",
        "dense_ptr",
        "sinks_ptr",
        "k_scale_ptr",
        "v_scale_ptr",
        "num_kept_ptr",
        "v_tiles_read_ptr",
    ],
)
def _prefill_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    means_ptr,
    block_table_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    theta_ptr,
    dense_ptr,
    sinks_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    num_kept_ptr,
    v_tiles_read_ptr,
    sm_scale,
    soft_cap,
    window,
    num_seqs,
    query_stride,
    out_stride,
    block_table_stride,
    theta_stride,
    key_block_stride,
    key_head_stride,
    key_slot_stride,
    means_block_stride,
    means_head_stride,
    means_group_stride,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    COMPENSATION: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SINKS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """TOKENS query tokens of one sequence with all query heads of one kv head; row r is head
    r % HEADS_PADDED of token r // HEADS_PADDED.

    Value pointers share the key's strides: K and V are halves of the same rows.
    """
    # A prompt's last tiles see the most keys, so they start first.
    row_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = _find_seq(query_start_loc_ptr, row_tile, num_seqs, TOKENS)
    start = tl.load(query_start_loc_ptr + seq)
    num_tokens = tl.load(query_start_loc_ptr + seq + 1) - start
    first = (row_tile - start // TOKENS - seq) * TOKENS
    if first >= num_tokens:
        return

    ROWS: tl.constexpr = TOKENS * HEADS_PADDED
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM_PADDED)
    lane = tl.arange(0, TILE)
    head = row % HEADS_PADDED
    is_row = (head < HEADS) & (first + row // HEADS_PADDED < num_tokens)
    # Rows of padding see what the last token sees, so that no row is without keys.
    token = tl.minimum(first + row // HEADS_PADDED, num_tokens - 1)
    before = tl.load(seq_lens_ptr + seq) - num_tokens + 1
    end = before + token
    begin = tl.zeros([ROWS], tl.int32)
    first_end = before + first
    last_end = before + tl.minimum(first + TOKENS, num_tokens) - 1
    first_begin = 0
    last_begin = 0
    if WINDOW:
        begin = tl.maximum(end - window, 0)
        first_begin = tl.maximum(first_end - window, 0)
        last_begin = tl.maximum(last_end - window, 0)

    query_head = kv_head * HEADS + head
    token = (start + token).to(tl.int64)
    query = tl.load(
        query_ptr + (token * query_stride + query_head * HEAD_DIM)[:, None] + dim[None, :],
        mask=is_row[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    scale = sm_scale
    if SCALED:
        scale = sm_scale * tl.load(k_scale_ptr)
    key_ptr += kv_head.to(tl.int64) * key_head_stride
    value_ptr += kv_head.to(tl.int64) * key_head_stride
    means_ptr += kv_head.to(tl.int64) * means_head_stride
    block_table_ptr += seq.to(tl.int64) * block_table_stride

    max_score = tl.full([ROWS], float("-inf"), tl.float32)
    sum_exp = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    num_kept = end - begin
    v_tiles = tl.zeros([TOKENS], tl.int32)
    # Position of the best key; -1 less that where another head keeps a key in its V tile.
    best = begin

    dense = tl.load(dense_ptr + token, mask=is_row, other=1) != 0
    if tl.min(dense.to(tl.int32), 0) > 0:
        # V does not wait for the scores here, so that its loads are in flight together with K's.
        for index in range(first_begin // TILE, tl.cdiv(last_end, TILE)):
            position = index * TILE + lane
            in_cache = (position >= first_begin) & (position < last_end)
            block = tl.load(block_table_ptr + position // BLOCK_SIZE, mask=in_cache, other=0)
            offset = position % BLOCK_SIZE
            scores = _tile_scores(
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
            visible = (position >= begin[:, None]) & (position < end[:, None])
            scores = tl.where(visible, scores, float("-inf"))
            value = _load_rows(
                value_ptr,
                block,
                offset,
                in_cache,
                key_block_stride,
                key_slot_stride,
                HEAD_DIM,
                DIM_PADDED,
            )
            max_score, sum_exp, alpha, probs = _add_scores(scores, max_score, sum_exp)
            acc = tl.dot(probs.to(query.dtype), value.to(query.dtype), acc * alpha[:, None])
        tiles = tl.cdiv(end, _V_TILE) - begin // _V_TILE
        v_tiles = tl.max(tl.reshape(tiles, [TOKENS, HEADS_PADDED]), 1)
    else:
        theta = tl.load(
            theta_ptr + token * theta_stride + query_head, mask=is_row, other=float("inf")
        )
        theta = tl.where(dense & is_row, _KEEP_ALL, tl.maximum(theta, _KEEP_ALL))
        num_kept = tl.zeros([ROWS], tl.int32)
        for index in range(first_begin // TILE, tl.cdiv(last_end, TILE)):
            tile_start = index * TILE
            position = tile_start + lane
            in_cache = (position >= first_begin) & (position < last_end)
            block = tl.load(block_table_ptr + position // BLOCK_SIZE, mask=in_cache, other=0)
            offset = position % BLOCK_SIZE
            scores = _tile_scores(
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
            visible = (position >= begin[:, None]) & (position < end[:, None])
            scores = tl.where(visible, scores, float("-inf"))
            kept = scores >= theta[:, None]
            old_max = max_score
            max_score, sum_exp, alpha, probs = _add_scores(scores, max_score, sum_exp)
            is_best = is_row & (max_score > old_max) & (max_score < theta) & (num_kept == 0)
            has_new = tl.max(is_best.to(tl.int32), 0) > 0
            if has_new:
                slot = tl.argmax(scores, 1)
                best = tl.where(is_best, tile_start + slot, best)
            for run in tl.static_range(TILE // _V_TILE):
                in_run = tl.where((lane // _V_TILE == run)[None, :], kept, False)
                in_run = tl.sum(in_run.to(tl.int32), 1)
                num_kept += in_run
                read = tl.max(tl.reshape(in_run, [TOKENS, HEADS_PADDED]), 1) > 0
                v_tiles += read.to(tl.int32)
                if has_new:
                    shared = tl.broadcast_to(read.to(tl.int32)[:, None], [TOKENS, HEADS_PADDED])
                    shared = tl.reshape(shared, [ROWS])
                    is_here = is_best & (best // _V_TILE == tile_start // _V_TILE + run)
                    best = tl.where(is_here & (shared > 0), -1 - best, best)
            acc = _add_weighted(
                acc * alpha[:, None],
                tl.where(kept, probs, 0.0),
                _sum_groups(tl.where(kept, 0.0, probs), ROWS, GROUP_SIZE, TILE),
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
                key_block_stride,
                key_slot_stride,
                means_block_stride,
                means_group_stride,
                HEAD_DIM,
                DIM_PADDED,
                BLOCK_SIZE,
                GROUP_SIZE,
                TILE,
                COMPENSATION,
            )
        lacking = is_row & (num_kept == 0)
        if tl.max(lacking.to(tl.int32), 0) > 0:
            # The best key's exponential is 1; what it lost to its group is taken back.
            alone = lacking & (best >= 0)
            best = tl.where(best < 0, -1 - best, best)
            best_tile = tl.where(lacking, best // TILE, last_end)
            index = tl.min(best_tile, 0)
            while index < last_end:
                tile_start = index * TILE
                is_best = lacking[:, None] & (best[:, None] == (tile_start + lane)[None, :])
                weights = tl.where(is_best, 1.0, 0.0)
                acc = _add_weighted(
                    acc,
                    weights,
                    -_sum_groups(weights, ROWS, GROUP_SIZE, TILE),
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
                    key_block_stride,
                    key_slot_stride,
                    means_block_stride,
                    means_group_stride,
                    HEAD_DIM,
                    DIM_PADDED,
                    BLOCK_SIZE,
                    GROUP_SIZE,
                    TILE,
                    COMPENSATION,
                )
                index = tl.min(tl.where(best_tile > index, best_tile, last_end), 0)
            num_kept += lacking.to(tl.int32)
            v_tiles += _extra_tiles(alone, best, TOKENS, HEADS_PADDED)

    top = max_score
    if SINKS:
        sink = tl.load(sinks_ptr + query_head, mask=is_row, other=float("-inf"))
        top = tl.maximum(max_score, sink)
    factor = tl.exp2((max_score - top) * LOG2E)
    denominator = sum_exp * factor
    if SINKS:
        denominator += tl.exp2((sink - top) * LOG2E)
    factor = factor / denominator
    if SCALED:
        factor = factor * tl.load(v_scale_ptr)
    tl.store(
        out_ptr + (token * out_stride + query_head * HEAD_DIM)[:, None] + dim[None, :],
        (acc * factor[:, None]).to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & (dim < HEAD_DIM)[None, :],
    )
    num_kv_heads = tl.num_programs(1)
    tl.store(num_kept_ptr + token * (num_kv_heads * HEADS) + query_head, num_kept, mask=is_row)
    own = first + tl.arange(0, TOKENS)
    tl.store(
        v_tiles_read_ptr + (start + own).to(tl.int64) * num_kv_heads + kv_head,
        v_tiles,
        mask=own < num_tokens,
    )


def prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    v_means: Tensor | None,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    theta: Tensor,
    *,
    sm_scale: float,
    dense: Tensor,
    out: Tensor,
    num_kept: Tensor,
    v_tiles_read: Tensor,
    config: PrefillConfig,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Attend query tokens of several sequences, causally, to the cached keys that reach theta.

    Row i of a sequence with q query tokens and n cached keys sees the first n - q + i + 1 keys.
    Each row means what it means to the decode kernel; the kept set depends neither on the batch nor
    on how a prompt was cut into chunks. K is read once by every tile of rows. Of V, rows that no
    row of the tile keeps are not read, except in groups that a row of it sees in part; where a tile
    of keys has none the product with V is left out.

    Args:
        query: [num_tokens, num_heads, head_dim] bfloat16 or float16, sequence after sequence; the
            first stride is free.
        key_cache: [num_blocks, num_kv_heads, block_size, head_dim], the query's dtype or a float8;
            strides are free but the last, which is 1. It holds the keys of the query tokens.
        value_cache: as key_cache, with the same strides.
        v_means: [num_blocks, num_kv_heads, block_size // group_size, head_dim] in the query's
            dtype, valid for complete groups; None drops the lost mass.
        block_table: [num_seqs, max_blocks] int32, the first stride is free; only entries of visible
            keys are read.
        query_start_loc: [num_seqs + 1] int32, first query token of each sequence; from 0 to
            num_tokens.
        seq_lens: [num_seqs] int32, cached keys of the sequence, those of its queries included.
        theta: [num_tokens, num_heads] float32, units of q.k * sm_scale (after soft cap); -inf keeps
            all keys. The first stride is free.
        sm_scale: factor on q.k.
        dense: [num_tokens] int8, rows that ignore theta and keep every key where not 0.
        out: [num_tokens, num_heads, head_dim], written; the first stride is free.
        num_kept: [num_tokens, num_heads] int32, written: keys kept, all visible ones on dense rows.
        v_tiles_read: [num_tokens, num_kv_heads] int32, written: runs of V_TILE keys, aligned to
            position 0, in which any head of the group keeps a key.
        config: launch parameters.
        window: a row sees its last `window` keys; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for none.
        sinks: [num_heads] float32, an extra logit in the denominator; None for none.
        k_scale: [1] float32, factor on stored K; None for 1.
        v_scale: [1] float32, factor on stored V and means; both scales or neither are given.

    Raises:
        ValueError: an argument has another shape, dtype or layout, or a size is not supported.
            The contents of query_start_loc and seq_lens are on the device and not looked at.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    num_seqs, heads = seq_lens.shape[0], num_heads // num_kv_heads
    group_size = config.tile if v_means is None else block_size // max(v_means.shape[2], 1)
    check_tensors(query, key_cache, value_cache, v_means, block_table, num_seqs, out)
    check_tile(config.tile, group_size)
    heads_padded = triton.next_power_of_2(heads)
    if config.tile % V_TILE or config.rows % heads_padded:
        raise ValueError(
            f"config needs a tile that is a multiple of {V_TILE} and rows that are a multiple of "
            f"{heads_padded}, got {config}"
        )
    if (
        theta.shape != (num_tokens, num_heads)
        or theta.dtype != torch.float32
        or theta.stride(1) != 1
    ):
        raise ValueError(
            f"theta must be {[num_tokens, num_heads]} torch.float32, contiguous but for the first "
            f"stride, got {list(theta.shape)} {theta.dtype} with strides {theta.stride()}"
        )
    check_contiguous(
        (
            ("query_start_loc", query_start_loc, (num_seqs + 1,), torch.int32),
            ("seq_lens", seq_lens, (num_seqs,), torch.int32),
            ("dense", dense, (num_tokens,), torch.int8),
            ("num_kept", num_kept, (num_tokens, num_heads), torch.int32),
            ("v_tiles_read", v_tiles_read, (num_tokens, num_kv_heads), torch.int32),
            ("sinks", sinks, (num_heads,), torch.float32),
        )
    )
    check_scales(k_scale, v_scale)
    if num_tokens == 0:
        return

    tokens = config.rows // heads_padded
    mean_strides = (0, 0, 0) if v_means is None else v_means.stride()[:3]
    _prefill_kernel[(num_tokens // tokens + num_seqs, num_kv_heads)](
        query,
        key_cache,
        value_cache,
        value_cache if v_means is None else v_means,
        block_table,
        query_start_loc,
        seq_lens,
        theta,
        dense,
        sinks,
        k_scale,
        v_scale,
        out,
        num_kept,
        v_tiles_read,
        sm_scale,
        soft_cap or 0.0,
        window or 0,
        num_seqs,
        query.stride(0),
        out.stride(0),
        block_table.stride(0),
        theta.stride(0),
        *key_cache.stride()[:3],
        *mean_strides,
        HEADS=heads,
        HEADS_PADDED=heads_padded,
        TOKENS=tokens,
        HEAD_DIM=head_dim,
        DIM_PADDED=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        GROUP_SIZE=group_size,
        TILE=config.tile,
        COMPENSATION=v_means is not None,
        WINDOW=window is not None,
        SOFT_CAP=bool(soft_cap),
        SINKS=sinks is not None,
        SCALED=k_scale is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
