"""What both attention kernels do with a tile of keys: K, V and means in the paged cache in, scores
and sums out.
"""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
GROUPS_PADDED = tl.constexpr(16)  # the smallest inner dimension of tl.dot


@triton.jit
def _tile_scores(
    query,
    key_ptr,
    block,
    offset,
    visible,
    scale,
    soft_cap,
    key_block_stride,
    key_slot_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    """Scores [rows, TILE] of one K tile; of keys that are not visible nothing is read."""
    dim = tl.arange(0, DIM_PADDED)
    pointers = (
        key_ptr
        + (block.to(tl.int64) * key_block_stride + offset * key_slot_stride)[None, :]
        + dim[:, None]
    )
    mask = visible[None, :]
    if HEAD_DIM != DIM_PADDED:
        mask = mask & (dim < HEAD_DIM)[:, None]
    key = tl.load(pointers, mask=mask, other=0.0)
    scores = tl.dot(query, key.to(query.dtype)) * scale
    if SOFT_CAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x)); exp may overflow to inf, which is the right limit.
        scores = soft_cap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2E / soft_cap))))
    return scores


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
def _sum_groups(lost, ROWS: tl.constexpr, GROUP_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Lost mass [ROWS, TILE] summed over groups of keys, [ROWS, GROUPS_PADDED].

    By masks: for a sum over one of three dimensions the compiler picks layouts that hold every
    element many times.
    """
    group = tl.arange(0, TILE) // GROUP_SIZE
    column = tl.arange(0, GROUPS_PADDED)
    lost_mass = tl.zeros([ROWS, GROUPS_PADDED], tl.float32)
    for index in tl.static_range(TILE // GROUP_SIZE):
        mass = tl.sum(tl.where((group == index)[None, :], lost, 0.0), 1)
        lost_mass = tl.where((column == index)[None, :], mass[:, None], lost_mass)
    return lost_mass


@triton.jit
def _add_group_means(
    acc,
    lost_mass,
    query,
    means_ptr,
    block_table_ptr,
    tile_start,
    begin,
    seq_len,
    means_block_stride,
    means_group_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add the lost mass [rows, GROUPS_PADDED] of every complete group times its stored mean V.

    Groups outside of [begin, seq_len) count as zero here; their mass is spread already.
    """
    NUM_GROUPS: tl.constexpr = TILE // GROUP_SIZE
    group = tl.arange(0, GROUPS_PADDED)
    start = tile_start + group * GROUP_SIZE
    complete = (group < NUM_GROUPS) & (start >= begin) & (start + GROUP_SIZE <= seq_len)
    block = tl.load(block_table_ptr + start // BLOCK_SIZE, mask=complete, other=0)
    means = _load_rows(
        means_ptr,
        block,
        (start % BLOCK_SIZE) // GROUP_SIZE,
        complete,
        means_block_stride,
        means_group_stride,
        HEAD_DIM,
        DIM_PADDED,
    )
    if query.dtype == tl.float16:
        # The mass that thousands of distant keys lose lies below float16's normal range.
        return tl.dot(lost_mass, means.to(tl.float32), acc, input_precision="tf32")
    return tl.dot(lost_mass.to(query.dtype), means.to(query.dtype), acc)
