"""V means behind K and V of vLLM's GPU pages: in every layout, and where layers differ."""

import gc
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")
pytest.importorskip("triton")

import torch  # noqa: E402
from gpu_engine import (  # noqa: E402
    BLOCK,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    NAMES,
    WINDOWS,
    Batch,
    configure,
    make_groups,
    make_layer,
    stub_stock_kernels,
)
from kv_cache_planning import (  # noqa: E402
    unify_hybrid_kv_cache_specs,
    unify_kv_cache_spec_page_size,
)
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from triton_interpreter import needs_interpreter  # noqa: E402
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402
from vllm.v1.worker.gpu.attn_utils import init_kv_cache  # noqa: E402
from vllm.v1.worker.utils import allocate_kv_cache, clear_layer_kv_caches  # noqa: E402

from vllm_toptheta.backend.gpu import TopThetaGPUBackend, TopThetaGPUBareBackend  # noqa: E402
from vllm_toptheta.backend.gpu_stock import why_pages_do_not_suit  # noqa: E402
from vllm_toptheta.backend.sidecar import (  # noqa: E402
    check_room,
    pad_page,
    sketch_view,
    v_means_view,
)
from vllm_toptheta.kernels.triton.sketch import check_sketch  # noqa: E402

LAYERS = ["first", "second"]
NUM_BLOCKS = 4


def spec_of(kind: Any = FullAttentionSpec, **changes: Any) -> Any:
    fields = {"block_size": 16, "num_kv_heads": 3, "head_size": 80, "dtype": torch.bfloat16}
    return kind(**(fields | changes))


def allocate(spec: Any, layout: KVCacheLayout) -> list[torch.Tensor]:
    page = spec.page_size_bytes
    total = page * NUM_BLOCKS * len(LAYERS)
    outermost = layout.is_block_outermost
    tensor = KVCacheTensor(
        size=total,
        layers=LAYERS,
        layer_stride=page if outermost else page * NUM_BLOCKS,
        block_stride=page * len(LAYERS) if outermost else page,
    )
    config = KVCacheConfig(
        num_blocks=NUM_BLOCKS,
        kv_cache_tensors=[tensor],
        kv_cache_groups=[KVCacheGroupSpec(LAYERS, spec)],
    )
    return list(allocate_kv_cache(config, torch.device("cpu"), layout).values())


@pytest.mark.parametrize("layout", TopThetaGPUBackend.supported_kv_cache_layouts(), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("block_size", "groups"), [(16, 1), (96, 3), (64, 1), (128, 2)])
def test_parts_of_a_page_do_not_overlap(
    layout: KVCacheLayout, dtype: torch.dtype, block_size: int, groups: int
) -> None:
    spec = pad_page(spec_of(block_size=block_size, dtype=dtype))
    caches = allocate(spec, layout)
    parts = [part for cache in caches for part in (cache, v_means_view(cache, torch.bfloat16))]
    assert parts[1].shape == (NUM_BLOCKS, 3, groups, 80)
    assert all(part.data_ptr() % 16 == 0 for part in parts), "rows would not load in one piece"
    for number, part in enumerate(parts, 1):
        part.fill_(number)
    for number, part in enumerate(parts, 1):
        assert (part == number).all()


@pytest.mark.parametrize("layout", TopThetaGPUBackend.supported_kv_cache_layouts(), ids=str)
@pytest.mark.parametrize("block_size", [64, 128])
def test_a_sketch_lies_behind_the_means(layout: KVCacheLayout, block_size: int) -> None:
    spec = pad_page(spec_of(block_size=block_size), sketch=True)
    check_room(spec, sketch=True)
    caches = allocate(spec, layout)
    parts = [
        part
        for cache in caches
        for part in (cache, v_means_view(cache, torch.bfloat16), *sketch_view(cache))
    ]
    groups = block_size // 64
    assert parts[2].shape == (NUM_BLOCKS, 3, groups, 64, 80)
    assert parts[2].data_ptr() % 16 == 0, "codes would not load in one piece"
    check_sketch(sketch_view(caches[0]), caches[0][..., :80])
    for number, part in enumerate(parts, 1):
        part.fill_(number)
    for number, part in enumerate(parts, 1):
        assert (part == number).all()
    plain = pad_page(spec_of(block_size=block_size))
    assert spec.page_size_bytes / plain.page_size_bytes == pytest.approx(1.26, abs=0.01)


@pytest.mark.parametrize("layout", TopThetaGPUBackend.supported_kv_cache_layouts(), ids=str)
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_flash_attention_gets_the_pages_whose_parts_are_aligned(
    layout: KVCacheLayout, num_kv_heads: int
) -> None:
    """All addresses and strides of K and V, as vLLM allocates them and FlashAttention sees them."""
    plain = pad_page(spec_of(num_kv_heads=num_kv_heads))
    for more in (0, 2, 8, 16, 24, 160):
        spec = replace(plain, page_size_padded=plain.page_size_bytes + more)
        sizes = []
        for cache in allocate(spec, layout):
            for part in cache.transpose(1, 2).split(spec.head_size, dim=-1):
                part = canonicalize_singleton_dim_strides(part)
                sizes += [part.data_ptr(), *(2 * stride for stride in part.stride()[:-1])]
        problem = why_pages_do_not_suit(spec)
        assert (problem is None) == (more % 16 == 0) == all(size % 16 == 0 for size in sizes)


def test_its_memory_is_in_the_page() -> None:
    plain = spec_of(block_size=128, head_size=128, num_kv_heads=8)
    padded = pad_page(plain)
    assert padded.page_size_bytes == plain.page_size_bytes * (1 + 1 / 128) + 128
    assert pad_page(padded) == padded
    assert padded.real_page_size_bytes == plain.page_size_bytes


def test_a_question_about_one_token_gets_the_plain_answer() -> None:
    plain = spec_of(block_size=1)
    assert pad_page(plain) is plain


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size must be a multiple of 16, got 8"):
        pad_page(spec_of(block_size=8))
    for customize in (pad_page, TopThetaGPUBareBackend.customize_spec):
        with pytest.raises(ValueError, match="K and V of one width"):
            customize(spec_of(head_size_v=64))
        with pytest.raises(ValueError, match="kv-cache-dtype"):
            customize(spec_of(state_content_bytes=300))
    unpadded = allocate(spec_of(), KVCacheLayout.LBNHC)
    with pytest.raises(RuntimeError, match="has no room for V means"):
        v_means_view(unpadded[0], torch.bfloat16)
    scattered = torch.zeros(3, 4, 16, 160).transpose(0, 1)
    with pytest.raises(RuntimeError, match="VLLM_KV_CACHE_LAYOUT"):
        v_means_view(scattered, torch.bfloat16)


@pytest.mark.parametrize("kv_heads", [(8, 4), (8, 2), (6, 4)])
def test_layers_of_different_pages_come_to_one_size(kv_heads: tuple[int, int]) -> None:
    """vLLM must pad the smaller page, not scale its block, which padded pages forbid."""
    specs = {
        "full": pad_page(spec_of(num_kv_heads=kv_heads[0])),
        "window": pad_page(
            spec_of(SlidingWindowSpec, num_kv_heads=kv_heads[1], sliding_window=128)
        ),
    }
    unified = unify_kv_cache_spec_page_size(specs)
    assert len({spec.page_size_bytes for spec in unified.values()}) == 1
    assert unified["window"].block_size == 16
    for spec in unified.values():
        cache = allocate(spec, KVCacheLayout.LBNHC)[1]
        v_means_view(cache, torch.bfloat16).fill_(1)
        assert (cache == 0).all()


@pytest.mark.parametrize("mamba_elements", [1000, 30000])
def test_hybrid_models_with_mamba_layers(mamba_elements: int) -> None:
    attention = pad_page(spec_of())
    mamba = MambaSpec(shapes=((mamba_elements,),), dtypes=(torch.bfloat16,), block_size=16)
    unified = unify_kv_cache_spec_page_size({"attention": attention, "mamba": mamba})
    assert len({spec.page_size_bytes for spec in unified.values()}) == 1
    cache = allocate(unified["attention"], KVCacheLayout.LBNHC)[0]
    assert v_means_view(cache, torch.bfloat16).shape == (NUM_BLOCKS, 3, 1, 80)


def test_layers_of_other_backends_keep_their_pages() -> None:
    ours, other = pad_page(spec_of()), spec_of(num_kv_heads=6)
    unified = unify_kv_cache_spec_page_size({"ours": ours, "other": other})
    assert unified["ours"].page_size_bytes == unified["other"].page_size_bytes
    assert unified["ours"].block_size == unified["other"].block_size == 16


@pytest.mark.parametrize("layout", TopThetaGPUBackend.supported_kv_cache_layouts(), ids=str)
@pytest.mark.parametrize("hybrid_manager", [True, False])
@pytest.mark.parametrize("unquantised", [None, "0", "sliding_window"])
def test_layers_of_one_engine_do_not_overlap(
    monkeypatch: pytest.MonkeyPatch,
    layout: KVCacheLayout,
    hybrid_manager: bool,
    unquantised: str | None,
) -> None:
    """Full and windowed layers, and quantised ones beside others, as vLLM groups and allocates."""
    config = configure()
    config.scheduler_config.disable_hybrid_kv_cache_manager = not hybrid_manager
    options = config.cache_config
    options.kv_cache_layout = layout.name
    if unquantised is not None:
        options.cache_dtype, options.block_size = "fp8", 2 * BLOCK
        options.kv_cache_dtype_skip_layers = [unquantised]
    for name, window in zip(NAMES, WINDOWS, strict=True):
        make_layer(config, name, window)
    _, cache = make_groups(monkeypatch, config)
    sizes = [group.kv_cache_spec.block_size for group in cache.kv_cache_groups]
    layers = config.compilation_config.static_forward_context
    init_kv_cache(layers, cache, torch.device("cpu"), sizes, config)
    # Groups lie over each other: a block belongs to one of them.
    for group in cache.kv_cache_groups:
        parts = []
        for layer in (layers[name] for name in group.layer_names):
            kv = layer.kv_cache
            means = v_means_view(kv, torch.bfloat16)
            parts += [kv if kv.dtype == torch.bfloat16 else kv.view(torch.uint8), means]
        for number, part in enumerate(parts, 1):
            part.fill_(number)
        for number, part in enumerate(parts, 1):
            assert (part == number).all()


def test_a_promoted_window_layer_without_room_is_refused() -> None:
    """Without vLLM's hybrid manager windowed layers take the block size of the others, and their
    pages keep their size.
    """
    specs = {
        "full": pad_page(spec_of(block_size=256)),
        "window": pad_page(spec_of(SlidingWindowSpec, block_size=64, sliding_window=128)),
    }
    for spec in specs.values():
        check_room(spec)
    unify_hybrid_kv_cache_specs(specs)
    assert specs["window"].block_size == 256
    with pytest.raises(ValueError, match="pages of 256 tokens have .* need .*backend_per_kind"):
        check_room(specs["window"])


@needs_interpreter
def test_a_cache_that_vllm_lets_go_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM captures graphs on a temporary cache first; whoever holds a view of it holds its memory
    while the real one is allocated.
    """
    stub_stock_kernels(monkeypatch)
    config = configure()
    layers = [make_layer(config, name) for name in NAMES]
    groups, cache = make_groups(monkeypatch, config, num_blocks=8)
    everything = config.compilation_config.static_forward_context
    caches = init_kv_cache(everything, cache, torch.device("cpu"), [BLOCK], config)
    storage = StorageWeakRef(layers[0].kv_cache.untyped_storage())
    common = Batch([20, 33], [1, 1]).common()
    metadata = groups[0].get_metadata_builder().build(0, common)
    key = torch.zeros(2, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    query = torch.zeros(2, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    for layer in layers:
        layer.impl.do_kv_cache_update(layer, key, key, layer.kv_cache, torch.tensor([15, 31]))
        layer.impl.forward(layer, query, key, key, layer.kv_cache, metadata, query.clone())
    assert not storage.expired()
    caches.clear()
    clear_layer_kv_caches(everything.values())
    gc.collect()
    assert storage.expired()
