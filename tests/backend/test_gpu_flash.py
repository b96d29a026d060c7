"""The GPU backend on the CPU: prompts on vLLM's FlashAttention, whose library is a reference in
float64 here, and where they stay on Triton.
"""

import re
import sys
from dataclasses import fields, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")
pytest.importorskip("triton")

import gpu_engine  # noqa: E402
import torch  # noqa: E402
from flash_reference import flash_attn_varlen_func  # noqa: E402
from gpu_engine import (  # noqa: E402
    HEADS,
    NAMES,
    Batch,
    configure,
    make_builder,
    make_groups,
    make_layer,
    run_layer,
    stub_stock_kernels,
)
from triton_interpreter import needs_interpreter  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402
from vllm.v1.attention.backends import fa_utils, flash_attn  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

from vllm_toptheta.backend import gpu_stock  # noqa: E402
from vllm_toptheta.backend.gpu import TopThetaGPUBackend  # noqa: E402
from vllm_toptheta.backend.gpu_warmup import warm_up  # noqa: E402
from vllm_toptheta.testing.cases import error_budget  # noqa: E402

pytestmark = needs_interpreter

HOPPER, BLACKWELL, AMPERE, GEFORCE = (
    ((9, 0), {2, 3}),
    ((10, 0), {2, 4}),
    ((8, 0), {2}),
    ((12, 0), {2}),
)
Card = tuple[tuple[int, int], set[int]]


def pretend(monkeypatch: pytest.MonkeyPatch, card: Card, kind: str = "cuda") -> list[Any]:
    """Let vLLM believe in a card with FlashAttention of some versions; returns what it is called
    with.
    """
    capability, versions = card
    platform = SimpleNamespace(
        device_name=kind,
        is_cuda=lambda: kind == "cuda",
        is_rocm=lambda: kind == "rocm",
        is_xpu=lambda: False,
        get_device_capability=lambda: DeviceCapability(*capability),
        is_device_capability_family=lambda family: family == capability[0] * 10,
    )
    calls: list[Any] = []

    def noted(**arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return flash_attn_varlen_func(**arguments)

    for module in (gpu_stock, fa_utils, flash_attn):
        monkeypatch.setattr(module, "current_platform", platform)
    # vLLM's own package cannot be imported without its library.
    package = "vllm.vllm_flash_attn"
    interface = {
        "is_fa_version_supported": lambda version: version in versions,
        "fa_version_unsupported_reason": lambda version: "a test",
    }
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(
        sys.modules, package + ".flash_attn_interface", SimpleNamespace(**interface)
    )
    library = {
        "flash_attn_varlen_func": noted,
        "flash_attn_supports_sinks": fa_utils.flash_attn_supports_sinks,
        "is_flash_attn_varlen_func_available": lambda: True,
        "get_scheduler_metadata": lambda **arguments: torch.ones(3, dtype=torch.int32),
    }
    for name, function in library.items():
        monkeypatch.setattr(flash_attn, name, function, raising=False)
    return calls


def wrong(batch: Batch, output: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[num_tokens] bool: where an output is farther from float64 than rounding explains."""
    far = (output.double() - expected).abs() > 2 * error_budget(batch.case, expected)
    return (far | output.isnan()).flatten(1).any(1)


@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "card"),
    [(2, 64, HOPPER), (1, 128, BLACKWELL)],
    ids=["Hopper", "one kv head on Blackwell"],
)
def test_all_rows_of_a_batch_are_right(
    monkeypatch: pytest.MonkeyPatch, num_kv_heads: int, head_dim: int, card: Card
) -> None:
    """Drafts and prompts before and behind generated tokens, in layers with and without a window,
    over padded pages.
    """
    monkeypatch.setattr(gpu_engine, "KV_HEADS", num_kv_heads)
    monkeypatch.setattr(gpu_engine, "HEAD_DIM", head_dim)
    calls, triton = pretend(monkeypatch, card), stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(monkeypatch)
    batch = Batch([60, 30, 70, 50, 45], [4, 2, 1, 1, 9], [False, False, False, False, True])
    metadata = builder.build(0, batch.common())
    assert [tokens for tokens, _ in metadata.stock] == [slice(0, 6), slice(8, 17)]
    assert [part.max_query_len for _, part in metadata.stock] == [4, 9]
    others = (*range(6), *range(8, 17))
    for layer, impl in enumerate(impls[:2]):
        output = run_layer(impl, batch, metadata, batch.case.query)
        result = batch.check(layer, output, metadata.rows, excluded=others)
        assert not wrong(batch, output, result.out).any()
    assert not triton
    assert {call["fa_version"] for call in calls} == {max(card[1])}
    assert [call["window_size"] for call in calls] == [[-1, -1]] * 2 + [[39, 0]] * 2


def test_soft_caps_and_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, HOPPER)
    stub_stock_kernels(monkeypatch)
    config, sinks = configure(), torch.arange(HEADS, dtype=torch.bfloat16)
    layers = [
        make_layer(config, NAMES[0], sinks=sinks),
        make_layer(config, NAMES[1], logits_soft_cap=2.0),
    ]
    (group,), _ = make_groups(monkeypatch, config)
    batch = Batch([40, 23], [3, 23])
    metadata = group.get_metadata_builder().build(0, batch.common())
    plain, spec = batch.case, batch.case.spec
    cases = [replace(plain, sinks=sinks), replace(plain, spec=replace(spec, soft_cap=2.0))]
    for layer, batch.case in zip(layers, cases, strict=True):
        output = run_layer(layer.impl, batch, metadata, plain.query)
        expected = batch.expected(0, excluded=tuple(range(26))).out
        assert not wrong(batch, output, expected).any()


def test_parts_of_one_step_share_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's builder keeps a schedule in one tensor where it captures graphs."""
    pretend(monkeypatch, HOPPER)
    builder, _ = make_builder(monkeypatch)
    assert builder.flash.use_full_cuda_graph
    assert builder.flash.aot_schedule
    builder.flash.max_cudagraph_size = 16
    batch = Batch([60, 70, 45], [4, 1, 9])
    taken = []
    for _, part in builder.build(0, batch.common()).stock:
        assert part.max_num_splits == 0
        tensors = [getattr(part, field.name) for field in fields(part)]
        for tensor in (tensor for tensor in tensors if isinstance(tensor, torch.Tensor)):
            taken.append((tensor.data_ptr(), tensor.numel() * tensor.itemsize))
    taken.sort()
    for (begin, size), (following, _) in zip(taken, taken[1:], strict=False):
        assert begin + size <= following


def test_captured_graphs_never_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, HOPPER)
    builder, _ = make_builder(monkeypatch)
    monkeypatch.setattr(builder.flash, "build", lambda *args, **kwargs: pytest.fail("was built"))
    for queries in ([1, 1, 1], [1, 1, 0]):
        common = Batch([70, 33, 0][: len(queries)], queries).common()
        assert builder.build_for_cudagraph_capture(common).stock == []


def test_pruned_prompts_need_no_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, HOPPER)
    builder, impls = make_builder(monkeypatch, phases="both")
    assert builder.flash is None
    assert impls[0].flash is None


def test_a_start_tries_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not compile, or read our pages, fails there and not at the first prompt."""
    calls, _ = pretend(monkeypatch, BLACKWELL), stub_stock_kernels(monkeypatch)
    config = configure()
    layers = [make_layer(config, name) for name in NAMES]
    (group,), _ = make_groups(monkeypatch, config)
    warm_up(group.get_metadata_builder(), layers)
    assert [call["q"].shape for call in calls] == [(2, HEADS, 64)]


def test_another_card_gets_triton_and_a_line_that_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(
        gpu_stock.logger, "info_once", lambda text, *values: lines.append(text % values)
    )
    for card in (HOPPER, AMPERE):
        calls, triton = pretend(monkeypatch, card), stub_stock_kernels(monkeypatch)
        builder, impls = make_builder(monkeypatch)
        batch = Batch([45], [9])
        metadata = builder.build(0, batch.common())
        run_layer(impls[0], batch, metadata, batch.case.query)
        assert bool(calls) == (card == HOPPER)
        assert bool(triton) == (card == AMPERE)
    taken, left = lines
    assert "prompts run on vLLM's FlashAttention 3" in taken
    assert "prompts run on vLLM's Triton attention: vLLM has FlashAttention 2 here" in left


def layer_of(**changes: Any) -> Any:
    fields = {"sinks": None, "soft_cap": None, "window": None, "kv_cache_dtype": "auto"}
    return SimpleNamespace(**fields | changes)


def spec_of(**changes: Any) -> Any:
    sizes = {"block_size": 64, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    return TopThetaGPUBackend.customize_spec(FullAttentionSpec(**sizes | changes))


WIDE = spec_of(head_size=256, block_size=128)
FP8 = {"spec": spec_of(dtype=torch.uint8), "layer": layer_of(kv_cache_dtype="fp8")}


@pytest.mark.parametrize(
    ("card", "given", "expected"),
    [
        (HOPPER, {}, 3),
        (HOPPER, {"layer": layer_of(sinks=torch.zeros(4), soft_cap=8.0, window=40)}, 3),
        (BLACKWELL, {}, 4),
        (BLACKWELL, {"layer": layer_of(sinks=torch.zeros(4), window=40)}, 4),
        (HOPPER, {"kind": "rocm"}, "used on CUDA, this is rocm"),
        (HOPPER, {"kind": "cpu"}, "used on CUDA, this is cpu"),
        (HOPPER, FP8, "in the queries' torch.bfloat16, got torch.uint8"),
        (BLACKWELL, FP8, "in the queries' torch.bfloat16, got torch.uint8"),
        (HOPPER, {"spec": spec_of(dtype=torch.float16)}, "got torch.float16"),
        (AMPERE, {}, "FlashAttention 2 here"),
        (AMPERE, {"layer": layer_of(sinks=torch.zeros(4))}, "sinks? not supported"),
        (GEFORCE, {}, "FlashAttention 2 here"),
        (((9, 0), set()), {}, "no FlashAttention library"),
        (HOPPER, {"asked": 2}, "FlashAttention 2 here"),
        (HOPPER, {"spec": replace(WIDE, page_size_padded=WIDE.page_size_bytes + 8)}, "of 16 bytes"),
        (HOPPER, {"spec": WIDE}, 3),
        (BLACKWELL, {"spec": WIDE}, 4),
        (BLACKWELL, {"spec": WIDE, "layer": layer_of(soft_cap=8.0)}, "FlashAttention 2 here"),
        (BLACKWELL, {"spec": spec_of(head_size=256)}, r"pages of \[128\] tokens, got 64"),
        (
            BLACKWELL,
            {"spec": spec_of(head_size=256, block_size=256)},
            r"pages of \[128\] tokens, got 256; pass --block-size 128",
        ),
    ],
)
def test_what_prompts_run_on(
    monkeypatch: pytest.MonkeyPatch, card: Card, given: dict[str, Any], expected: int | str
) -> None:
    pretend(monkeypatch, card, given.get("kind", "cuda"))
    config = configure()
    config.attention_config.flash_attn_version = given.get("asked")
    layers, spec = [layer_of(), given.get("layer", layer_of())], given.get("spec", spec_of())
    with set_current_vllm_config(config):
        found = gpu_stock.flash_version(layers[::-1], spec, torch.bfloat16)
    if isinstance(expected, int):
        assert found == expected
    else:
        assert re.search(expected, str(found))


def test_pages_are_as_large_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure()
    monkeypatch.setattr(config.model_config, "get_head_size", lambda: 256)
    for card, size in ((HOPPER, 64), (BLACKWELL, 128)):
        pretend(monkeypatch, card)
        with set_current_vllm_config(config):
            assert TopThetaGPUBackend.get_preferred_block_size(16) == size
