"""Side data inside vLLM's pages: its memory is in the spec, and the parts of an allocated cache do
not overlap."""

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

import torch  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402
from vllm.v1.worker.utils import allocate_kv_cache  # noqa: E402

from vllm_toptheta.backend.cpu import TopThetaCPUBackend  # noqa: E402
from vllm_toptheta.backend.sidecar import check_page, enlarge_page, kernel_block_size  # noqa: E402
from vllm_toptheta.kernels.layout import PageLayout  # noqa: E402
from vllm_toptheta.kernels.sketch import page_views  # noqa: E402


def spec_of(**kwargs: Any) -> FullAttentionSpec:
    defaults = {"block_size": 128, "num_kv_heads": 3, "head_size": 64, "dtype": torch.bfloat16}
    return FullAttentionSpec(**{**defaults, **kwargs})


@pytest.mark.parametrize(("block_size", "share"), [(128, 1 / 128), (64, 1 / 128), (32, 1 / 64)])
def test_the_page_grows_by_one_v_row_per_group(block_size: int, share: float) -> None:
    plain = spec_of(block_size=block_size)
    enlarged = enlarge_page(plain)
    assert enlarged.page_size_bytes == plain.page_size_bytes * (1 + share)
    assert enlarge_page(enlarged) == enlarged
    check_page(enlarged, PageLayout(block_size, 64))


@pytest.mark.parametrize(
    ("dtype", "head_size", "share"),
    [
        (torch.bfloat16, 64, 0.27),
        (torch.bfloat16, 128, 0.265),
        (torch.float32, 64, 0.14),
        (torch.float32, 128, 0.14),
    ],
)
def test_a_sketch_takes_a_quarter_more(dtype: torch.dtype, head_size: int, share: float) -> None:
    plain = enlarge_page(spec_of(head_size=head_size, dtype=dtype))
    sketched = enlarge_page(spec_of(head_size=head_size, dtype=dtype), sketch=True)
    assert sketched.page_size_bytes / plain.page_size_bytes - 1 == pytest.approx(share, abs=0.01)
    check_page(sketched, PageLayout(128, head_size, sketch=dtype))


def test_a_block_that_changed_afterwards_is_refused_where_its_groups_are_smaller() -> None:
    spec = enlarge_page(spec_of(block_size=128))
    check_page(replace(spec, block_size=64), PageLayout(64, 64))
    with pytest.raises(ValueError, match="pages of 32 take 260 bytes.* --block-size 128"):
        check_page(replace(spec, block_size=32), PageLayout(32, 64))


def test_vllm_asks_for_windowed_layers_before_it_knows_their_block_size() -> None:
    spec = SlidingWindowSpec(
        block_size=1, num_kv_heads=3, head_size=64, dtype=torch.bfloat16, sliding_window=512
    )
    assert TopThetaCPUBackend.customize_spec(spec).state_content_size_bytes == (2 * 64 + 1) * 2


def test_k_and_v_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="64 and 32"):
        enlarge_page(spec_of(head_size_v=32))


@pytest.mark.parametrize("head_size", [64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_of_an_allocated_cache_do_not_overlap(head_size: int, dtype: torch.dtype) -> None:
    spec = enlarge_page(spec_of(head_size=head_size, dtype=dtype), sketch=True)
    layers, num_blocks = ["first", "second"], 5
    size = spec.page_size_bytes * num_blocks
    config = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[
            KVCacheTensor(
                size=2 * size, layers=layers, layer_stride=size, block_stride=spec.page_size_bytes
            )
        ],
        kv_cache_groups=[KVCacheGroupSpec(layers, spec)],
    )
    caches = allocate_kv_cache(config, torch.device("cpu"), KVCacheLayout.LBHNC)
    layout = PageLayout(spec.block_size, head_size, sketch=dtype)

    def parts() -> list[torch.Tensor]:
        parts = (layout.keys, layout.values, layout.v_means)
        found = [part(cache) for cache in caches.values() for part in parts]
        return found + [part for cache in caches.values() for part in page_views(cache, layout)]

    for number, part in enumerate(parts()):
        part.fill_(number)
    for number, part in enumerate(parts()):
        assert (part == number).all()


@pytest.mark.parametrize(
    ("block_size", "expected"),
    [(128, 128), (512, 512), (1152, 384), (960, 320), (544, 32), (1024, 512)],
)
def test_blocks_of_mamba_size_are_cut_for_the_kernels(block_size: int, expected: int) -> None:
    assert kernel_block_size(block_size) == expected
    spec = enlarge_page(spec_of(block_size=block_size))
    parts = spec.copy_with_new_block_size(expected)
    check_page(parts, PageLayout(expected, spec.head_size))
    assert spec.page_size_bytes == block_size // expected * parts.page_size_bytes


def test_a_block_without_such_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 528 tokens .* pass --block-size 128"):
        kernel_block_size(528)
