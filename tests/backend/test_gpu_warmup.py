"""The GPU backend's warm-up: it launches what serving launches."""

from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")
pytest.importorskip("triton")

import gpu_engine  # noqa: E402
import torch  # noqa: E402
from gpu_engine import (  # noqa: E402
    HEAD_DIM,
    HEADS,
    NAMES,
    Batch,
    Launches,
    configure,
    make_groups,
    make_layer,
    recorded_build,
    run_layer,
    stub_stock_kernels,
)
from triton_interpreter import needs_interpreter  # noqa: E402

from vllm_toptheta.backend.gpu import TopThetaGPUBackend, TopThetaGPUSketchBackend  # noqa: E402
from vllm_toptheta.backend.gpu_warmup import warm_up  # noqa: E402
from vllm_toptheta.kernels.triton import counts, decode, means, prefill, sketch  # noqa: E402

pytestmark = needs_interpreter

KERNELS = {
    name: module
    for module in (counts, sketch, means, prefill, decode)
    for name in vars(module)
    if name.endswith("_kernel")
}


def constants(monkeypatch: pytest.MonkeyPatch, run: Any) -> dict[str, set[Any]]:
    """The constants, and the arguments that are left out, of every kernel that `run` launches."""
    launches = {name: Launches() for name in KERNELS}
    with monkeypatch.context() as patch:
        for name, module in KERNELS.items():
            patch.setattr(module, name, launches[name])
        run()
    return {
        name: {
            (*sorted(kwargs.items()), *(place for place, arg in enumerate(args) if arg is None))
            for _, args, kwargs in launch.calls
        }
        for name, launch in launches.items()
        if launch.calls
    }


def test_its_row_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_stock_kernels(monkeypatch)
    config = configure()
    layer = make_layer(config)
    (group,), _ = make_groups(monkeypatch, config)
    builder = group.get_metadata_builder()
    warm_up(builder, [layer])
    assert not builder.heads.sums.any()


@pytest.mark.parametrize(
    ("options", "without"),
    [
        ({"phases": "decode"}, {"_prefill_kernel", "_centres_kernel", "_update_sketch_kernel"}),
        ({"phases": "both"}, {"_centres_kernel", "_update_sketch_kernel"}),
        ({"phases": "both", "k_sketch": True}, set()),
    ],
    ids=["decode", "both", "sketch"],
)
def test_every_kernel_of_a_step_is_compiled_before(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], without: set[str]
) -> None:
    stub_stock_kernels(monkeypatch)
    backend = TopThetaGPUBackend
    if "k_sketch" in options:
        monkeypatch.setattr(gpu_engine, "BLOCK", 64)
        backend = TopThetaGPUSketchBackend
    config = configure(**options)
    layers = [
        make_layer(config, NAMES[0]),
        make_layer(config, NAMES[1], sinks=torch.zeros(HEADS)),
        make_layer(config, NAMES[2], logits_soft_cap=30.0),
    ]
    (group,), _ = make_groups(monkeypatch, config)
    builder = group.get_metadata_builder()
    compiled = constants(monkeypatch, lambda: warm_up(builder, layers))

    def serve() -> None:
        for queries in ([1, 1, 1], [1, 1, 40], [40, 30]):
            batch = Batch([70] * len(queries), queries, backend=backend)
            metadata, step = recorded_build(builder, batch.common())
            query = torch.zeros(sum(queries), HEADS, HEAD_DIM, dtype=torch.bfloat16)
            for layer in layers:
                run_layer(layer.impl, batch, metadata, query)
            step.totals()

    served = constants(monkeypatch, serve)
    assert set(served) == set(KERNELS) - without
    assert compiled == served
