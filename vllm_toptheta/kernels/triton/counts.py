"""Counts of a step on the device, for telemetry: totals per request and layer of what the attention
kernels wrote, and sums per layer and head since the start.

One launch reads everything once, so that counting costs a step neither a dozen small kernels nor a
wait for the device. All sums are of integers, which no order of addition changes.
"""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from vllm_toptheta.kernels.columns import COLUMNS, MASS_UNIT
from vllm_toptheta.kernels.layout import V_TILE

_ROWS = tl.constexpr(COLUMNS.index("rows"))
_KEYS_SCORED = tl.constexpr(COLUMNS.index("keys_scored"))
_KEYS_KEPT = tl.constexpr(COLUMNS.index("keys_kept"))
_V_ROWS_SCORED = tl.constexpr(COLUMNS.index("v_rows_scored"))
_V_ROWS_READ = tl.constexpr(COLUMNS.index("v_rows_read"))
_KEYS_DENSE = tl.constexpr(COLUMNS.index("keys_dense"))
_KEYS_TARGET = tl.constexpr(COLUMNS.index("keys_target"))
_KEPT_MASS = tl.constexpr(COLUMNS.index("kept_mass"))
_ROWS_LIFTED = tl.constexpr(COLUMNS.index("rows_lifted"))
_DENSE_SHORT = tl.constexpr(COLUMNS.index("dense_short"))
_DENSE_WINDOW = tl.constexpr(COLUMNS.index("dense_window"))
_DENSE_LAYER = tl.constexpr(COLUMNS.index("dense_layer"))
_DENSE_OFF = tl.constexpr(COLUMNS.index("dense_off"))
_DENSE_PREFILL = tl.constexpr(COLUMNS.index("dense_prefill"))
_PREFILL_ROWS = tl.constexpr(COLUMNS.index("prefill_rows"))
_PREFILL_KEYS_SCORED = tl.constexpr(COLUMNS.index("prefill_keys_scored"))
_PREFILL_KEYS_KEPT = tl.constexpr(COLUMNS.index("prefill_keys_kept"))
_PREFILL_V_TILES = tl.constexpr(COLUMNS.index("prefill_v_tiles"))
_PREFILL_V_TILES_READ = tl.constexpr(COLUMNS.index("prefill_v_tiles_read"))
_PREFILL_KEPT_MASS = tl.constexpr(COLUMNS.index("prefill_kept_mass"))
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
    """Query tokens that our kernels attended: those of the single-token requests, and perhaps those
    of the other requests.

    Attributes:
        is_prompt: [num_tokens] float32, single tokens that belong to a prompt where not 0.
        target: [num_tokens] float32, integers: keys that the single token is to keep, all heads
            together, where k rules; else 0.
        dense: [num_layers, num_tokens] int8, DENSE_* codes of `columns.py`.
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
    do_not_specialize=["first_single", "end_single", "skipped", "num_tokens"],
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
    heads_ptr,
    first_single,
    end_single,
    skipped,
    num_tokens,
    out_request_stride,
    NUM_COLUMNS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    KV_HEADS_PADDED: tl.constexpr,
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
    is_single = (request >= first_single) & (request < end_single)
    if not is_single and not PRUNES_PROMPTS:  # another kernel's
        tl.store(out + _DENSE_PREFILL, tokens)
        return

    first -= skipped
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
    on_lists = tl.sum(kept, 0)
    kept_mass = tl.sum(mass, 0)

    is_prompt = not is_single
    if is_single:
        is_prompt = tl.load(is_prompt_ptr + first) != 0
    if is_prompt:
        tl.store(out + _DENSE_PREFILL, tl.sum(dense, 0))
        if PRUNES_PROMPTS:
            tl.store(out + _PREFILL_ROWS, tokens)
            tl.store(out + _PREFILL_KEYS_SCORED, visible)
            tl.store(out + _PREFILL_KEYS_KEPT, on_lists)
            # 0 of single tokens: the decode kernel reads rows instead.
            tl.store(out + _PREFILL_V_TILES, tl.sum(tiles, 0))
            tl.store(out + _PREFILL_V_TILES_READ, tl.sum(tiles_read, 0))
            tl.store(out + _PREFILL_KEPT_MASS, kept_mass)
    else:
        tl.store(out + _ROWS, tokens)
        tl.store(out + _KEYS_SCORED, visible)
        tl.store(out + _KEYS_KEPT, on_lists)
        tl.store(out + _V_ROWS_SCORED, visible)
        tl.store(out + _V_ROWS_READ, on_lists)
        tl.store(out + _KEPT_MASS, kept_mass)
        at = layer.to(tl.int64) * num_tokens + first
        reason = tl.load(dense_ptr + at)
        target = tl.zeros([], tl.int64)
        if reason != 0:
            # The codes and their columns follow each other.
            tl.store(out + _DENSE_SHORT - 1 + reason, tokens)
        else:
            head = tl.arange(0, KV_HEADS_PADDED)
            lifts = tl.load(lifts_ptr + at * NUM_KV_HEADS + head, mask=head < NUM_KV_HEADS, other=0)
            tl.store(out + _ROWS_LIFTED, tl.sum((lifts > 0).to(tl.int64), 0))
            if tl.load(layer_follows_k_ptr + layer) != 0:
                target = tl.load(target_ptr + first).to(tl.int64)
                target = tl.minimum(target, visible * NUM_HEADS)
        tl.store(out + _KEYS_TARGET, target)
        tl.store(out + _KEYS_DENSE, tl.where(target == 0, on_lists, 0))

        sums = heads_ptr + layer * (NUM_KV_HEADS + NUM_HEADS + 2)
        head = tl.arange(0, KV_HEADS_PADDED)
        own = tl.load(num_kept_ptr + at * NUM_KV_HEADS + head, mask=head < NUM_KV_HEADS, other=0)
        tl.atomic_add(sums + head, own.to(tl.int64), mask=head < NUM_KV_HEADS, sem="relaxed")
        sums += NUM_KV_HEADS
        head = tl.arange(0, HEADS_PADDED)
        share = tl.load(kept_mass_ptr + at * NUM_HEADS + head, mask=head < NUM_HEADS, other=0)
        units = (share * _MASS_UNIT + 0.5).to(tl.int64)
        tl.atomic_add(sums + head, units, mask=head < NUM_HEADS, sem="relaxed")
        tl.atomic_add(sums + NUM_HEADS, visible, sem="relaxed")
        tl.atomic_add(sums + NUM_HEADS + 1, tokens.to(tl.int64), sem="relaxed")


def count_step(
    seq_lens: Tensor,
    query_start_loc: Tensor,
    layers: CountedLayers,
    rows: CountedRows,
    *,
    single: slice,
    skipped: int,
    prunes_prompts: bool,
    out: Tensor,
    heads: Tensor,
) -> None:
    """Count what every request of a step did in every layer.

    Args:
        seq_lens: [num_reqs] int32, cached keys of each request; 0 for padding.
        query_start_loc: [num_reqs + 1] int32, first query token of each request, from 0.
        layers: what is counted.
        rows: what the kernels wrote.
        single: requests of one token.
        skipped: tokens of the batch before the first one in `rows`.
        prunes_prompts: whether our kernels attend prompts, with thresholds, so that `rows` has the
            tokens of all requests; otherwise prompt tokens are counted as dense.
        out: [num_reqs, at least num_layers, len(COLUMNS)] int64, zero, written at `layers.index`,
            in UNITS.
        heads: [num_layers, num_kv_heads + num_heads + 2] int64, to which generated tokens are
            added, dense ones included: keys kept by kv head, MASS_UNITs kept by head, keys seen,
            and rows.

    Raises:
        ValueError: an output has another shape.
    """
    num_reqs, num_layers = seq_lens.shape[0], layers.index.shape[0]
    if out.shape[0] != num_reqs or out.shape[2] != len(COLUMNS) or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous [{num_reqs}, layers, {len(COLUMNS)}], got {list(out.shape)}"
        )
    num_heads, num_kv_heads = rows.kept_mass.shape[2], rows.num_kept.shape[2]
    shape = (num_layers, num_kv_heads + num_heads + 2)
    if heads.shape != shape or not heads.is_contiguous():
        raise ValueError(f"heads must be contiguous {list(shape)}, got {list(heads.shape)}")
    if num_reqs == 0:
        return
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
        heads,
        single.start,
        single.stop,
        skipped,
        rows.dense.shape[1],
        out.stride(0),
        NUM_COLUMNS=len(COLUMNS),
        NUM_HEADS=num_heads,
        HEADS_PADDED=triton.next_power_of_2(num_heads),
        NUM_KV_HEADS=num_kv_heads,
        KV_HEADS_PADDED=triton.next_power_of_2(num_kv_heads),
        PRUNES_PROMPTS=prunes_prompts,
        num_warps=4,
    )
