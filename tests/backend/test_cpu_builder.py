"""Mixed batches through the CPU metadata builder and its layers: outputs and counts against the
specification, for every choice of phases."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

import torch  # noqa: E402
from asked import resolve  # noqa: E402
from cpu_engine import (  # noqa: E402
    BLOCK,
    CHUNK,
    DECODES,
    GROUP,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYER,
    LENS,
    MIN_KV_LEN,
    NAMES,
    OFF,
    SHORT,
    Batch,
    Engine,
    plans,
)
from vllm.config import VllmConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.attention.backends import cpu_attn  # noqa: E402

from vllm_toptheta.backend import cpu, cpu_layer, sidecar  # noqa: E402
from vllm_toptheta.config import TopThetaConfig  # noqa: E402
from vllm_toptheta.hooks import model_runner  # noqa: E402
from vllm_toptheta.kernels.columns import COLUMNS  # noqa: E402
from vllm_toptheta.kernels.layout import RENORMALISE, V_TILE, PageLayout  # noqa: E402
from vllm_toptheta.kernels.ops import Availability  # noqa: E402
from vllm_toptheta.requests import RequestOptions  # noqa: E402


@pytest.fixture(scope="module")
def vllm_config(smollm2: Path) -> VllmConfig:
    return EngineArgs(model=str(smollm2), dtype="float32").create_engine_config()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[int, RequestOptions]:
    """Options of the requests, by batch row."""
    options = {OFF: RequestOptions(pruning=False)}
    monkeypatch.setattr(model_runner, "row_options", lambda cam: resolve(plans[-1], options))
    return options


def check(
    batch: Batch, counts: list[dict[str, int]], phases: str, metadata: cpu.TopThetaCPUMetadata
) -> None:
    """Outputs of both layers, and every request's counts."""
    for row, request in enumerate(batch.requests):
        decodes = request < DECODES
        phase = phases in ("both", "decode" if decodes else "prefill")
        read = tiles = scored = mass = lifted = 0
        for layer in range(len(NAMES)):
            pruned = phase and layer == 0 and request != OFF
            out, chosen = batch.expected(row, pruned)
            rows = slice(int(batch.starts[row]), int(batch.starts[row + 1]))
            got = batch.out[layer][rows].double()
            torch.testing.assert_close(got, out, rtol=0, atol=1e-5)
            read += int(chosen.kept.sum())
            padded = torch.nn.functional.pad(chosen.kept, (0, -batch.lens[row] % V_TILE))
            tiles += int(padded.unflatten(-1, (-1, V_TILE)).any(-1).sum())
            lens = range(batch.lens[row] - batch.queries[row] + 1, batch.lens[row] + 1)
            scored += sum(lens)
            mass += float(chosen.kept_mass.sum())
            lifted += int((chosen.lifts > 0).sum()) * (HEADS // KV_HEADS)
            if pruned and batch.lens[row] > MIN_KV_LEN:
                assert read < 0.7 * scored * KV_HEADS, "nothing was pruned"
        found, num_rows = counts[row], batch.queries[row] * HEADS * len(NAMES)
        kept = read * (HEADS // KV_HEADS)
        if decodes:
            assert (found["rows"], found["keys_scored"]) == (num_rows, scored * HEADS)
            assert (found["keys_kept"], found["v_rows_read"]) == (kept, read)
            assert found["v_rows_scored"] == scored * KV_HEADS
            assert found["keys_dense"] == kept, "no k rules"
            assert found["kept_mass"] == pytest.approx(mass * 1e6, abs=2)
            assert found["rows_lifted"] == lifted
            assert found["dense_prefill"] == found["prefill_rows"] == found["keys_target"] == 0
        elif phases == "decode":
            assert found == dict.fromkeys(COLUMNS, 0) | {"dense_prefill": num_rows}
        else:
            assert (found["prefill_rows"], found["prefill_keys_scored"]) == (
                num_rows,
                scored * HEADS,
            )
            assert found["prefill_keys_kept"] == kept
            assert found["prefill_v_tiles_read"] == tiles
            assert found["prefill_kept_mass"] == pytest.approx(mass * 1e6, rel=1e-6)
            assert found["rows"] == 0
    if phases != "prefill":
        assert counts[0]["rows_lifted"] > 0, "the floor had nothing to do"
    has_prompts = batch.requests[-1] >= DECODES
    assert (metadata.prefill is not None) + (metadata.prompts is not None) == has_prompts


@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("phases", ["both", "prefill", "decode"])
def test_mixed_batches(
    monkeypatch: pytest.MonkeyPatch,
    vllm_config: VllmConfig,
    asked: dict[int, RequestOptions],
    phases: str,
    stock: bool,
) -> None:
    engine, batch = Engine(monkeypatch, vllm_config, phases, stock), Batch(list(range(len(LENS))))
    metadata, counts = engine.step(batch)
    check(batch, counts, phases, metadata)
    assert (metadata.prefill is not None) is (stock and phases == "decode")


@pytest.mark.parametrize("compensation", [True, False])
def test_pruned_decode_rows_scan_the_sketch_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig, compensation: bool
) -> None:
    batches, counts = [], []
    for sketch in (True, False):
        engine = Engine(
            monkeypatch,
            vllm_config,
            "both",
            False,
            k_sketch=sketch,
            compensation=compensation,
        )
        batch = Batch(list(range(len(LENS))))
        counts.append(engine.step(batch)[1])
        batches.append(batch)
        assert (engine.impls[0].layout.sketch is not None) is sketch
    scanned, exact = (batch.out for batch in batches)
    assert torch.equal(scanned[1], exact[1]), "a dense layer"
    assert torch.equal(scanned[0][DECODES:], exact[0][DECODES:]), "prompts"
    assert not torch.equal(scanned[0], exact[0])
    # A key at the threshold, or a floor, may be decided otherwise.
    assert ((scanned[0] - exact[0]).abs() > 0.02).double().mean() < 0.01
    for of_sketch, of_keys in zip(*counts, strict=True):
        assert of_sketch["keys_scored"] == of_keys["keys_scored"]
        assert of_sketch["v_rows_read"] == pytest.approx(of_keys["v_rows_read"], rel=0.15)


def test_without_compensation_nobody_writes_or_reads_means(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig
) -> None:
    engine = Engine(monkeypatch, vllm_config, "decode", True, compensation=False)
    batch = Batch([0, 1, CHUNK], RENORMALISE)
    metadata, counts = engine.step(batch)
    check(batch, counts, "decode", metadata)
    assert PageLayout(BLOCK, HEAD_DIM).v_means(batch.cache(engine.impls[0])).isnan().all()


@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("phases", ["both", "prefill"])
def test_steps_whose_prompts_are_not_pruned_run_on_the_faster_kernel(
    monkeypatch: pytest.MonkeyPatch,
    vllm_config: VllmConfig,
    asked: dict[int, RequestOptions],
    phases: str,
    stock: bool,
) -> None:
    asked.clear()
    asked[2] = RequestOptions(pruning=False)  # the third of these requests
    engine, batch = Engine(monkeypatch, vllm_config, phases, stock), Batch([0, 1, OFF, SHORT])
    metadata, counts = engine.step(batch)
    check(batch, counts, phases, metadata)
    assert (metadata.prefill is not None) is stock


@pytest.mark.parametrize("avx512", [True, False])
def test_hosts_with_avx512_keep_unpruned_prompts_on_cpu_attn_and_say_so(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig, avx512: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    faster, lines = cpu.stock_prompts_are_faster("vec", "native"), []
    assert faster is avx512
    assert cpu.stock_prompts_are_faster("vec", "eager")
    monkeypatch.setattr(cpu.logger, "info_once", lines.append)
    engine = Engine(monkeypatch, vllm_config, "decode", faster)
    metadata, _ = engine.step(Batch([0, CHUNK]))
    assert (metadata.prefill is not None) is avx512
    assert ["CPU_ATTN" in line for line in lines] == [True] * avx512


@pytest.mark.parametrize("phases", ["decode", "prefill"])
def test_dense_decode_rows_run_on_cpu_attn_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig, phases: str
) -> None:
    monkeypatch.setattr(cpu, "stock_decodes_are_faster", lambda packing: True)
    calls = []
    stock = cpu_attn.CPUAttentionBackendImpl.forward

    def count(self: object, layer: object, query: torch.Tensor, *args: object) -> torch.Tensor:
        calls.append(len(query))
        return stock(self, layer, query, *args)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(cpu_attn.CPUAttentionBackendImpl, "forward", count)
    engine = Engine(monkeypatch, vllm_config, phases, False)
    batch = Batch([0, 1, CHUNK])
    metadata, counts = engine.step(batch)
    check(batch, counts, phases, metadata)
    # Of the first layer the short row, of the dense one both.
    assert calls == ([1, 2] if phases == "decode" else [2, 2])


def test_amx_hosts_keep_stock_pages_prompts_and_dense_rows_on_cpu_attn_and_say_so(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig
) -> None:
    assert cpu.stock_prompts_are_faster("amx", "native")
    assert cpu.stock_decodes_are_faster("amx")
    assert not cpu.stock_decodes_are_faster("vec")
    engine, lines = Engine(monkeypatch, vllm_config, "both", True), []
    monkeypatch.setattr(cpu.logger, "info_once", lines.append)
    engine.builder.isa = "amx"
    assert engine.builder.packing == "amx"
    engine.builder._choose_stock_kernels()
    assert engine.builder.stock_decodes
    engine.builder.isa = "vec"  # the processor here need not have AMX
    metadata, counts = engine.step(Batch([0, CHUNK]))
    assert metadata.prompts is None
    assert counts[1] == dict.fromkeys(COLUMNS, 0) | {"dense_prefill": 20 * HEADS * len(NAMES)}
    assert [("CPU_ATTN" in line, "without pruning" in line) for line in lines] == [(True, True)]


def test_means_are_updated_in_steps_that_complete_a_group(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig
) -> None:
    engine, batch = Engine(monkeypatch, vllm_config, "decode", True), Batch([0, 1])
    updated: list[list[int]] = []
    monkeypatch.setattr(
        cpu_layer,
        "update_side_data",
        lambda cache, layout, slots, target: updated.append(slots.tolist()),
    )
    cache = torch.zeros(4, KV_HEADS, BLOCK, PageLayout(BLOCK, HEAD_DIM).content_elements)
    key = value = torch.zeros(3, KV_HEADS, HEAD_DIM)
    slots = torch.zeros(3, dtype=torch.int64)
    # The same tensor in every step, as a runner may pass it.
    for written in ([5, 40, -1], [GROUP - 1, 41, -1], [33, 42, 3 * GROUP - 1], [34, 43, -1]):
        slots[:] = torch.tensor(written)
        engine.builder.build(0, batch.common())
        for impl in engine.impls:
            impl.do_kv_cache_update(LAYER, key, value, cache, slots)
    assert updated == [[GROUP - 1]] * len(NAMES) + [[3 * GROUP - 1]] * len(NAMES)


@pytest.mark.parametrize(
    ("options", "native", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"k_sketch": True}, False, True),
        ({"k_sketch": False}, True, False),
        ({"phases": "prefill"}, True, False),
    ],
)
def test_pages_hold_the_sketch_where_the_native_kernels_scan_it(
    options: dict[str, Any], native: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Availability("native", None) if native else Availability("eager", "none here")
    monkeypatch.setattr(sidecar, "available_target", lambda: found)
    assert sidecar.sketches_keys(TopThetaConfig.model_validate(options)) is expected
