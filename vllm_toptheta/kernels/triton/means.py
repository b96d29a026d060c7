"""The stored mean V of every complete group of tokens."""

# Arguments of jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from vllm_toptheta.kernels.layout import group_size_of
from vllm_toptheta.kernels.triton.checks import check_means, check_slots


# What varies from step to step, or between layers, is not specialised: a new value would mean a
# new binary while requests wait.
@triton.jit(
    do_not_specialize_on_alignment=["slot_mapping_ptr"],
)
def _update_v_means_kernel(
    value_ptr,
    means_ptr,
    slot_mapping_ptr,
    value_block_stride,
    value_head_stride,
    value_slot_stride,
    means_block_stride,
    means_head_stride,
    means_group_stride,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    slot = tl.load(slot_mapping_ptr + tl.program_id(0))
    if (slot < 0) | (slot % GROUP_SIZE != GROUP_SIZE - 1):
        return
    kv_head = tl.program_id(1).to(tl.int64)
    block = (slot // BLOCK_SIZE).to(tl.int64)
    first = (slot % BLOCK_SIZE) // GROUP_SIZE * GROUP_SIZE
    row = tl.arange(0, 16)
    dim = tl.arange(0, DIM_PADDED)
    value_ptr += block * value_block_stride + kv_head * value_head_stride
    total = tl.zeros([DIM_PADDED], tl.float32)
    for start in range(0, GROUP_SIZE, 16):
        values = tl.load(
            value_ptr + ((first + start + row) * value_slot_stride)[:, None] + dim[None, :],
            mask=(dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        total += tl.sum(values.to(tl.float32), 0)
    mean = total / GROUP_SIZE
    tl.store(
        means_ptr
        + block * means_block_stride
        + kv_head * means_head_stride
        + first // GROUP_SIZE * means_group_stride
        + dim,
        mean.to(means_ptr.dtype.element_ty),
        mask=dim < HEAD_DIM,
    )


def update_v_means(value_cache: Tensor, v_means: Tensor, slot_mapping: Tensor) -> None:
    """Store the mean V of every group whose last slot is in `slot_mapping`.

    Call it after each write to the cache, with the slots that were written. A group that is not
    complete has no valid mean, and no kernel reads it. Quantised values are averaged as they are
    stored, before v_scale.

    Args:
        value_cache: [num_blocks, num_kv_heads, block_size, head_dim], the last dimension
            contiguous.
        v_means: [num_blocks, num_kv_heads, block_size // group_size, head_dim], written.
        slot_mapping: [num_tokens] int64, block * block_size + offset; negative entries are padding.

    Raises:
        ValueError: the shapes do not belong together.
    """
    _, num_kv_heads, block_size, head_dim = value_cache.shape
    check_means(v_means, value_cache, v_means.dtype)
    check_slots(slot_mapping)
    if slot_mapping.shape[0] == 0:
        return
    _update_v_means_kernel[(slot_mapping.shape[0], num_kv_heads)](
        value_cache,
        v_means,
        slot_mapping,
        *value_cache.stride()[:3],
        *v_means.stride()[:3],
        HEAD_DIM=head_dim,
        DIM_PADDED=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        GROUP_SIZE=group_size_of(block_size),
        num_warps=2,
    )
