"""The jit function of the prefill kernel: one pass over K, in which a row tests each key against
the softmax denominator of what it has seen so far.
"""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from vllm_toptheta.kernels.triton.prefill_tile import (
    _add_means,
    _add_scores,
    _by_head,
    _find_seq,
    _kept_keys,
    _visible_scores,
)
from vllm_toptheta.kernels.triton.rows import _find_tile
from vllm_toptheta.kernels.triton.tiles import LOG2E, _fit_query, _load_rows, _sum_groups


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize=["window", "num_seqs", "block_table_stride", "log_min_prob_stride"],
    do_not_specialize_on_alignment=[
        "block_table_ptr",
        "query_start_loc_ptr",
        "seq_lens_ptr",
        "log_min_prob_ptr",
        "dense_ptr",
        "sinks_ptr",
        "k_scale_ptr",
        "v_scale_ptr",
        "num_kept_ptr",
        "v_tiles_read_ptr",
        "kept_mass_ptr",
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
    log_min_prob_ptr,
    dense_ptr,
    sinks_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    num_kept_ptr,
    v_tiles_read_ptr,
    kept_mass_ptr,
    sm_scale,
    soft_cap,
    window,
    num_seqs,
    query_stride,
    out_stride,
    block_table_stride,
    log_min_prob_stride,
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
    num_kv_heads = tl.num_programs(1)
    seq = _find_seq(query_start_loc_ptr, row_tile, num_seqs, TOKENS)
    start = tl.load(query_start_loc_ptr + seq)
    num_tokens = tl.load(query_start_loc_ptr + seq + 1) - start
    seq_len = tl.load(seq_lens_ptr + seq)
    before = seq_len - num_tokens
    # Cut at multiples of TOKENS, so that all rows have one own tile, and the same in every chunk.
    first = (before // TOKENS + row_tile - start // TOKENS - 2 * seq) * TOKENS
    if (first >= seq_len) | (num_tokens == 0):
        return

    ROWS: tl.constexpr = TOKENS * HEADS_PADDED
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM_PADDED)
    lane = tl.arange(0, TILE)
    head = row % HEADS_PADDED
    position = first + row // HEADS_PADDED
    is_row = (head < HEADS) & (position >= before) & (position < seq_len)
    # Rows of padding see what a row beside them sees, so that no row is without keys.
    position = tl.minimum(tl.maximum(position, before), seq_len - 1)
    first_end = tl.maximum(first, before) + 1
    last_end = tl.minimum(first + TOKENS, seq_len)
    end = position + 1
    begin = tl.zeros([ROWS], tl.int32)
    first_begin = 0
    if WINDOW:
        begin = tl.maximum(end - window, 0)
        first_begin = tl.maximum(first_end - window, 0)
    own_token = first + tl.arange(0, TOKENS)
    is_token = (own_token >= before) & (own_token < seq_len)
    token_end = tl.minimum(tl.maximum(own_token, before), seq_len - 1) + 1
    token_begin = tl.zeros([TOKENS], tl.int32)
    if WINDOW:
        token_begin = tl.maximum(token_end - window, 0)
    own_token += start - before

    query_head = kv_head * HEADS + head
    token = start + position - before
    query = tl.load(
        query_ptr
        + (token.to(tl.int64) * query_stride + query_head * HEAD_DIM)[:, None]
        + dim[None, :],
        mask=is_row[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    scale = sm_scale * LOG2E
    if SCALED:
        scale *= tl.load(k_scale_ptr)
    query, scale = _fit_query(query, scale, key_ptr)
    key_ptr += kv_head.to(tl.int64) * key_head_stride
    value_ptr += kv_head.to(tl.int64) * key_head_stride
    means_ptr += kv_head.to(tl.int64) * means_head_stride
    block_table_ptr += seq.to(tl.int64) * block_table_stride

    max_score = tl.full([ROWS], float("-inf"), tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + query_head, mask=is_row, other=0.0) * LOG2E
        max_score = sink
    sum_exp = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    num_kept = token_end - token_begin
    v_tiles = tl.cdiv(token_end, TILE) - token_begin // TILE
    kept_mass = tl.full([ROWS], 1.0, tl.float32)

    own = (last_end - 1) // TILE
    first_tile = first_begin // TILE
    dense = tl.load(dense_ptr + token, mask=is_row, other=1) != 0
    if tl.min(dense.to(tl.int32), 0) > 0:
        # V does not wait for the scores here, so that its loads are in flight together with K's.
        for index in range(first_tile, own + 1):
            at = index * TILE + lane
            in_cache = (at >= first_begin) & (at < last_end)
            block, offset = _find_tile(block_table_ptr, index, in_cache, BLOCK_SIZE, TILE)
            scores = _visible_scores(
                query,
                key_ptr,
                block,
                offset,
                at,
                in_cache,
                begin,
                end,
                scale,
                soft_cap,
                key_block_stride,
                key_slot_stride,
                HEAD_DIM,
                DIM_PADDED,
                WINDOW,
                SOFT_CAP,
            )
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
    else:
        threshold = tl.load(
            log_min_prob_ptr + token.to(tl.int64) * log_min_prob_stride + kv_head,
            mask=is_row,
            other=1e38,
        )
        threshold = tl.where(dense & is_row, float("-inf"), threshold * LOG2E)
        num_kept = tl.zeros([TOKENS], tl.int32)
        v_tiles = tl.zeros([TOKENS], tl.int32)
        kept_mass = tl.zeros([ROWS], tl.float32)
        # Groups before this and behind that are seen in part, and kept whole.
        whole_begin = tl.cdiv(token_begin, GROUP_SIZE) * GROUP_SIZE
        whole_end = token_end // GROUP_SIZE * GROUP_SIZE
        # The first tile of the sequence, the rows' own, then the others from the front.
        lead = (first_tile == 0).to(tl.int32)
        for step in range(own - first_tile + 1):
            index = tl.where(step == lead, own, tl.maximum(first_tile + step - 1, 0))
            at = index * TILE + lane
            in_cache = (at >= first_begin) & (at < last_end)
            block, offset = _find_tile(block_table_ptr, index, in_cache, BLOCK_SIZE, TILE)
            scores = _visible_scores(
                query,
                key_ptr,
                block,
                offset,
                at,
                in_cache,
                begin,
                end,
                scale,
                soft_cap,
                key_block_stride,
                key_slot_stride,
                HEAD_DIM,
                DIM_PADDED,
                WINDOW,
                SOFT_CAP,
            )
            max_score, sum_exp, alpha, probs = _add_scores(scores, max_score, sum_exp)
            seen = sum_exp
            if SINKS:
                seen += tl.exp2(sink - max_score)
            limit = max_score + tl.log2(seen) + threshold
            kept = _kept_keys(scores, limit, TOKENS, HEADS_PADDED, TILE)
            partial = at >= whole_end[:, None]
            if WINDOW:
                partial = (partial | (at < whole_begin[:, None])) & (at >= token_begin[:, None])
            kept = kept | partial & (at < token_end[:, None])
            in_tile = tl.sum(kept.to(tl.int32), 1)
            num_kept += in_tile
            v_tiles += (in_tile > 0).to(tl.int32)
            by_head = _by_head(kept, TOKENS, HEADS_PADDED, TILE)
            weights = tl.where(by_head, probs, 0.0)
            kept_mass = kept_mass * alpha + tl.sum(weights, 1)
            lost_mass = _sum_groups(tl.where(by_head, 0.0, probs), ROWS, GROUP_SIZE, TILE)
            acc = acc * alpha[:, None]
            if tl.max(lost_mass) > 0.0:
                acc = _add_means(
                    acc,
                    lost_mass,
                    means_ptr,
                    block_table_ptr,
                    index,
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
            needed = tl.max(kept.to(tl.int32), 0) > 0
            if tl.max(needed.to(tl.int32), 0) > 0:
                value = _load_rows(
                    value_ptr,
                    block,
                    offset,
                    needed,
                    key_block_stride,
                    key_slot_stride,
                    HEAD_DIM,
                    DIM_PADDED,
                )
                acc = tl.dot(weights.to(query.dtype), value.to(query.dtype), acc)
        kept_mass = tl.where(dense | (sum_exp == 0.0), 1.0, kept_mass / sum_exp)

    denominator = sum_exp
    if SINKS:
        denominator += tl.exp2(sink - max_score)
    factor = 1.0 / denominator
    if SCALED:
        factor = factor * tl.load(v_scale_ptr)
    tl.store(
        out_ptr + (token.to(tl.int64) * out_stride + query_head * HEAD_DIM)[:, None] + dim[None, :],
        (acc * factor[:, None]).to(out_ptr.dtype.element_ty),
        mask=is_row[:, None] & (dim < HEAD_DIM)[None, :],
    )
    row_at = token.to(tl.int64) * (num_kv_heads * HEADS) + query_head
    tl.store(kept_mass_ptr + row_at, kept_mass, mask=is_row)
    token_at = own_token.to(tl.int64) * num_kv_heads + kv_head
    tl.store(num_kept_ptr + token_at, num_kept, mask=is_token)
    tl.store(v_tiles_read_ptr + token_at, v_tiles, mask=is_token)
