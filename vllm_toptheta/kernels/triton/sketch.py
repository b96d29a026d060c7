"""The sketch of K (`kernels/sketch.py`) on GPUs: written when a group is complete, and scored in
K's place.

Codes lie by token, as K does, so that tensor cores multiply them as they multiply K. Groups are
tiles of 64 keys here; smaller blocks have no sketch.
"""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_toptheta.kernels.sketch import GPU_GROUP, Sketch
from vllm_toptheta.kernels.sketch import SKETCH_ERROR as _SKETCH_ERROR
from vllm_toptheta.kernels.triton.checks import check_slots
from vllm_toptheta.kernels.triton.rows import LONG_GROUP, _load_query, _long_range
from vllm_toptheta.kernels.triton.tiles import LOG2E, _cap, _load_columns

SKETCH_ERROR = tl.constexpr(_SKETCH_ERROR)
GROUP = tl.constexpr(GPU_GROUP)

_CENTRES_AT_ONCE = tl.constexpr(64)


@triton.jit
def _rotate(rows, HEAD_DIM: tl.constexpr, DIM_PADDED: tl.constexpr):
    """Rows [num, DIM_PADDED] of 16 bits times the matrix `kernels.sketch.hadamard`, in float32."""
    SIZE: tl.constexpr = HEAD_DIM & -HEAD_DIM
    dim = tl.arange(0, DIM_PADDED)
    odd = dim[:, None] & dim[None, :] & (SIZE - 1)
    odd ^= odd >> 4
    odd ^= odd >> 2
    odd ^= odd >> 1
    is_block = (dim // SIZE)[:, None] == (dim // SIZE)[None, :]
    signs = tl.where(is_block, 1.0 - 2.0 * (odd & 1).to(tl.float32), 0.0).to(rows.dtype)
    return tl.dot(rows, signs) * SIZE**-0.5


@triton.jit
def _round(x):
    """To the nearest integer, halves to the even one; of numbers below 2**22."""
    return x + 12582912.0 - 12582912.0


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize=["window", "block_table_stride"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "dense_ptr"],
)
def _centres_kernel(
    query_ptr,
    centre_ptr,
    bounds_ptr,
    block_table_ptr,
    seq_lens_ptr,
    dense_ptr,
    query_codes_ptr,
    query_steps_ptr,
    centre_score_ptr,
    sm_scale,
    window,
    max_groups,
    query_stride,
    block_table_stride,
    sketch_block_stride,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Before the scan: the query in 8 bits, and for one split of a row the scores of its groups'
    mean keys, without a soft cap, as exponents of 2; infinity for groups that are scored with K."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + seq)
    if (seq_len <= 0) | (tl.load(dense_ptr + seq) != 0):
        return
    begin, first_long, last_long = _long_range(seq_len, window, split, tl.num_programs(1))
    head = tl.arange(0, HEADS_PADDED)
    dim = tl.arange(0, DIM_PADDED)
    is_head = head < HEADS
    rows = (seq * tl.num_programs(0) + kv_head) * HEADS + head
    query = _load_query(
        query_ptr + seq * query_stride, kv_head, HEADS, HEADS_PADDED, HEAD_DIM, DIM_PADDED
    )
    rotated = _rotate(query, HEAD_DIM, DIM_PADDED)
    step = tl.maximum(tl.max(tl.abs(rotated), 1) / 127, 1e-30)
    if split == 0:
        tl.store(
            query_codes_ptr + (rows * HEAD_DIM)[:, None] + dim[None, :],
            _round(rotated / step[:, None]).to(tl.int8),
            mask=is_head[:, None] & (dim < HEAD_DIM)[None, :],
        )
        tl.store(query_steps_ptr + rows, step, mask=is_head)
    norm = tl.sqrt(tl.sum(query.to(tl.float32) * query.to(tl.float32), 1))
    # What the codes miss, and what is lost where the query becomes 8-bit integers.
    rounding = step * (0.5 * HEAD_DIM**0.5)
    limit = SKETCH_ERROR * HEAD_DIM**0.5 / sm_scale
    GROUPS: tl.constexpr = BLOCK_SIZE // GROUP
    wide = kv_head.to(tl.int64)
    centre_ptr += wide * (GROUPS * HEAD_DIM)
    bounds_ptr += wide * (GROUPS * 2)
    block_table_ptr += seq * block_table_stride
    last = last_long * (LONG_GROUP // GROUP)
    for at in tl.range(first_long * (LONG_GROUP // GROUP), last, _CENTRES_AT_ONCE, num_stages=1):
        group = at + tl.arange(0, _CENTRES_AT_ONCE)
        start = group * GROUP
        whole = (group < last) & (start >= begin) & (start + GROUP <= seq_len)
        block = tl.load(block_table_ptr + start // BLOCK_SIZE, mask=whole, other=0).to(tl.int64)
        index = start % BLOCK_SIZE // GROUP
        centre = tl.load(
            centre_ptr
            + (block * (sketch_block_stride // 2) + index * HEAD_DIM)[None, :]
            + dim[:, None],
            mask=whole[None, :] & (dim < HEAD_DIM)[:, None],
            other=0.0,
        )
        bound = bounds_ptr + block * (sketch_block_stride // 4) + index * 2
        error = tl.load(bound, mask=whole, other=1e30)
        length = tl.load(bound + 1, mask=whole, other=0.0)
        worst = norm[:, None] * error[None, :] + rounding[:, None] * length[None, :]
        small = whole & (tl.max(worst, 0) <= limit)
        scores = tl.dot(query, centre) * (sm_scale * LOG2E)
        tl.store(
            centre_score_ptr + (rows * max_groups)[:, None] + group[None, :],
            tl.where(small[None, :], scores, float("inf")),
            mask=is_head[:, None] & (group < last)[None, :],
        )


@triton.jit
def _load_codes(
    query_codes_ptr,
    query_steps_ptr,
    pair,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """A row's query heads of one kv head in 8 bits, [HEADS_PADDED, DIM_PADDED], and their steps."""
    head = tl.arange(0, HEADS_PADDED)
    dim = tl.arange(0, DIM_PADDED)
    rows = pair * HEADS + head
    codes = tl.load(
        query_codes_ptr + (rows * HEAD_DIM)[:, None] + dim[None, :],
        mask=(head < HEADS)[:, None] & (dim < HEAD_DIM)[None, :],
        other=0,
    )
    return codes, tl.load(query_steps_ptr + rows, mask=head < HEADS, other=0.0)


@triton.jit
def _exact_range(centre_score_ptr, first, last):
    """How many groups from `first` up to `last` are scored with the sketch; and the first and
    behind the last of those that are not.

    Args:
        centre_score_ptr: of one query head: of a kv head's query heads all are or none.
    """
    trusted = 0
    first_exact = last
    last_exact = first
    for at in tl.range(first, last, _CENTRES_AT_ONCE, num_stages=1):
        group = at + tl.arange(0, _CENTRES_AT_ONCE)
        scores = tl.load(centre_score_ptr + group, mask=group < last, other=0.0)
        by_key = (group < last) & (scores == float("inf"))
        trusted += tl.sum(((group < last) & (scores < float("inf"))).to(tl.int32), 0)
        first_exact = tl.minimum(first_exact, tl.min(tl.where(by_key, group, last), 0))
        last_exact = tl.maximum(last_exact, tl.max(tl.where(by_key, group + 1, first), 0))
    return trusted, first_exact, last_exact


@triton.jit
def _sketched_scores(
    codes_of_query,
    factor,
    centre,
    code_ptr,
    block,
    offset,
    rows,
    soft_cap,
    sketch_block_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """`tiles._log2_scores` of keys by their sketch.

    Args:
        codes_of_query: [num_rows, DIM_PADDED] int8.
        factor: a step of the query times a step of the group and the factor on q.k, [num_rows,
            TILE] or [num_rows, 1].
        centre: scores of the keys' groups, alike.
        block, offset, rows: [TILE], where the keys are, and which are read.
    """
    codes = _load_columns(
        code_ptr, block, offset, rows, sketch_block_stride, HEAD_DIM, HEAD_DIM, DIM_PADDED
    )
    # Rounded once, in every kernel alike: scores decide what is kept.
    products = tl.dot(codes_of_query, codes).to(tl.float32)
    return _cap(tl.fma(products, factor, centre), soft_cap, SOFT_CAP)


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(do_not_specialize_on_alignment=["slot_mapping_ptr"])
def _update_sketch_kernel(
    key_ptr,
    code_ptr,
    scale_ptr,
    centre_ptr,
    bounds_ptr,
    slot_mapping_ptr,
    key_block_stride,
    key_head_stride,
    key_slot_stride,
    sketch_block_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    slot = tl.load(slot_mapping_ptr + tl.program_id(0))
    if (slot < 0) | (slot % GROUP != GROUP - 1):
        return
    kv_head = tl.program_id(1).to(tl.int64)
    block = (slot // BLOCK_SIZE).to(tl.int64)
    index = (slot % BLOCK_SIZE) // GROUP
    row = tl.arange(0, GROUP)
    dim = tl.arange(0, DIM_PADDED)
    is_dim = dim < HEAD_DIM
    key_ptr += block * key_block_stride + kv_head * key_head_stride
    key = tl.load(
        key_ptr + ((index * GROUP + row) * key_slot_stride)[:, None] + dim[None, :],
        mask=is_dim[None, :],
        other=0.0,
    )
    centre = (tl.sum(key.to(tl.float32), 0) / GROUP).to(key.dtype)
    group = kv_head * (BLOCK_SIZE // GROUP) + index
    centre_ptr += block * (sketch_block_stride // 2) + group * HEAD_DIM
    tl.store(centre_ptr + dim, centre, mask=is_dim)
    # Rotated apart, because products of 16 bits are exact.
    of_centre = _rotate(tl.broadcast_to(centre[None, :], [GROUP, DIM_PADDED]), HEAD_DIM, DIM_PADDED)
    rotated = _rotate(key, HEAD_DIM, DIM_PADDED) - of_centre
    scale = tl.maximum(tl.max(tl.max(tl.abs(rotated), 1), 0) / 127, 1e-30)
    codes = _round(rotated / scale)
    stands_for = codes * scale
    missed = rotated - stands_for
    error = tl.sqrt(tl.max(tl.sum(missed * missed, 1), 0))
    length = tl.sqrt(tl.max(tl.sum(stands_for * stands_for, 1), 0))
    at = group * GROUP + row
    tl.store(
        code_ptr + block * sketch_block_stride + (at * HEAD_DIM)[:, None] + dim[None, :],
        codes.to(tl.int8),
        mask=is_dim[None, :],
    )
    tl.store(scale_ptr + block * (sketch_block_stride // 4) + group, scale)
    bounds_ptr += block * (sketch_block_stride // 4) + group * 2
    tl.store(bounds_ptr, error * 1.00001)  # whatever becomes float32 rounds
    tl.store(bounds_ptr + 1, length * 1.00001)


def check_sketch(sketch: Sketch, key_cache: Tensor) -> None:
    """Raise ValueError unless a sketch, as views of pages, belongs to the cache: codes int8 and
    scales float32, all parts of a page contiguous and in one page as long as the cache's.

    Args:
        sketch: [num_blocks, num_kv_heads, block_size // 64] groups.
        key_cache: [num_blocks, num_kv_heads, block_size, head_dim].
    """
    num_blocks, num_kv_heads, block_size, head_dim = key_cache.shape
    if block_size % GPU_GROUP or key_cache.element_size() != 2:
        raise ValueError(
            f"the sketch of K needs blocks of a multiple of {GPU_GROUP} tokens and a 16-bit "
            f"cache, got {block_size} and {key_cache.dtype}"
        )
    page = key_cache.stride(0) * key_cache.element_size()
    wanted = (
        ("codes", sketch.codes, (GPU_GROUP, head_dim), torch.int8),
        ("scales", sketch.scales, (1,), torch.float32),
        ("centre", sketch.centre, (head_dim,), key_cache.dtype),
        ("bounds", sketch.bounds, (2,), torch.float32),
    )
    for name, tensor, sizes, dtype in wanted:
        shape = (num_blocks, num_kv_heads, block_size // GPU_GROUP, *sizes)
        fits = tensor.shape == shape and tensor.dtype == dtype and tensor[0].is_contiguous()
        # Of a single page the stride may be anything.
        same = num_blocks == 1 or tensor.stride(0) * tensor.element_size() == page
        if not (fits and same):
            raise ValueError(
                f"{name} must be {list(shape)} {dtype} in pages of {page} bytes, got "
                f"{list(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
            )


def update_sketch(key_cache: Tensor, sketch: Sketch, slot_mapping: Tensor) -> None:
    """Store the sketch of every group whose last slot is in `slot_mapping`.

    Call it after each write to the cache, with the slots that were written. A group that is not
    complete has no valid sketch, and no kernel reads it.

    Args:
        key_cache: [num_blocks, num_kv_heads, block_size, head_dim], the last dimension contiguous.
        sketch: see `check_sketch`, written.
        slot_mapping: [num_tokens] int64, block * block_size + offset; negative entries are padding.

    Raises:
        ValueError: the shapes do not belong together.
    """
    check_sketch(sketch, key_cache)
    check_slots(slot_mapping)
    _, num_kv_heads, block_size, head_dim = key_cache.shape
    if slot_mapping.shape[0] == 0:
        return
    _update_sketch_kernel[(slot_mapping.shape[0], num_kv_heads)](
        key_cache,
        *sketch,
        slot_mapping,
        *key_cache.stride()[:3],
        key_cache.stride(0) * key_cache.element_size(),
        HEAD_DIM=head_dim,
        DIM_PADDED=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        num_warps=4,
    )
