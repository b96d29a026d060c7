"""The jit function of the prefill kernel.

One pass over K: theta is absolute, so a tile knows at once what it keeps, and the denominator only
rescales sums. What a pass learns too late is that a row reached theta nowhere and keeps its best
key: such rows take that key's V in place of what it lost to its group's mean, at the end, once for
all rows of a tile.
"""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from vllm_toptheta.kernels.cpu_prefill import V_TILE
from vllm_toptheta.kernels.triton_prefill_tile import _add_scores, _add_weighted, _row_scores
from vllm_toptheta.kernels.triton_tiles import LOG2E, _load_rows, _sum_groups

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

    last = tl.cdiv(last_end, TILE)

    query_head = kv_head * HEADS + head
    token += start
    query = tl.load(
        query_ptr
        + (token.to(tl.int64) * query_stride + query_head * HEAD_DIM)[:, None]
        + dim[None, :],
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
        for index in range(first_begin // TILE, last):
            position = index * TILE + lane
            in_cache = (position >= first_begin) & (position < last_end)
            block = tl.load(block_table_ptr + position // BLOCK_SIZE, mask=in_cache, other=0)
            scores = _row_scores(
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
                HEAD_DIM,
                DIM_PADDED,
                BLOCK_SIZE,
                WINDOW,
                SOFT_CAP,
            )
            value = _load_rows(
                value_ptr,
                block,
                position % BLOCK_SIZE,
                in_cache,
                key_block_stride,
                key_slot_stride,
                HEAD_DIM,
                DIM_PADDED,
            )
            new_max = tl.maximum(max_score, tl.max(scores, 1))
            sum_exp, alpha, probs = _add_scores(scores, max_score, new_max, sum_exp)
            max_score = new_max
            acc = tl.dot(probs.to(query.dtype), value.to(query.dtype), acc * alpha[:, None])
        tiles = tl.cdiv(end, _V_TILE) - begin // _V_TILE
        v_tiles = tl.max(tl.reshape(tiles, [TOKENS, HEADS_PADDED]), 1)
    else:
        theta = tl.load(
            theta_ptr + token.to(tl.int64) * theta_stride + query_head,
            mask=is_row,
            other=float("inf"),
        )
        theta = tl.where(dense & is_row, _KEEP_ALL, tl.maximum(theta, _KEEP_ALL))
        num_kept = tl.zeros([ROWS], tl.int32)
        for index in range(first_begin // TILE, last):
            tile_start = index * TILE
            position = tile_start + lane
            in_cache = (position >= first_begin) & (position < last_end)
            block = tl.load(block_table_ptr + position // BLOCK_SIZE, mask=in_cache, other=0)
            scores = _row_scores(
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
                HEAD_DIM,
                DIM_PADDED,
                BLOCK_SIZE,
                WINDOW,
                SOFT_CAP,
            )
            kept = scores >= theta[:, None]
            new_max = tl.maximum(max_score, tl.max(scores, 1))
            is_best = is_row & (new_max > max_score) & (new_max < theta)
            has_new = tl.max(is_best.to(tl.int32), 0) > 0
            if has_new:
                slot = tl.argmax(scores, 1)
                best = tl.where(is_best, tile_start + slot, best)
            for run in tl.static_range(TILE // _V_TILE):
                in_run = kept
                if TILE > _V_TILE:
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
            # Only now, when the scores are not needed any more: registers are scarce.
            sum_exp, alpha, probs = _add_scores(scores, max_score, new_max, sum_exp)
            max_score = new_max
            weights = tl.where(kept, probs, 0.0)
            acc = _add_weighted(
                acc * alpha[:, None],
                weights,
                _sum_groups(probs - weights, ROWS, GROUP_SIZE, TILE),
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
            best_tile = tl.where(lacking, best // TILE, last)
            index = tl.min(best_tile, 0)
            while index < last:
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
                index = tl.min(tl.where(best_tile > index, best_tile, last), 0)
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
        out_ptr + (token.to(tl.int64) * out_stride + query_head * HEAD_DIM)[:, None] + dim[None, :],
        (acc * factor[:, None]).to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & (dim < HEAD_DIM)[None, :],
    )
    num_kv_heads = tl.num_programs(1)
    tl.store(
        num_kept_ptr + token.to(tl.int64) * (num_kv_heads * HEADS) + query_head,
        num_kept,
        mask=is_row,
    )
    own = first + tl.arange(0, TOKENS)
    tl.store(
        v_tiles_read_ptr + (start + own).to(tl.int64) * num_kv_heads + kv_head,
        v_tiles,
        mask=own < num_tokens,
    )
