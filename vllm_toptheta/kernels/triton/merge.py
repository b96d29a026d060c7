"""Step five of the decode kernels: a row's output and counts from the parts of its splits."""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

from vllm_toptheta.kernels.layout import NUM_WEIGHTS as _NUM_WEIGHTS
from vllm_toptheta.kernels.triton.rows import (
    LEVELS_PADDED,
    LONG_GROUP,
    STATE,
    _chosen_level,
    _num_active,
)
from vllm_toptheta.kernels.triton.tiles import LOG2E

NUM_WEIGHTS = tl.constexpr(_NUM_WEIGHTS)


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize=["window", "num_splits"],
    do_not_specialize_on_alignment=[
        "seq_lens_ptr",
        "dense_ptr",
        "min_mass_ptr",
        "weights_ptr",
        "sinks_ptr",
        "v_scale_ptr",
        "num_kept_ptr",
        "kept_mass_ptr",
        "lifts_ptr",
    ],
)
def _merge_kernel(
    seq_lens_ptr,
    dense_ptr,
    min_mass_ptr,
    weights_ptr,
    sinks_ptr,
    v_scale_ptr,
    state_ptr,
    levels_ptr,
    mass_ptr,
    acc_ptr,
    on_means_ptr,
    mean_sum_ptr,
    softmax_ptr,
    kept_ptr,
    out_ptr,
    num_kept_ptr,
    kept_mass_ptr,
    lifts_ptr,
    window,
    num_splits,
    out_stride,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
    CHUNK: tl.constexpr,
    SINKS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One query head of one sequence; the first head of a group also writes the group's counts."""
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    num_heads = tl.num_programs(0)
    dim = tl.arange(0, DIM_PADDED)
    is_dim = dim < HEAD_DIM
    row = seq * num_heads + head
    pair = row // HEADS
    is_first = head % HEADS == 0
    out_ptr += seq * out_stride + head * HEAD_DIM
    seq_len = tl.load(seq_lens_ptr + seq)
    if seq_len <= 0:  # padding of a captured batch
        tl.store(out_ptr + dim, tl.zeros([DIM_PADDED], out_ptr.dtype.element_ty), mask=is_dim)
        tl.store(kept_mass_ptr + row, 1.0)
        tl.store(num_kept_ptr + pair, 0, mask=is_first)
        tl.store(lifts_ptr + pair, 0, mask=is_first)
        return

    is_pruned = tl.load(dense_ptr + seq) == 0
    num_active = _num_active(seq_len, window, num_splits, TILE, MIN_TILES)
    num_pruned = 0
    if is_pruned:
        num_active = _num_active(seq_len, window, num_splits, LONG_GROUP, 1)
        num_pruned = num_active
    top = float("-inf")
    total = 0.0
    num_kept = 0
    acc = tl.zeros([DIM_PADDED], tl.float32)
    on_means = tl.zeros([DIM_PADDED], tl.float32)
    mean_sum = tl.zeros([DIM_PADDED], tl.float32)
    for start in range(0, num_active, CHUNK):
        split = start + tl.arange(0, CHUNK)
        is_part = split < num_active
        has_means = split < num_pruned
        place = (row * num_splits + split)[:, None] * HEAD_DIM + dim[None, :]
        mask = is_dim[None, :]
        part = tl.load(acc_ptr + place, mask=is_part[:, None] & mask, other=0.0)
        part_max = tl.load(
            softmax_ptr + (row * num_splits + split) * 2, mask=is_part, other=float("-inf")
        )
        part_sum = tl.load(
            softmax_ptr + (row * num_splits + split) * 2 + 1, mask=is_part, other=0.0
        )
        # Parts of pruned rows know their denominator: their maximum is 0.
        new_top = tl.maximum(top, tl.max(part_max, 0))
        factor = tl.exp2(part_max - new_top)
        rescale = tl.exp2(top - new_top)
        top = new_top
        total = total * rescale + tl.sum(part_sum * factor, 0)
        acc = acc * rescale + tl.sum(part * factor[:, None], 0)
        on_means += tl.sum(
            tl.load(on_means_ptr + place, mask=has_means[:, None] & mask, other=0.0), 0
        )
        pair_place = pair * num_splits + split
        mean_sum += tl.sum(
            tl.load(
                mean_sum_ptr + pair_place[:, None] * HEAD_DIM + dim[None, :],
                mask=has_means[:, None] & mask,
                other=0.0,
            ),
            0,
        )
        num_kept += tl.sum(tl.load(kept_ptr + pair_place, mask=has_means, other=0), 0)

    begin = tl.maximum(seq_len - window, 0)
    lifts = 0
    if is_pruned:
        weight = weights_ptr + head * NUM_WEIGHTS
        share = tl.load(weight) + tl.load(weight + 1) / total
        # Whole groups: those whose mean is stored.
        count = tl.maximum(seq_len // GROUP_SIZE - tl.cdiv(begin, GROUP_SIZE), 1)
        on_all = tl.load(weight + 4) * tl.maximum(1.0 - total, 0.0) / count
        result = acc * share + on_means + mean_sum * on_all
        result = result * tl.load(state_ptr + row * STATE + 2)
        lifts = _chosen_level(
            levels_ptr + pair * 2,
            mass_ptr + pair * HEADS * LEVELS_PADDED,
            tl.load(min_mass_ptr + seq),
            HEADS,
            HEADS_PADDED,
        )
    else:
        num_kept = seq_len - begin
        if SINKS:
            sink = tl.load(sinks_ptr + head) * LOG2E
            new_top = tl.maximum(top, sink)
            acc = acc * tl.exp2(top - new_top)
            total = total * tl.exp2(top - new_top) + tl.exp2(sink - new_top)
        result = acc / total
        total = 1.0
    if SCALED:
        result = result * tl.load(v_scale_ptr)
    tl.store(out_ptr + dim, result.to(out_ptr.dtype.element_ty), mask=is_dim)
    tl.store(kept_mass_ptr + row, tl.minimum(total, 1.0))
    tl.store(num_kept_ptr + pair, num_kept, mask=is_first)
    tl.store(lifts_ptr + pair, lifts, mask=is_first)
