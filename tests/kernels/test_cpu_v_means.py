"""The V means of the CPU cache: always the mean of the rows a complete group holds."""

import math

import pytest
import torch
from cpu_cases import IMPLS
from torch import Tensor

from vllm_toptheta.kernels.api import PageLayout, update_v_means

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_BLOCKS, NUM_KV_HEADS = 5, 3


def empty_cache(layout: PageLayout, dtype: torch.dtype) -> Tensor:
    pages = (NUM_BLOCKS, NUM_KV_HEADS, layout.block_size, layout.content_elements)
    return torch.full(pages, math.nan, dtype=dtype)


def write(kv_cache: Tensor, layout: PageLayout, slots: Tensor, rows: Tensor, impl: str) -> None:
    """Put V rows into slots as a cache write does, then update the means."""
    real = slots >= 0
    block, offset = slots[real] // layout.block_size, slots[real] % layout.block_size
    layout.views(kv_cache).value_cache.transpose(1, 2)[block, offset] = rows[real].to(
        kv_cache.dtype
    )
    update_v_means(kv_cache, layout, slots, impl=impl)


def assert_means_are_right(kv_cache: Tensor, layout: PageLayout, complete: set[int]) -> None:
    """Recompute every mean; groups outside `complete` must be untouched (NaN)."""
    views = layout.views(kv_cache)
    rows = views.value_cache.double().unflatten(2, (-1, layout.group_size)).mean(3)
    per_block = layout.block_size // layout.group_size
    for group in range(NUM_BLOCKS * per_block):
        block, index = divmod(group, per_block)
        mean = views.v_means[block, :, index].double()
        if group not in complete:
            assert mean.isnan().all()
            continue
        eps = torch.finfo(kv_cache.dtype).eps
        torch.testing.assert_close(mean, rows[block, :, index], rtol=2 * eps, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 16, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [PageLayout(32, 80, 16), PageLayout(128, 64, 64)], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_means_follow_chunked_writes(
    impl: str, layout: PageLayout, dtype: torch.dtype, chunk: int
) -> None:
    kv_cache = empty_cache(layout, dtype)
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(NUM_BLOCKS, generator=generator)
    length = 4 * layout.block_size - 10
    position = torch.arange(length)
    slots = table[position // layout.block_size] * layout.block_size + position % layout.block_size
    rows = torch.randn(length, NUM_KV_HEADS, layout.head_dim, generator=generator)
    for part, row_part in zip(slots.split(chunk), rows.split(chunk), strict=True):
        write(kv_cache, layout, part, row_part, impl)
    full = slots[: length // layout.group_size * layout.group_size]
    assert_means_are_right(kv_cache, layout, set((full // layout.group_size).tolist()))


@pytest.mark.parametrize("impl", IMPLS)
def test_overwritten_groups_get_a_new_mean(impl: str) -> None:
    layout = PageLayout(32, 64, 16)
    kv_cache = empty_cache(layout, torch.bfloat16)
    for seed in range(2):
        rows = torch.randn(32, NUM_KV_HEADS, 64, generator=torch.Generator().manual_seed(seed))
        write(kv_cache, layout, torch.arange(32, 64), rows, impl)
        assert_means_are_right(kv_cache, layout, {2, 3})


@pytest.mark.parametrize("impl", IMPLS)
def test_padding_is_ignored(impl: str) -> None:
    layout = PageLayout(32, 64, 16)
    kv_cache = empty_cache(layout, torch.float32)
    slots = torch.cat([torch.tensor([-1, -17]), torch.arange(16), torch.tensor([-1])])
    write(kv_cache, layout, slots, torch.randn(slots.numel(), NUM_KV_HEADS, 64), impl)
    assert_means_are_right(kv_cache, layout, {0})
    update_v_means(kv_cache, layout, torch.empty(0, dtype=torch.int64), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_strided_cache_and_slot_mapping_work(impl: str) -> None:
    layout = PageLayout(32, 64, 16)
    both = empty_cache(layout, torch.float32).repeat(2, 1, 1, 1)
    kv_cache = both[::2]
    slots = torch.arange(64)[::2].contiguous().repeat_interleave(2)[::2]
    rows = torch.randn(32, NUM_KV_HEADS, 64)
    write(kv_cache, layout, torch.arange(32), rows, impl)
    assert_means_are_right(kv_cache, layout, {0, 1})
    assert slots.numel() == 32
    assert both[1::2].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_slot_outside_the_cache_is_refused(impl: str) -> None:
    layout = PageLayout(32, 64, 16)
    kv_cache = empty_cache(layout, torch.float32)
    with pytest.raises(ValueError, match="outside the KV cache"):
        update_v_means(kv_cache, layout, torch.tensor([NUM_BLOCKS * 32 + 31]), impl=impl)
