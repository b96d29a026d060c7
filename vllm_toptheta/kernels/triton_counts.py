"""Counts of a step on the device: what the attention kernels wrote in, totals per request and layer
out.

One launch reads everything once, so that counting costs a step neither a dozen small kernels nor a
wait for the device.
"""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from vllm_toptheta.kernels.cpu_prefill import V_TILE
from vllm_toptheta.kernels.triton_theta import _ROW, _SHORT, _WINDOW

COLUMNS = (
    "rows",
    "keys_scored",
    "keys_kept",
    "v_rows_scored",
    "v_rows_read",
    "keys_dense",
    "keys_target",
    "dense_short",
    "dense_window",
    "dense_layer",
    "dense_off",
    "dense_prefill",
    "prefill_rows",
    "prefill_keys_scored",
    "prefill_keys_kept",
    "prefill_v_tiles",
    "prefill_v_tiles_read",
)
"""What is counted, in the order it is written; `telemetry/counters.py` says what each means."""

(
    _ROWS,
    _KEYS_SCORED,
    _KEYS_KEPT,
    _V_ROWS_SCORED,
    _V_ROWS_READ,
    _KEYS_DENSE,
    _KEYS_TARGET,
    _DENSE_SHORT,
    _DENSE_WINDOW,
    _DENSE_LAYER,
    _DENSE_OFF,
    _DENSE_PREFILL,
    _PREFILL_ROWS,
    _PREFILL_KEYS_SCORED,
    _PREFILL_KEYS_KEPT,
    _PREFILL_V_TILES,
    _PREFILL_V_TILES_READ,
) = map(tl.constexpr, range(len(COLUMNS)))
_V_TILE = tl.constexpr(V_TILE)


@dataclass(frozen=True)
class CountedRows:
    """Single-token rows, the first requests of the batch.

    Attributes:
        is_prompt: [at least num_rows] float32, rows that are prompt tokens where not 0.
        level: [at least num_rows] float32, position of the row's k among the table's levels.
        dense: [num_layers, at least num_rows] int8, DENSE_* codes.
        num_kept: [num_layers, at least num_rows, num_heads] int32.
        v_rows_read: [num_layers, at least num_rows, num_kv_heads] int32.
        num_rows: how many there are.
    """

    is_prompt: Tensor
    level: Tensor
    dense: Tensor
    num_kept: Tensor
    v_rows_read: Tensor
    num_rows: int


@dataclass(frozen=True)
class CountedPrompts:
    """Tokens of the requests after the single-token rows, where our prefill kernel computed them.

    Attributes:
        dense: [num_layers, num_tokens] int8, DENSE_* codes.
        num_kept: [num_layers, num_tokens, num_heads] int32.
        v_tiles_read: [num_layers, num_tokens, num_kv_heads] int32.
    """

    dense: Tensor
    num_kept: Tensor
    v_tiles_read: Tensor


@dataclass(frozen=True)
class CountedLayers:
    """The layers that are counted.

    Attributes:
        index: [num_layers] int32, a layer's place in the output.
        window: [num_layers] int32, keys a row sees at most.
        k: [num_layers] float32, a layer's own k; 0 where the row's level counts.
        level: [num_layers] float32, level position of k.
        log2_head_k: [num_levels, num_layers, num_heads] float32, log2 of the keys a head is to
            keep.
    """

    index: Tensor
    window: Tensor
    k: Tensor
    level: Tensor
    log2_head_k: Tensor


@triton.jit
def _count_row(
    out,
    request,
    layer,
    window,
    length,
    is_prompt_ptr,
    row_level_ptr,
    layer_k_ptr,
    layer_level_ptr,
    log2_head_k_ptr,
    dense_ptr,
    num_kept_ptr,
    v_rows_read_ptr,
    max_rows,
    num_layers,
    NUM_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    PRUNES_PROMPTS: tl.constexpr,
    PRUNES_GENERATED: tl.constexpr,
):
    """One single-token row in one layer."""
    visible = tl.minimum(length, window).to(tl.int64)
    row = layer.to(tl.int64) * max_rows + request
    head = tl.arange(0, HEADS_PADDED)
    reason = tl.load(dense_ptr + row)
    kept = tl.load(num_kept_ptr + row * NUM_HEADS + head, mask=head < NUM_HEADS, other=0)
    kept = tl.sum(kept.to(tl.int64), 0)
    if tl.load(is_prompt_ptr + request) != 0:
        tl.store(out + _DENSE_PREFILL, NUM_HEADS * (reason != 0).to(tl.int64))
        if PRUNES_PROMPTS:
            # V tiles are left out: the decode kernel counts rows instead.
            tl.store(out + _PREFILL_ROWS, NUM_HEADS)
            tl.store(out + _PREFILL_KEYS_SCORED, visible * NUM_HEADS)
            tl.store(out + _PREFILL_KEYS_KEPT, kept)
    else:
        read = tl.load(
            v_rows_read_ptr + row * NUM_KV_HEADS + head, mask=head < NUM_KV_HEADS, other=0
        )
        tl.store(out + _ROWS, NUM_HEADS)
        tl.store(out + _KEYS_SCORED, visible * NUM_HEADS)
        tl.store(out + _KEYS_KEPT, kept)
        tl.store(out + _V_ROWS_SCORED, visible * NUM_KV_HEADS)
        tl.store(out + _V_ROWS_READ, tl.sum(read.to(tl.int64), 0))
        if reason != 0:
            tl.store(out + _KEYS_DENSE, visible * NUM_HEADS)
            column = tl.where(reason == _WINDOW, _DENSE_WINDOW, _DENSE_LAYER)
            column = tl.where(reason == _SHORT, _DENSE_SHORT, column)
            if PRUNES_GENERATED:
                column = tl.where(reason == _ROW, _DENSE_OFF, column)
            tl.store(out + column, NUM_HEADS)
        else:
            level = tl.load(layer_level_ptr + layer)
            if tl.load(layer_k_ptr + layer) <= 0:
                level = tl.load(row_level_ptr + request)
            lower = tl.minimum(level.to(tl.int32), NUM_LEVELS - 1)
            upper = tl.minimum(lower + 1, NUM_LEVELS - 1)
            target = log2_head_k_ptr + layer * NUM_HEADS + head
            step = num_layers * NUM_HEADS
            low = tl.load(target + lower * step, mask=head < NUM_HEADS, other=0.0)
            high = tl.load(target + upper * step, mask=head < NUM_HEADS, other=0.0)
            keys = tl.exp2(low + (high - low) * (level - lower.to(tl.float32)))
            keys = tl.minimum((keys + 0.5).to(tl.int64), visible)
            tl.store(out + _KEYS_TARGET, tl.sum(tl.where(head < NUM_HEADS, keys, 0), 0))


@triton.jit
def _count_prompt(
    out,
    first,
    tokens,
    length,
    layer,
    window,
    dense_ptr,
    num_kept_ptr,
    v_tiles_read_ptr,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
):
    """The tokens of one request in one layer."""
    TOKENS: tl.constexpr = 64
    head = tl.arange(0, HEADS_PADDED)
    dense = tl.zeros([TOKENS], tl.int64)
    scored = tl.zeros([TOKENS], tl.int64)
    tiles = tl.zeros([TOKENS], tl.int64)
    kept = tl.zeros([TOKENS], tl.int64)
    read = tl.zeros([TOKENS], tl.int64)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        is_token = token < tokens
        end = length - tokens + 1 + token
        begin = tl.maximum(end - window, 0)
        scored += tl.where(is_token, end - begin, 0)
        tiles += tl.where(is_token, tl.cdiv(end, _V_TILE) - begin // _V_TILE, 0)
        row = layer.to(tl.int64) * num_tokens + first + token
        dense += (tl.load(dense_ptr + row, mask=is_token, other=0) != 0).to(tl.int64)
        heads = tl.load(
            num_kept_ptr + (row * NUM_HEADS)[:, None] + head[None, :],
            mask=is_token[:, None] & (head < NUM_HEADS)[None, :],
            other=0,
        )
        kept += tl.sum(heads.to(tl.int64), 1)
        heads = tl.load(
            v_tiles_read_ptr + (row * NUM_KV_HEADS)[:, None] + head[None, :],
            mask=is_token[:, None] & (head < NUM_KV_HEADS)[None, :],
            other=0,
        )
        read += tl.sum(heads.to(tl.int64), 1)
    tl.store(out + _DENSE_PREFILL, tl.sum(dense, 0) * NUM_HEADS)
    tl.store(out + _PREFILL_ROWS, tokens.to(tl.int64) * NUM_HEADS)
    tl.store(out + _PREFILL_KEYS_SCORED, tl.sum(scored, 0) * NUM_HEADS)
    tl.store(out + _PREFILL_KEYS_KEPT, tl.sum(kept, 0))
    tl.store(out + _PREFILL_V_TILES, tl.sum(tiles, 0) * NUM_KV_HEADS)
    tl.store(out + _PREFILL_V_TILES_READ, tl.sum(read, 0))


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize=["num_rows", "max_rows", "num_tokens"],
    do_not_specialize_on_alignment=[
        "seq_lens_ptr",
        "query_start_loc_ptr",
        "is_prompt_ptr",
        "row_level_ptr",
    ],
)
def _count_kernel(
    seq_lens_ptr,
    query_start_loc_ptr,
    layer_index_ptr,
    layer_window_ptr,
    layer_k_ptr,
    layer_level_ptr,
    log2_head_k_ptr,
    is_prompt_ptr,
    row_level_ptr,
    dense_ptr,
    num_kept_ptr,
    v_rows_read_ptr,
    prompt_dense_ptr,
    prompt_num_kept_ptr,
    prompt_v_tiles_read_ptr,
    out_ptr,
    num_rows,
    max_rows,
    num_tokens,
    out_request_stride,
    NUM_COLUMNS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    PRUNES_PROMPTS: tl.constexpr,
    PRUNES_GENERATED: tl.constexpr,
):
    request = tl.program_id(0)
    layer = tl.program_id(1)
    length = tl.load(seq_lens_ptr + request)
    if length <= 0:  # padding of a captured batch
        return
    place = tl.load(layer_index_ptr + layer)
    out = out_ptr + request.to(tl.int64) * out_request_stride + place * NUM_COLUMNS
    window = tl.load(layer_window_ptr + layer)
    if request < num_rows:
        _count_row(
            out,
            request,
            layer,
            window,
            length,
            is_prompt_ptr,
            row_level_ptr,
            layer_k_ptr,
            layer_level_ptr,
            log2_head_k_ptr,
            dense_ptr,
            num_kept_ptr,
            v_rows_read_ptr,
            max_rows,
            tl.num_programs(1),
            NUM_HEADS,
            HEADS_PADDED,
            NUM_KV_HEADS,
            NUM_LEVELS,
            PRUNES_PROMPTS,
            PRUNES_GENERATED,
        )
    else:
        first = tl.load(query_start_loc_ptr + request)
        tokens = tl.load(query_start_loc_ptr + request + 1) - first
        if PRUNES_PROMPTS:
            _count_prompt(
                out,
                first - tl.load(query_start_loc_ptr + num_rows),
                tokens,
                length,
                layer,
                window,
                prompt_dense_ptr,
                prompt_num_kept_ptr,
                prompt_v_tiles_read_ptr,
                num_tokens,
                NUM_HEADS,
                HEADS_PADDED,
                NUM_KV_HEADS,
            )
        else:
            tl.store(out + _DENSE_PREFILL, tokens.to(tl.int64) * NUM_HEADS)


def count_step(
    seq_lens: Tensor,
    query_start_loc: Tensor,
    layers: CountedLayers,
    rows: CountedRows,
    prompts: CountedPrompts | None,
    *,
    prunes_prompts: bool,
    prunes_generated: bool,
    out: Tensor,
) -> None:
    """Count what every request of a step did in every layer.

    Args:
        seq_lens: [num_reqs] int32, cached keys of each request; 0 for padding.
        query_start_loc: [num_reqs + 1] int32, first query token of each request.
        layers: what is counted.
        rows: the first requests, of one token each.
        prompts: the tokens of the other requests; None where there are none, or another kernel
            computed them.
        prunes_prompts: whether our kernels compute prompts with thresholds; otherwise prompt
            tokens are counted as dense.
        prunes_generated: whether generated tokens are pruned at all; otherwise rows that are dense
            in every layer are counted as excluded layers and not as the request's wish.
        out: [num_reqs, at least num_layers, len(COLUMNS)] int64, zero, written at `layers.index`.

    Raises:
        ValueError: prompts are to be counted and were not given, or the output has another shape.
    """
    num_reqs, num_layers = seq_lens.shape[0], layers.index.shape[0]
    if prunes_prompts and prompts is None and num_reqs > rows.num_rows:
        raise ValueError(f"{num_reqs - rows.num_rows} requests need their prompts to be counted")
    if out.shape[0] != num_reqs or out.shape[2] != len(COLUMNS) or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous [{num_reqs}, layers, {len(COLUMNS)}], got {list(out.shape)}"
        )
    if num_reqs == 0:
        return
    num_heads, num_kv_heads = rows.num_kept.shape[2], rows.v_rows_read.shape[2]
    # Never read without prompts.
    held = prompts or CountedPrompts(rows.dense, rows.num_kept, rows.v_rows_read)
    _count_kernel[(num_reqs, num_layers)](
        seq_lens,
        query_start_loc,
        layers.index,
        layers.window,
        layers.k,
        layers.level,
        layers.log2_head_k,
        rows.is_prompt,
        rows.level,
        rows.dense,
        rows.num_kept,
        rows.v_rows_read,
        held.dense,
        held.num_kept,
        held.v_tiles_read,
        out,
        rows.num_rows,
        rows.dense.shape[1],
        held.dense.shape[1],
        out.stride(0),
        NUM_COLUMNS=len(COLUMNS),
        NUM_HEADS=num_heads,
        HEADS_PADDED=triton.next_power_of_2(num_heads),
        NUM_KV_HEADS=num_kv_heads,
        NUM_LEVELS=layers.log2_head_k.shape[0],
        PRUNES_PROMPTS=prunes_prompts,
        PRUNES_GENERATED=prunes_generated,
        num_warps=4,
    )
