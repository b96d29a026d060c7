"""Side data inside vLLM's pages: its memory is in the spec, and the parts of an allocated cache do
not overlap."""

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
from vllm_toptheta.backend.sidecar import enlarge_page  # noqa: E402
from vllm_toptheta.kernels.api import PageLayout  # noqa: E402


def spec_of(**kwargs: Any) -> FullAttentionSpec:
    defaults = {"block_size": 128, "num_kv_heads": 3, "head_size": 64, "dtype": torch.bfloat16}
    return FullAttentionSpec(**{**defaults, **kwargs})


@pytest.mark.parametrize(("group_size", "share"), [(16, 1 / 32), (64, 1 / 128)])
def test_the_page_grows_by_one_v_row_per_group(group_size: int, share: float) -> None:
    plain = spec_of()
    enlarged = enlarge_page(plain, group_size)
    assert enlarged.page_size_bytes == plain.page_size_bytes * (1 + share)
    assert enlarge_page(enlarged, group_size) == enlarged


def test_vllm_asks_for_windowed_layers_before_it_knows_their_block_size() -> None:
    spec = SlidingWindowSpec(
        block_size=1, num_kv_heads=3, head_size=64, dtype=torch.bfloat16, sliding_window=512
    )
    assert TopThetaCPUBackend.customize_spec(spec).state_content_size_bytes == (2 * 64 + 4) * 2


def test_k_and_v_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="64 and 32"):
        enlarge_page(spec_of(head_size_v=32), 16)


@pytest.mark.parametrize("head_size", [64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_of_an_allocated_cache_do_not_overlap(head_size: int, dtype: torch.dtype) -> None:
    spec = enlarge_page(spec_of(head_size=head_size, dtype=dtype), 32)
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
    layout = PageLayout(spec.block_size, head_size, 32)

    def parts() -> list[torch.Tensor]:
        views = [layout.views(cache) for cache in caches.values()]
        return [part for view in views for part in (view.key_cache, view.value_cache, view.v_means)]

    for number, part in enumerate(parts()):
        part.fill_(number)
    for number, part in enumerate(parts()):
        assert (part == number).all()
