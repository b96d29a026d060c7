"""The scripts for a machine with a GPU, as far as they go without one."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_scripts import CHECK, run_bare, run_module
from triton_interpreter import needs_interpreter

pytest.importorskip("triton")

pytestmark = needs_interpreter


@pytest.fixture(scope="module")
def machine() -> Any:
    from benchmarks.gpu.lib import Machine

    return Machine(torch.device("cpu"), "a test", 4, True)


def test_without_a_gpu_the_script_says_so() -> None:
    done = run_module(CHECK, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "finds no GPU; with TRITON_INTERPRET=1" in done.stderr


def test_cases_of_full_size_can_be_made() -> None:
    """On a GPU they are random as here, and thresholds need gaps between probabilities."""
    from benchmarks.gpu import cases
    from vllm_toptheta.testing.cases import make_case

    for spec in (*cases.DECODE, *cases.PROMPTS, cases.FLASH[-1], cases.DETERMINISM, cases.GRAPH):
        make_case(spec)


def shape(**changes: Any) -> Any:
    from benchmarks.gpu.bench import TINY

    return dataclasses.replace(TINY, **{"lens": (70,), **changes})


def spec(**changes: Any) -> Any:
    from benchmarks.gpu.cases import TINY

    return dataclasses.replace(TINY, **{"lens": (70, 33), **changes})


def test_pages_are_laid_out_as_the_backend_finds_them() -> None:
    """Means lie behind K and V of every page, which is padded."""
    pytest.importorskip("vllm")
    from benchmarks.gpu.lib import E4M3, served_pages
    from vllm_toptheta.backend.sidecar import sketch_view, v_means_view

    for stored in (torch.bfloat16, E4M3):
        sketch = stored == torch.bfloat16
        cache, means, parts = served_pages(
            (3, 2, 64, 64), stored, torch.bfloat16, torch.device("cpu"), sketch=sketch
        )
        if parts is not None:
            for found, wanted in zip(parts, sketch_view(cache), strict=True):
                assert (found.shape, found.stride()) == (wanted.shape, wanted.stride())
                assert found.data_ptr() == wanted.data_ptr()
        view = v_means_view(cache, torch.bfloat16)
        assert (view.shape, view.stride()) == (means.shape, means.stride())
        assert view.data_ptr() == means.data_ptr()
        assert cache.float().isnan().all()


def test_a_wrong_rival_fails_and_one_that_does_not_run_is_left_out(machine: Any) -> None:
    from benchmarks.gpu.bench import bench
    from benchmarks.gpu.report import Report
    from benchmarks.gpu.rivals import Rival

    def fail() -> torch.Tensor:
        raise RuntimeError("no kernel image\nfor this device")

    def rivals(batch: Any) -> Iterator[tuple[str, Rival]]:
        yield "broken", Rival(fail)
        yield "close", Rival(lambda: batch.run_dense() * 1.0005)
        yield "wrong", Rival(lambda: batch.run_dense() * 1.1)
        yield "nothing", Rival(lambda: batch.run_dense() * math.nan)

    (record,) = bench(shape(), [0.01], machine, SimpleNamespace(rivals=rivals))
    assert record["left_out"] == {"broken": "RuntimeError: no kernel image"}
    assert set(record["wrong"]) == {"wrong", "nothing"}
    assert set(record["ms"]) >= {"toptheta", "toptheta dense", "close", "sdpa math"}
    assert not record["ok"]
    assert "speed-up" not in record
    report = Report({"device": "a test"}, records=[record])
    assert "broken on 1 x 70 gqa 2 float16: RuntimeError: no kernel image" in report.summary()
    assert "WRONG, 1 of 1 checks" in report.summary()
    assert "Decode, all rows pruned" not in report.summary()


def test_a_wrong_kernel_fails_every_check(
    machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a kernel that raises does not hide the checks after it."""
    from benchmarks.gpu import bench, cases, check, lib
    from benchmarks.gpu.report import Report

    right = lib.decode_attention

    def spoiled(change: Any) -> None:
        def wrong(*args: Any, **kwargs: Any) -> None:
            right(*args, **kwargs)
            change(kwargs)

        monkeypatch.setattr(lib, "decode_attention", wrong)

    spoiled(lambda outputs: outputs["out"].mul_(1.02))
    record = cases.check_decode(spec(), machine)
    assert not record["ok"]
    assert record["counts"]
    (record,) = bench.bench(shape(), [0.01], machine, None)
    assert not record["ok"]
    assert record["wrong"].keys() == {"toptheta dense"}

    spoiled(lambda outputs: outputs["out"][-1, 0, 0].fill_(math.nan))
    assert not cases.check_decode(spec(), machine)["ok"]
    (record,) = bench.bench(shape(lens=(70, 70)), [0.01], machine, None)
    assert not record["ok"]

    for name in ("num_kept", "kept_mass", "lifts"):
        spoiled(lambda outputs, name=name: outputs[name].add_(3))
        assert not cases.check_decode(spec(), machine)["ok"], name
    spoiled(lambda outputs: outputs["num_kept"].add_(3))
    (record,) = bench.bench(shape(), [0.01], machine, None)
    assert not record["ok"]
    assert not record["wrong"]

    def raises(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(lib, "decode_attention", raises)
    report = Report({})
    check.check_results(machine, report, quick=False, jobs=1)
    assert [(r["check"], r["ok"]) for r in report.records] == [
        ("check_decode", False),
        ("check_sketched", False),
        ("prompts", True),
        ("check_determinism", False),
    ]
    assert "out of resource: shared memory" in report.summary()


def test_a_set_that_depends_on_the_batch_is_noticed(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import cases, lib

    right = lib.decode_attention

    def sloppy(*args: Any, **kwargs: Any) -> None:
        if kwargs["num_splits"] == 5:
            args = (*args[:6], args[6] - 0.05, *args[7:])
        right(*args, **kwargs)

    monkeypatch.setattr(lib, "decode_attention", sloppy)
    record = cases.check_determinism(spec(lens=(70,)), machine)
    assert record["splits 2"]
    assert not record["splits 5"]
    assert not record["ok"]


class FakeCuda:
    """torch.cuda's graphs, streams and events: launches of Layer are recorded while a graph is
    captured, and run when it is replayed. Every replay takes 8 ms.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from benchmarks.gpu import lib

        self.graph: Any = None
        attend = lib.Layer.attend

        def recorded(layer: Any, result: Any, num_splits: int | None = None) -> None:
            if self.graph is None:
                attend(layer, result, num_splits)
            else:
                self.graph.launches.append(lambda: attend(layer, result, num_splits))

        class Graph:
            def __init__(self) -> None:
                self.launches: list[Any] = []

            def replay(self) -> None:
                for run in self.launches:
                    run()

        @contextlib.contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            self.graph = graph
            yield
            self.graph = None

        nothing = SimpleNamespace(
            wait_stream=lambda other: None,
            record=lambda: None,
            synchronize=lambda: None,
            elapsed_time=lambda end: 8.0,
        )
        monkeypatch.setattr(lib.Layer, "attend", recorded)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        for name in ("Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda: nothing)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: nothing)
        monkeypatch.setattr(
            torch.cuda, "stream", lambda stream: contextlib.nullcontext(), raising=False
        )


def test_a_graph_that_froze_a_length_is_noticed(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import cases, lib

    case = spec(lens=(70, 50, 20, 40))
    cuda = FakeCuda(monkeypatch)
    record = cases.check_graph(case, machine)
    assert record["ok"], record

    recorded = lib.Layer.attend

    def frozen(layer: Any, result: Any, num_splits: int | None = None) -> None:
        """What was on the device at capture is what a replay sees."""
        if cuda.graph is not None:
            layer = layer.part(0, len(layer.query))
        recorded(layer, result, num_splits)

    monkeypatch.setattr(lib.Layer, "attend", frozen)
    assert not cases.check_graph(case, machine)["ok"]


def test_times_are_those_of_one_launch(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import bench

    FakeCuda(monkeypatch)
    gpu = SimpleNamespace(is_gpu=True, device=torch.device("cpu"))
    monkeypatch.setattr(bench, "COLD_BYTES", 64)
    calls: list[int] = []
    variants = {
        "one": [lambda: calls.append(1)],
        "four": [lambda part=part: calls.append(part) for part in range(4)],
    }
    times = bench.time_variants(variants, gpu, repeats=3)
    assert times == {"one": (8.0, 8.0, 8.0), "four": (2.0, 2.0, 2.0)}
    assert calls == [1, 1, 0, 1, 2, 3, 0, 1, 2, 3]  # to compile, and to capture


def test_what_is_timed_on_a_gpu(machine: Any) -> None:
    """Long decode rows first; no float8 where it cannot be read."""
    from benchmarks.gpu.bench import kind_of, timed_shapes

    gpu = dataclasses.replace(machine, device=torch.device("cuda"))
    shapes = timed_shapes([32768, 131072], [8192], gpu, quick=False)
    assert len(shapes) == len(set(shapes))
    assert {kind_of(s) for s in shapes} == {"speed", "dense speed", "mixed speed", "prompt speed"}
    assert shapes[0].lens == (32768,) * 8
    assert {s.heads for s in shapes} == {4, 8}
    assert {s.cache_name for s in shapes} == {"bfloat16", "float8_e4m3fn"}
    old = dataclasses.replace(gpu, has_e4m3=False)
    assert {s.cache_name for s in timed_shapes([32768], [], old, quick=True)} == {"bfloat16"}
    # On a card of 80 GiB the largest fits, with the copy that torch's kernels need.
    largest = max(shapes, key=lambda s: s.bytes_needed)
    assert largest.bytes_needed + largest.cache_bytes < 0.6 * 79 * 2**30


def test_prompts_and_floors_and_launch_parameters(
    machine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records of other kinds than those of the carried kernel's test."""
    from benchmarks.gpu.bench import bench_launches

    for is_prompt in (False, True):
        records = bench_launches(shape(is_prompt=is_prompt), 0.01, machine)
        assert len(records) == 2
        assert all(record["ok"] for record in records)
        assert records[0]["config"] != records[1]["config"]


def test_clustered_keys_are_alike_in_runs_and_as_random_by_themselves(machine: Any) -> None:
    from benchmarks.gpu.lib import Batch
    from benchmarks.gpu.shape import CLUSTER, CLUSTERED

    def keys(is_clustered: bool) -> torch.Tensor:
        batch = Batch(shape(lens=(2048,), is_clustered=is_clustered), machine)
        return batch.row(batch.layer.key, 0).double().unflatten(0, (-1, CLUSTER))

    for is_clustered, share in ((False, 0.0), (True, CLUSTERED)):
        runs = keys(is_clustered)
        assert float(runs.var()) == pytest.approx(1, abs=0.05)
        assert float((runs[:, 0] * runs[:, 1]).mean()) == pytest.approx(share, abs=0.05)


def test_what_is_compared_on_a_gpu(machine: Any) -> None:
    from benchmarks.gpu import cases, check

    gpu = dataclasses.replace(machine, device=torch.device("cuda"))
    every = check.planned(gpu, quick=False)
    assert len(every) == 2 + len(cases.DECODE) + len(cases.SKETCHED) + len(cases.PROMPTS)
    assert len(check.planned(gpu, quick=True)) == 11
    without = check.planned(dataclasses.replace(gpu, has_e4m3=False), quick=False)
    assert {spec.cache_dtype for _, spec in without} == {None}


def test_flash_attention_is_compared_where_there_is_one(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the padded pages that serving hands it."""
    import flash_reference

    from benchmarks.gpu import cases, check

    right = flash_reference.flash_attn_varlen_func
    shares = {"right": 1.0, "wrong": 1.02}
    for spec in [dataclasses.replace(cases.TINY_PROMPT, window=w) for w in (None, 20)]:
        for name, share in shares.items():
            attend = lambda share=share, **given: right(**given).mul_(share)  # noqa: E731
            for module in (cases, check):
                monkeypatch.setattr(module, "flash_attention", lambda attend=attend: (attend, 3))
            record = cases.check_flash(spec, machine)
            assert record["check"] == "FlashAttention 3"
            assert record["ok"] == (name == "right"), record
    gpu = dataclasses.replace(machine, device=torch.device("cuda"))
    planned = check.planned(gpu, quick=True)
    assert planned[-len(cases.FLASH) :] == [(cases.check_flash, spec) for spec in cases.FLASH]


@pytest.mark.parametrize("call", ["probe", "results", "table", "decode"])
def test_the_short_run_is_rehearsed(call: str, tmp_path: Path) -> None:
    """Every step of its calls but the numbers, as on a machine with torch and triton only."""
    path = tmp_path / "records.json"
    done = run_bare(tmp_path, "benchmarks.gpu.short_run", call, "--json", path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(path.read_text())
    assert found["skipped"] == []
    checks = [record["check"] for record in found["records"]]
    expected = {
        "probe": ["bandwidth", "bandwidth", "decode", "speed"],
        "results": ["decode", "sketched", "prompts", "determinism"],
        "decode": ["decode", "sketched", "speed", "speed"],
        "table": ["speed", "dense speed", "mixed speed", "prompt speed"] * 2 + ["launch"] * 2,
    }
    assert checks == expected[call]


def test_a_wrong_result_ends_the_probe_before_anything_is_timed(
    machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks.gpu import bench, cases, short_run

    monkeypatch.setattr(short_run.Machine, "find", lambda: machine)
    monkeypatch.setattr(short_run.VllmTriton, "find", lambda *args, **kwargs: None)
    wrong = {"check": "decode", "ok": False}
    monkeypatch.setattr(cases, "guarded", lambda *args: wrong)
    monkeypatch.setattr(bench, "bench", lambda *args: pytest.fail("timed"))
    monkeypatch.setattr(short_run.sys, "argv", ["short_run", "probe"])
    assert short_run.main() == 1
