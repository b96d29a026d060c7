"""The GPU backend on the CPU: what a step counts."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")
pytest.importorskip("triton")

import torch  # noqa: E402
from gpu_engine import (  # noqa: E402
    HEADS,
    KV_HEADS,
    Batch,
    make_builder,
    named_totals,
    recorded_build,
    run_layer,
    stub_stock_kernels,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton_interpreter import needs_interpreter  # noqa: E402

from vllm_toptheta.backend import counts as counts_module  # noqa: E402
from vllm_toptheta.backend import step  # noqa: E402
from vllm_toptheta.backend.heads import toptheta_heads  # noqa: E402
from vllm_toptheta.kernels.columns import COLUMNS, MASS_UNIT  # noqa: E402

pytestmark = needs_interpreter

GROUP = HEADS // KV_HEADS


def test_totals_count_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(monkeypatch)
    batch = Batch([70, 33, 15, 50, 40], [1, 1, 1, 1, 5], [False, False, False, True, True])
    metadata, counts = recorded_build(builder, batch.common())
    lists, lifted = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    mass, kept_by_layer, mass_by_layer = torch.zeros(4), [], []
    for layer, impl in enumerate(impls):
        output = run_layer(impl, batch, metadata, batch.case.query)
        result = batch.check(layer, output, metadata.rows, excluded=(3,))
        lists += result.num_kept[:4].sum(1)
        lifted += (result.lifts[:4] > 0).sum(1) * GROUP
        mass += result.kept_mass[:4].sum(1)
        # The fourth is a prompt's.
        kept_by_layer.append(result.num_kept[:3].sum(0).tolist())
        mass_by_layer.append(result.kept_mass[:3].sum(0))
    totals = named_totals(counts)
    for seq, visible in enumerate([70 + 40 + 70, 33 * 3, 15 * 3]):
        assert totals[seq]["rows"] == 3 * HEADS
        assert totals[seq]["keys_scored"] == visible * HEADS
        assert totals[seq]["v_rows_scored"] == visible * KV_HEADS
        assert totals[seq]["keys_kept"] == totals[seq]["keys_dense"] == lists[seq] * GROUP
        assert totals[seq]["v_rows_read"] == lists[seq]
        assert totals[seq]["rows_lifted"] == lifted[seq]
        assert totals[seq]["kept_mass"] == pytest.approx(float(mass[seq]) * MASS_UNIT, rel=1e-5)
        assert totals[seq]["dense_layer"] == HEADS
        assert totals[seq]["dense_short"] == (2 * HEADS if seq == 2 else 0)
        assert totals[seq]["dense_prefill"] == 0
    assert lifted.any()
    assert totals[3] == dict.fromkeys(COLUMNS, 0) | {"dense_prefill": 3 * HEADS}
    assert totals[4] == dict.fromkeys(COLUMNS, 0) | {"dense_prefill": 5 * 3 * HEADS}
    (heads,) = toptheta_heads(SimpleNamespace(vllm_config=builder.vllm_config))
    assert (heads["layers"], heads["first_head"], heads["rows"]) == ([0, 1, 2], 0, [3] * 3)
    assert heads["kept"] == kept_by_layer
    assert heads["scored"] == [[n] * KV_HEADS for n in (70 + 33 + 15, 40 + 33 + 15, 70 + 33 + 15)]
    for shown, wanted in zip(heads["kept_mass"], mass_by_layer, strict=True):
        assert shown == pytest.approx(wanted.tolist(), rel=1e-5)
    for name in COLUMNS:
        by_request, by_layer = totals[:5], totals[5:]
        assert sum(row[name] for row in by_request) == sum(row[name] for row in by_layer)


def test_totals_are_summed_over_ranks_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_stock_kernels(monkeypatch)
    builder, _ = make_builder(monkeypatch)
    _, counts = recorded_build(builder, Batch([70, 40], [1, 5]).common())
    alone = counts.totals()
    group = SimpleNamespace(world_size=2, device_group="devices")
    monkeypatch.setattr(counts_module, "get_tp_group", lambda: group)

    def all_reduce(tensor: torch.Tensor, group: str) -> None:
        assert group == "devices"
        tensor.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert torch.equal(counts.totals(), 2 * alone)
    assert alone.any()


def test_totals_are_few_launches_and_never_wait_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stub_stock_kernels(monkeypatch)
    builder, _ = make_builder(monkeypatch)
    _, counts = recorded_build(builder, Batch([70, 40], [1, 5]).common())
    counted = []
    monkeypatch.setattr(step, "count_step", lambda *args, **kwargs: counted.append(args))
    ran = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            ran.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        counts.totals()
    views = {"view", "_unsafe_view", "select", "slice"}
    assert [name for name in ran if name not in views] == ["zeros", "sum", "sum", "cat", "mul"]
    assert len(counted) == 1
