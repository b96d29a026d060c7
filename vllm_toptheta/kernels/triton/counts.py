"""Counts of a step on the device, for telemetry: totals per request and layer of what the attention
kernels wrote.

One launch reads everything once, so that counting costs a step neither a dozen small kernels nor a
wait for the device. All sums are of integers, which no order of addition changes.
"""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from vllm_toptheta.kernels.layout import V_TILE

DENSE_NONE, DENSE_SHORT, DENSE_WINDOW, DENSE_LAYER, DENSE_ROW = range(5)
"""Why a row of a layer runs dense: not at all, few keys, a window of few keys, the layer or the row
is excluded. Of several reasons the highest counts."""

MASS_UNIT = 1_000_000
"""A share of 1 in the columns of kept mass."""

COLUMNS = (
    "rows",
    "keys_scored",
    "keys_kept",
    "v_rows_scored",
    "v_rows_read",
    "keys_dense",
    "keys_target",
    "kept_mass",
    "rows_lifted",
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
    "prefill_kept_mass",
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
    _KEPT_MASS,
    _ROWS_LIFTED,
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
    _PREFILL_KEPT_MASS,
) = map(tl.constexpr, range(len(COLUMNS)))
_V_TILE = tl.constexpr(V_TILE)
_MASS_UNIT = tl.constexpr(MASS_UNIT)
_TOKENS = tl.constexpr(32)


@dataclass(frozen=True)
class CountedLayers:
    """The layers that are counted.

    Attributes:
        index: [num_layers] int32, a layer's place in the output.
        window: [num_layers] int32, keys a row sees at most.
        follows_k: [num_layers] int8, 0 where an option replaces the thresholds of k.
    """

    index: Tensor
    window: Tensor
    follows_k: Tensor


@dataclass(frozen=True)
class CountedRows:
    """Query tokens that our kernels attended: those of the single-token requests, which come first
    in the batch, and perhaps those of the other requests.

    Attributes:
        is_prompt: [num_single] float32, single tokens that belong to a prompt where not 0.
        target: [num_single] float32, integers: keys that the row is to keep, all heads together,
            where k rules; else 0.
        dense: [num_layers, num_tokens] int8, DENSE_* codes.
        num_kept: [num_layers, num_tokens, num_kv_heads] int32.
        kept_mass: [num_layers, num_tokens, num_heads] float32, 1 on dense rows.
        lifts: [num_layers, num_tokens, num_kv_heads] int32; of single tokens only.
        v_tiles_read: [num_layers, num_tokens, num_kv_heads] int32; of the others only.
    """

    is_prompt: Tensor
    target: Tensor
    dense: Tensor
    num_kept: Tensor
    kept_mass: Tensor
    lifts: Tensor
    v_tiles_read: Tensor


@triton.jit
def _load_heads(ptr, row, is_token, NUM_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr):
    """[tokens, heads] of some rows, 0 where there is none."""
    head = tl.arange(0, HEADS_PADDED)
    mask = is_token[:, None] & (head < NUM_HEADS)[None, :]
    return tl.load(ptr + (row * NUM_HEADS)[:, None] + head[None, :], mask=mask, other=0)


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize=["num_single", "num_tokens"],
    do_not_specialize_on_alignment=[
        "seq_lens_ptr",
        "query_start_loc_ptr",
        "is_prompt_ptr",
        "target_ptr",
        "num_kept_ptr",
        "kept_mass_ptr",
        "lifts_ptr",
        "v_tiles_read_ptr",
    ],
)
def _count_kernel(
    seq_lens_ptr,
    query_start_loc_ptr,
    layer_index_ptr,
    layer_window_ptr,
    layer_follows_k_ptr,
    is_prompt_ptr,
    target_ptr,
    dense_ptr,
    num_kept_ptr,
    kept_mass_ptr,
    lifts_ptr,
    v_tiles_read_ptr,
    out_ptr,
    num_single,
    num_tokens,
    out_request_stride,
    NUM_COLUMNS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    KV_HEADS_PADDED: tl.constexpr,
    COUNTED_KV_HEADS: tl.constexpr,
    PRUNES_PROMPTS: tl.constexpr,
):
    request = tl.program_id(0)
    layer = tl.program_id(1)
    length = tl.load(seq_lens_ptr + request)
    if length <= 0:  # padding of a captured batch
        return
    first = tl.load(query_start_loc_ptr + request)
    tokens = tl.load(query_start_loc_ptr + request + 1) - first
    place = tl.load(layer_index_ptr + layer)
    out = out_ptr + request.to(tl.int64) * out_request_stride + place * NUM_COLUMNS
    is_single = request < num_single
    rows = tokens.to(tl.int64) * NUM_HEADS
    if not is_single and not PRUNES_PROMPTS:  # another kernel's
        tl.store(out + _DENSE_PREFILL, rows)
        return

    window = tl.load(layer_window_ptr + layer)
    scored = tl.zeros([_TOKENS], tl.int64)
    dense = tl.zeros([_TOKENS], tl.int64)
    tiles = tl.zeros([_TOKENS], tl.int64)
    kept = tl.zeros([_TOKENS], tl.int64)
    mass = tl.zeros([_TOKENS], tl.int64)
    tiles_read = tl.zeros([_TOKENS], tl.int64)
    for start in range(0, tokens, _TOKENS):
        token = start + tl.arange(0, _TOKENS)
        is_token = token < tokens
        row = layer.to(tl.int64) * num_tokens + first + token
        end = length - tokens + 1 + token
        begin = tl.maximum(end - window, 0)
        scored += tl.where(is_token, end - begin, 0)
        dense += (tl.load(dense_ptr + row, mask=is_token, other=0) != 0).to(tl.int64)
        kept_by_head = _load_heads(num_kept_ptr, row, is_token, NUM_KV_HEADS, KV_HEADS_PADDED)
        kept += tl.sum(kept_by_head.to(tl.int64), 1)
        share = _load_heads(kept_mass_ptr, row, is_token, NUM_HEADS, HEADS_PADDED)
        mass += tl.sum((share * _MASS_UNIT + 0.5).to(tl.int64), 1)
        if not is_single:
            tiles += tl.where(is_token, tl.cdiv(end, _V_TILE) - begin // _V_TILE, 0)
            read = _load_heads(v_tiles_read_ptr, row, is_token, NUM_KV_HEADS, KV_HEADS_PADDED)
            tiles_read += tl.sum(read.to(tl.int64), 1)
    visible = tl.sum(scored, 0)
    keys_scored = visible * NUM_HEADS
    v_rows_read = tl.sum(kept, 0)
    keys_kept = v_rows_read * (NUM_HEADS // NUM_KV_HEADS)
    kept_mass = tl.sum(mass, 0)
    dense_rows = tl.sum(dense, 0) * NUM_HEADS

    is_prompt = not is_single
    if is_single:
        is_prompt = tl.load(is_prompt_ptr + request) != 0
    if is_prompt:
        tl.store(out + _DENSE_PREFILL, dense_rows)
        if PRUNES_PROMPTS:
            tl.store(out + _PREFILL_ROWS, rows)
            tl.store(out + _PREFILL_KEYS_SCORED, keys_scored)
            tl.store(out + _PREFILL_KEYS_KEPT, keys_kept)
            # 0 of single tokens: the decode kernel reads rows instead.
            tl.store(out + _PREFILL_V_TILES, tl.sum(tiles, 0) * COUNTED_KV_HEADS)
            if COUNTED_KV_HEADS > 0:
                tl.store(out + _PREFILL_V_TILES_READ, tl.sum(tiles_read, 0))
            tl.store(out + _PREFILL_KEPT_MASS, kept_mass)
    else:
        tl.store(out + _ROWS, rows)
        tl.store(out + _KEYS_SCORED, keys_scored)
        tl.store(out + _KEYS_KEPT, keys_kept)
        tl.store(out + _V_ROWS_SCORED, visible * COUNTED_KV_HEADS)
        if COUNTED_KV_HEADS > 0:
            tl.store(out + _V_ROWS_READ, v_rows_read)
        tl.store(out + _KEPT_MASS, kept_mass)
        at = layer.to(tl.int64) * num_tokens + first
        reason = tl.load(dense_ptr + at)
        target = tl.zeros([], tl.int64)
        if reason != 0:
            # The codes and their columns follow each other.
            tl.store(out + _DENSE_SHORT - 1 + reason, rows)
        else:
            head = tl.arange(0, KV_HEADS_PADDED)
            lifts = tl.load(lifts_ptr + at * NUM_KV_HEADS + head, mask=head < NUM_KV_HEADS, other=0)
            lifted = tl.sum((lifts > 0).to(tl.int64), 0)
            tl.store(out + _ROWS_LIFTED, lifted * (NUM_HEADS // NUM_KV_HEADS))
            if tl.load(layer_follows_k_ptr + layer) != 0:
                target = tl.load(target_ptr + request).to(tl.int64)
                target = tl.minimum(target, keys_scored)
        tl.store(out + _KEYS_TARGET, target)
        tl.store(out + _KEYS_DENSE, tl.where(target == 0, keys_kept, 0))


def count_step(
    seq_lens: Tensor,
    query_start_loc: Tensor,
    layers: CountedLayers,
    rows: CountedRows,
    *,
    num_single: int,
    prunes_prompts: bool,
    counts_kv_heads: bool,
    out: Tensor,
) -> None:
    """Count what every request of a step did in every layer.

    Args:
        seq_lens: [num_reqs] int32, cached keys of each request; 0 for padding.
        query_start_loc: [num_reqs + 1] int32, first query token of each request, from 0.
        layers: what is counted.
        rows: what the kernels wrote.
        num_single: requests of one token; they come first in the batch.
        prunes_prompts: whether our kernels attend prompts, with thresholds, so that `rows` has the
            tokens of all requests; otherwise prompt tokens are counted as dense.
        counts_kv_heads: whether V rows and V tiles are counted; not where another tensor-parallel
            rank counts those of the same kv heads.
        out: [num_reqs, at least num_layers, len(COLUMNS)] int64, zero, written at `layers.index`.

    Raises:
        ValueError: the output has another shape.
    """
    num_reqs, num_layers = seq_lens.shape[0], layers.index.shape[0]
    if out.shape[0] != num_reqs or out.shape[2] != len(COLUMNS) or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous [{num_reqs}, layers, {len(COLUMNS)}], got {list(out.shape)}"
        )
    if num_reqs == 0:
        return
    num_heads, num_kv_heads = rows.kept_mass.shape[2], rows.num_kept.shape[2]
    _count_kernel[(num_reqs, num_layers)](
        seq_lens,
        query_start_loc,
        layers.index,
        layers.window,
        layers.follows_k,
        rows.is_prompt,
        rows.target,
        rows.dense,
        rows.num_kept,
        rows.kept_mass,
        rows.lifts,
        rows.v_tiles_read,
        out,
        num_single,
        rows.dense.shape[1],
        out.stride(0),
        NUM_COLUMNS=len(COLUMNS),
        NUM_HEADS=num_heads,
        HEADS_PADDED=triton.next_power_of_2(num_heads),
        NUM_KV_HEADS=num_kv_heads,
        KV_HEADS_PADDED=triton.next_power_of_2(num_kv_heads),
        COUNTED_KV_HEADS=num_kv_heads if counts_kv_heads else 0,
        PRUNES_PROMPTS=prunes_prompts,
        num_warps=4,
    )
