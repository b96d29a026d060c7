"""What every attention kernel does with a tile of keys in the paged cache."""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
GROUPS_PADDED = tl.constexpr(16)  # the smallest inner dimension of tl.dot


@triton.jit
def _fit_query(query, scale, key_ptr):
    """The query as the cache wants it, and its factor on q.k, a number or [rows, 1].

    float8 becomes float16 in one instruction and exactly, bfloat16 in two. (Not so the other float8
    of MI300, where float16 takes more registers.) bfloat16 has a wider range than float16, so each
    row is brought to a largest element of 1 to 2 by a power of 2: what a query in bfloat16 loses is
    below 2**-24 of its largest element.
    """
    if key_ptr.dtype.element_ty == tl.float8e4nv:
        wide = query.to(tl.float32)
        bits = tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) & 0x7F800000
        bits = tl.where(bits == 0, 127 << 23, tl.minimum(bits, 253 << 23))
        inverse = ((254 << 23) - bits).to(tl.float32, bitcast=True)
        scale = (scale * bits.to(tl.float32, bitcast=True))[:, None]
        query = (wide * inverse[:, None]).to(tl.float16)
    return query, scale


@triton.jit
def _cap(scores, soft_cap, SOFT_CAP: tl.constexpr):
    """Scores as exponents of 2, capped where SOFT_CAP; soft_cap is in natural units."""
    if SOFT_CAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)); exp may overflow to inf, which is the right limit.
        scores = (soft_cap * LOG2E) * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 / soft_cap))))
    return scores


@triton.jit
def _load_columns(
    pointer,
    block,
    offset,
    rows,
    block_stride,
    slot_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """Rows of K, or of its sketch, as columns [DIM_PADDED, num]; only `rows` are read."""
    dim = tl.arange(0, DIM_PADDED)
    pointers = (
        pointer + (block.to(tl.int64) * block_stride + offset * slot_stride)[None, :] + dim[:, None]
    )
    mask = rows[None, :]
    if HEAD_DIM != DIM_PADDED:
        mask = mask & (dim < HEAD_DIM)[:, None]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _log2_scores(
    query,
    key_ptr,
    block,
    offset,
    rows,
    scale,
    soft_cap,
    key_block_stride,
    key_slot_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Scores [num_rows, TILE] of one K tile as exponents of 2; of keys outside of `rows` nothing is
    read.

    Args:
        query, scale: from `_fit_query`; scale is the factor on q.k, times LOG2E.
        block, offset: [TILE], where the keys are.
        rows: [TILE] bool.
        soft_cap: in natural units.
    """
    key = _load_columns(
        key_ptr, block, offset, rows, key_block_stride, key_slot_stride, HEAD_DIM, DIM_PADDED
    )
    return _cap(tl.dot(query, key.to(query.dtype)) * scale, soft_cap, SOFT_CAP)


@triton.jit
def _load_rows(
    pointer,
    block,
    offset,
    rows,
    block_stride,
    slot_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):
    """Rows [num, DIM_PADDED] of V or of the means; a row that is masked off causes no memory
    traffic.
    """
    dim = tl.arange(0, DIM_PADDED)
    pointers = (
        pointer + (block.to(tl.int64) * block_stride + offset * slot_stride)[:, None] + dim[None, :]
    )
    mask = rows[:, None]
    if HEAD_DIM != DIM_PADDED:
        mask = mask & (dim < HEAD_DIM)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _sum_groups(mass, ROWS: tl.constexpr, GROUP_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Mass [ROWS, TILE] summed over groups of keys, [ROWS, GROUPS_PADDED].

    By masks: for a sum over one of three dimensions the compiler picks layouts that hold every
    element many times.
    """
    group = tl.arange(0, TILE) // GROUP_SIZE
    column = tl.arange(0, GROUPS_PADDED)
    sums = tl.zeros([ROWS, GROUPS_PADDED], tl.float32)
    for index in tl.static_range(TILE // GROUP_SIZE):
        of_group = tl.sum(tl.where((group == index)[None, :], mass, 0.0), 1)
        sums = tl.where((column == index)[None, :], of_group[:, None], sums)
    return sums


@triton.jit
def _dot_means(weights, means, acc):
    """acc [rows, DIM_PADDED] plus weights [rows, GROUPS_PADDED] times means."""
    if means.dtype == tl.float16:
        # The mass that thousands of distant keys lose lies below float16's normal range.
        return tl.dot(weights, means.to(tl.float32), acc, input_precision="tf32")
    return tl.dot(weights.to(means.dtype), means, acc)
