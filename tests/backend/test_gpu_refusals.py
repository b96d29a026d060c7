"""The GPU backend on the CPU: what it refuses, and how it is chosen."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")
pytest.importorskip("triton")

import torch  # noqa: E402
import vllm.platforms  # noqa: E402
from gpu_engine import (  # noqa: E402
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    NAMES,
    Batch,
    configure,
    make_builder,
    make_groups,
    make_layer,
)
from triton_interpreter import needs_interpreter  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.model_executor.layers.attention.chunked_local_attention import (  # noqa: E402
    create_chunked_local_attention_backend,
)
from vllm.v1.attention.backends.utils import create_fast_prefill_custom_backend  # noqa: E402
from vllm.v1.attention.selector import AttentionSelectorConfig  # noqa: E402
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402

from vllm_toptheta import registration  # noqa: E402
from vllm_toptheta.backend import gpu, sidecar, unsupported  # noqa: E402
from vllm_toptheta.backend.gpu import TopThetaGPUBackend, TopThetaGPUImpl  # noqa: E402
from vllm_toptheta.hooks import platform  # noqa: E402

pytestmark = needs_interpreter


def test_what_the_kernels_lack_is_refused() -> None:
    with pytest.raises(ValueError, match="ALiBi"):
        make_layer(configure(), alibi_slopes=[1.0] * HEADS)
    with (
        set_current_vllm_config(configure()),
        pytest.raises(ValueError, match="chunked attention"),
    ):
        TopThetaGPUImpl(HEADS, HEAD_DIM, 1.0, KV_HEADS, None, None, "auto", chunk_lookback=1)


@pytest.mark.parametrize(
    ("cache", "match"),
    [
        ({"cache_dtype": "fp8"}, "beside an fp8 KV cache.*drop --kv-cache-dtype"),
        ({"user_specified_block_size": True, "block_size": 96}, "pass --block-size 64"),
    ],
)
def test_a_sketch_of_k_is_refused_where_it_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, cache: dict[str, Any], match: str
) -> None:
    for module in (sidecar, unsupported):
        monkeypatch.setattr(module, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    for sketch in (True, False, "auto"):
        config = configure(k_sketch=sketch)
        for name, value in cache.items():
            setattr(config.cache_config, name, value)
        refused = pytest.raises(ValueError, match=match) if sketch is True else nullcontext()
        with refused:
            unsupported.check_engine(config)


def test_blocks_that_vllm_has_changed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="blocks of 16 and torch.bfloat16; set it to false"):
        make_builder(monkeypatch, k_sketch=True)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda backend: create_chunked_local_attention_backend(backend, 64),
        lambda backend: create_fast_prefill_custom_backend("FastPrefill", backend),
    ],
    ids=["chunked", "fast prefill"],
)
def test_layers_that_see_another_batch_are_refused(
    monkeypatch: pytest.MonkeyPatch, wrap: Any
) -> None:
    config = configure()
    for name in NAMES:
        make_layer(config, name, backend=wrap(TopThetaGPUBackend))
    with pytest.raises(ValueError, match="Builder, whose rows are not those of the batch"):
        make_groups(monkeypatch, config)


def test_layers_of_a_draft_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure()
    for name in NAMES:
        make_layer(config, name).is_draft_layer = True
    with pytest.raises(ValueError, match='"attention_backend": "TRITON_ATTN"'):
        make_groups(monkeypatch, config)


def test_heads_that_are_not_the_tables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure()
    for name in NAMES:
        make_layer(config, name, num_heads=HEADS // 2)
    with pytest.raises(ValueError, match="2 query heads on each of 1 ranks, the model has 4"):
        make_groups(monkeypatch, config)


def test_attention_to_later_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    builder, _ = make_builder(monkeypatch)
    common = Batch([70, 33], [1, 1]).common()
    for causal in (False, torch.tensor([True, False])):
        with pytest.raises(ValueError, match="earlier tokens only"):
            builder.build(0, common.replace(causal=causal))


def test_capability_flags_are_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "use_mla": False,
        "has_sink": True,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": None,
        "attn_type": "decoder",
        "has_sliding_window": True,
    }
    assert "need CUDA or ROCm" in TopThetaGPUBackend.validate_configuration(**fields)[0]
    monkeypatch.setattr(
        gpu, "current_platform", SimpleNamespace(is_cuda=lambda: True, is_rocm=lambda: False)
    )
    assert TopThetaGPUBackend.validate_configuration(**fields) == []
    for change in (
        {"head_size": 24},
        {"head_size": 576},
        {"dtype": torch.float32},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"kv_cache_dtype": "int8_per_token_head"},
        {"block_size": 8},
        {"use_mla": True},
        {"use_mm_prefix": True},
        {"attn_type": "encoder_decoder"},
        {"use_non_causal": True},
        {"use_batch_invariant": True},
        {"use_kv_connector": True},
        {"use_rswa": True},
        {"use_dcp": True},
        {"use_pcp": True},
        {"use_adaptive_verification": True},
        {"device_capability": (7, 5)},
    ):
        assert TopThetaGPUBackend.validate_configuration(**(fields | change)), change
    assert KVCacheLayout.LHBNC not in TopThetaGPUBackend.supported_kv_cache_layouts()


def test_blocks_hold_whole_groups_unless_asked_otherwise() -> None:
    assert TopThetaGPUBackend.get_preferred_block_size(16) == 64
    assert TopThetaGPUBackend.get_preferred_block_size(128) == 128
    assert TopThetaGPUBackend.supports_block_size(16)
    assert not TopThetaGPUBackend.supports_block_size(8)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "TopThetaGPUBackend"),
        ({"compensation": False}, "TopThetaGPUBareBackend"),
        ({"compensation": False, "phases": "both"}, "TopThetaGPUBackend"),
        ({"k_sketch": True}, "TopThetaGPUSketchBackend"),
    ],
)
def test_options_choose_the_class(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], name: str
) -> None:
    ours, another = registration.GPU_BACKEND_PATH, "another.Backend"

    class Platform:
        chosen = ours

        def is_cpu(self) -> bool:
            return False

        @classmethod
        def get_attn_backend_cls(
            cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
        ) -> str:
            return cls.chosen

    monkeypatch.setattr(vllm.platforms, "current_platform", Platform())
    platform.look_up().wrap()
    member = SimpleNamespace(
        name="TOPTHETA", get_path=lambda: ours, get_class=lambda: TopThetaGPUBackend
    )
    layer = AttentionSelectorConfig(64, torch.bfloat16, "auto", None)
    with set_current_vllm_config(configure(**options)):
        path = Platform.get_attn_backend_cls(member, attn_selector_config=layer, num_heads=4)
        assert path.rpartition(".")[2] == name
        Platform.chosen = another
        assert Platform.get_attn_backend_cls(member, layer) == another
        assert Platform.get_attn_backend_cls(None, layer) == another


def test_the_platform_chooses_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    assert registration.backend_path() == registration.CPU_BACKEND_PATH
    monkeypatch.setattr(vllm.platforms, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    assert resolve_obj_by_qualname(registration.backend_path()) is TopThetaGPUBackend
