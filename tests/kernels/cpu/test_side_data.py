"""The V means of the CPU cache: always the mean of the rows a complete group holds."""

import math

import pytest
import torch
from decode_calls import TARGETS
from torch import Tensor

from vllm_toptheta.kernels import ops
from vllm_toptheta.kernels.layout import PageLayout

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_BLOCKS, NUM_KV_HEADS = 5, 3


def empty_cache(layout: PageLayout, dtype: torch.dtype) -> Tensor:
    pages = (NUM_BLOCKS, NUM_KV_HEADS, layout.block_size, layout.content_elements)
    return torch.full(pages, math.nan, dtype=dtype)


def write(
    kv_cache: Tensor, layout: PageLayout, slots: Tensor, rows: Tensor, target: ops.Target
) -> None:
    """Put V rows into slots as a cache write does, then update the means."""
    real = slots >= 0
    block, offset = slots[real] // layout.block_size, slots[real] % layout.block_size
    layout.values(kv_cache).transpose(1, 2)[block, offset] = rows[real].to(kv_cache.dtype)
    ops.update_side_data(kv_cache, layout, slots, target=target)


def assert_means_are_right(kv_cache: Tensor, layout: PageLayout, complete: set[int]) -> None:
    """Recompute every mean; groups outside `complete` must be untouched (NaN)."""
    rows = layout.values(kv_cache).double().unflatten(2, (-1, layout.group_size)).mean(3)
    per_block = layout.block_size // layout.group_size
    for group in range(NUM_BLOCKS * per_block):
        block, index = divmod(group, per_block)
        mean = layout.v_means(kv_cache)[block, :, index].double()
        if group not in complete:
            assert mean.isnan().all()
            continue
        eps = torch.finfo(kv_cache.dtype).eps
        torch.testing.assert_close(mean, rows[block, :, index], rtol=2 * eps, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 16, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "layout", [PageLayout(48, 80), PageLayout(32, 64), PageLayout(128, 64)], ids=str
)
@pytest.mark.parametrize("target", TARGETS)
def test_means_follow_chunked_writes(
    target: ops.Target, layout: PageLayout, dtype: torch.dtype, chunk: int
) -> None:
    kv_cache = empty_cache(layout, dtype)
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(NUM_BLOCKS, generator=generator)
    length = 4 * layout.block_size - 10
    position = torch.arange(length)
    slots = table[position // layout.block_size] * layout.block_size + position % layout.block_size
    rows = torch.randn(length, NUM_KV_HEADS, layout.head_dim, generator=generator)
    for part, row_part in zip(slots.split(chunk), rows.split(chunk), strict=True):
        write(kv_cache, layout, part, row_part, target)
    full = slots[: length // layout.group_size * layout.group_size]
    assert_means_are_right(kv_cache, layout, set((full // layout.group_size).tolist()))


@pytest.mark.parametrize("target", TARGETS)
def test_overwritten_groups_get_a_new_mean(target: ops.Target) -> None:
    layout = PageLayout(48, 64)
    kv_cache = empty_cache(layout, torch.bfloat16)
    for seed in range(2):
        rows = torch.randn(32, NUM_KV_HEADS, 64, generator=torch.Generator().manual_seed(seed))
        write(kv_cache, layout, torch.arange(32, 64), rows, target)
        assert_means_are_right(kv_cache, layout, {2, 3})


@pytest.mark.parametrize("target", TARGETS)
def test_padding_is_ignored(target: ops.Target) -> None:
    layout = PageLayout(48, 64)
    kv_cache = empty_cache(layout, torch.float32)
    slots = torch.cat([torch.tensor([-1, -17]), torch.arange(16), torch.tensor([-1])])
    write(kv_cache, layout, slots, torch.randn(slots.numel(), NUM_KV_HEADS, 64), target)
    assert_means_are_right(kv_cache, layout, {0})
    ops.update_side_data(kv_cache, layout, torch.empty(0, dtype=torch.int64), target=target)


@pytest.mark.parametrize("target", TARGETS)
def test_a_strided_cache_and_slot_mapping_work(target: ops.Target) -> None:
    layout = PageLayout(48, 64)
    both = empty_cache(layout, torch.float32).repeat(2, 1, 1, 1)
    kv_cache = both[::2]
    rows = torch.randn(32, NUM_KV_HEADS, 64)
    write(kv_cache, layout, torch.arange(32), rows, target)
    assert_means_are_right(kv_cache, layout, {0, 1})
    assert both[1::2].isnan().all()


@pytest.mark.parametrize("target", TARGETS)
def test_a_slot_outside_the_cache_is_refused(target: ops.Target) -> None:
    layout = PageLayout(48, 64)
    kv_cache = empty_cache(layout, torch.float32)
    with pytest.raises(ValueError, match="outside the KV cache"):
        ops.update_side_data(kv_cache, layout, torch.tensor([NUM_BLOCKS * 48 + 15]), target=target)
