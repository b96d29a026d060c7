"""The scripts for a machine with a GPU, as far as they go without one."""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_scripts import SCRIPTS, load_script, run_bare
from triton_interpreter import needs_interpreter

pytest.importorskip("triton")

from vllm_toptheta.kernels.triton_config import TUNED_PATH, LaunchConfig, choose_config

pytestmark = needs_interpreter


@pytest.fixture(scope="module")
def machine() -> Any:
    from gpu_lib import Machine

    return Machine(torch.device("cpu"), "a test", 4, True)


def test_without_a_gpu_the_scripts_say_so() -> None:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    for script in ("gpu_check", "tune_triton"):
        done = subprocess.run(
            [sys.executable, SCRIPTS / script],
            env=environment | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 2
        assert "finds no GPU; with TRITON_INTERPRET=1" in done.stderr


def tiny(**changes: Any) -> Any:
    from gpu_shapes import TINY

    return dataclasses.replace(TINY, **{"lens": (70,), **changes})


def test_a_wrong_rival_fails_and_one_that_does_not_run_is_left_out(machine: Any) -> None:
    from gpu_bench import bench_decode
    from gpu_report import Report
    from gpu_rivals import Rival

    def fail() -> torch.Tensor:
        raise RuntimeError("no kernel image\nfor this device")

    def rivals(batch: Any) -> Iterator[tuple[str, Rival]]:
        yield "broken", Rival(fail)
        yield "close", Rival(lambda: batch.run_dense() * 1.001)
        yield "wrong", Rival(lambda: batch.run_dense() * 1.1)
        yield "nothing", Rival(lambda: batch.run_dense() * math.nan)

    (record,) = bench_decode(tiny(), [6], machine, SimpleNamespace(rivals=rivals))
    assert record["left_out"] == {"broken": "RuntimeError: no kernel image"}
    assert set(record["wrong"]) == {"wrong", "nothing"}
    assert set(record["ms"]) >= {"toptheta", "toptheta dense", "close", "sdpa math"}
    assert not record["ok"]
    assert record["speed_up"] is None
    report = Report({"device": "a test"}, records=[record])
    assert "broken on 1 x 70 gqa 2 float16: RuntimeError: no kernel image" in report.summary()
    assert "WRONG, 1 of 1 checks" in report.summary()
    assert "Decode, all rows pruned" not in report.summary()


def test_a_wrong_kernel_fails_every_check(
    machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a kernel that raises does not hide the checks after it."""
    import gpu_bench
    import gpu_lib

    script = load_script("gpu_check")
    right = gpu_lib.decode_attention

    def wrong(*args: Any, **kwargs: Any) -> None:
        right(*args, **kwargs)
        kwargs["out"].mul_(1.02)

    monkeypatch.setattr(gpu_lib, "decode_attention", wrong)
    record = script.check_correctness(tiny(lens=(70, 33)), machine, 0)
    assert not record["ok"]
    assert record["counts"]
    (record,) = gpu_bench.bench_decode(tiny(), [6], machine, None)
    assert not record["ok"]
    assert record["wrong"].keys() == {"toptheta dense"}

    def spoils(*args: Any, **kwargs: Any) -> None:
        right(*args, **kwargs)
        kwargs["out"][-1, 0, 0] = math.nan

    monkeypatch.setattr(gpu_lib, "decode_attention", spoils)
    assert not script.check_correctness(tiny(lens=(70, 33)), machine, 0)["ok"]
    (record,) = gpu_bench.bench_decode(tiny(lens=(70, 70)), [6], machine, None)
    assert not record["ok"]

    def miscounts(*args: Any, **kwargs: Any) -> None:
        right(*args, **kwargs)
        kwargs["num_kept"].add_(1)

    monkeypatch.setattr(gpu_lib, "decode_attention", miscounts)
    assert not script.check_correctness(tiny(lens=(70, 33)), machine, 0)["ok"]
    (record,) = gpu_bench.bench_decode(tiny(), [6], machine, None)
    assert not record["ok"]
    assert not record["wrong"]

    def raises(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(gpu_lib, "decode_attention", raises)
    report = script.Report({})
    script.check_results(machine, report, quick=False)
    assert [(r["check"], r["ok"]) for r in report.records] == [
        ("correctness", False),
        ("determinism", False),
        ("prompts", True),
    ]
    assert "out of resource: shared memory" in report.summary()


class FakeCuda:
    """torch.cuda's graphs, streams and events: launches of Batch are recorded while a graph is
    captured, and run when it is replayed. Every replay takes 8 ms.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import gpu_lib

        self.graph: Any = None
        launch = gpu_lib.Batch.launch

        def recorded(batch: Any, **kwargs: Any) -> None:
            if self.graph is None:
                launch(batch, **kwargs)
            else:
                self.graph.launches.append(lambda: launch(batch, **kwargs))

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
        monkeypatch.setattr(gpu_lib.Batch, "launch", recorded)
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
    script = load_script("gpu_check")
    shape = tiny(lens=(70, 50, 20, 40))
    cuda = FakeCuda(monkeypatch)
    record = script.check_graph(shape, machine)
    assert record["ok"], record

    import gpu_lib

    recorded = gpu_lib.Batch.launch

    def frozen(batch: Any, **kwargs: Any) -> None:
        """What was on the device at capture is what a replay sees."""
        if cuda.graph is not None:
            batch = batch.part(0, len(batch.shape.lens))
        recorded(batch, **kwargs)

    monkeypatch.setattr(gpu_lib.Batch, "launch", frozen)
    assert not script.check_graph(shape, machine)["ok"]


def test_times_are_those_of_one_launch(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_bench

    FakeCuda(monkeypatch)
    gpu = SimpleNamespace(is_gpu=True, device=torch.device("cpu"))
    monkeypatch.setattr(gpu_bench, "COLD_BYTES", 64)
    calls: list[int] = []
    variants = {
        "one": [lambda: calls.append(1)],
        "four": [lambda part=part: calls.append(part) for part in range(4)],
    }
    times = gpu_bench.time_variants(variants, gpu, repeats=3)
    assert times == {"one": (8.0, 8.0, 8.0), "four": (2.0, 2.0, 2.0)}
    assert calls == [1, 1, 0, 1, 2, 3, 0, 1, 2, 3]  # to compile, and to capture


def test_what_is_timed_on_a_gpu(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The goals' rows first; all that was asked for; no float8 where it cannot be read."""
    import gpu_shapes

    script = load_script("gpu_check")
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    options = script.parse()
    gpu = dataclasses.replace(machine, device=torch.device("cuda"))
    shapes = gpu_shapes.timed_decode(options, gpu)
    assert len(shapes) == len({(s.lens, s.heads, s.cache_dtype) for s in shapes}) == 4 * 19
    in_goals = [min(s.lens) >= 32768 and len(s.lens) >= 8 for s in shapes]
    assert in_goals == [True] * 16 + [False] * 60
    assert {len(s.lens) for s in shapes} == {1, 8, 32}
    assert {s.lens[0] for s in shapes} == {512, 1024, 4096, 8192, 32768, 131072}
    assert [len(s.lens) for s in shapes if len(set(s.lens)) > 1] == [32] * 4
    old = dataclasses.replace(gpu, has_e4m3=False)
    assert len(gpu_shapes.timed_decode(options, old)) == 2 * 19
    # On a card of 80 GiB the largest fits, with the copy that torch's kernels need.
    largest = max(shapes, key=gpu_shapes.bytes_needed)
    assert largest.cache_bytes == 17_179_869_184
    assert gpu_shapes.bytes_needed(largest) + largest.cache_bytes < 0.6 * 79 * 2**30


def test_tuning_picks_the_fastest_that_runs() -> None:
    script = load_script("tune_triton")
    slow, broken, fast = LaunchConfig(32), LaunchConfig(64), LaunchConfig(128)
    times = {slow: [1.0, 4.0], broken: None, fast: [0.5, 6.0]}
    winner, mean, first = script.best([slow, broken, fast], times.__getitem__)
    assert winner is fast
    assert (mean, first) == (pytest.approx(math.sqrt(3)), 2.0)
    assert script.best([broken, fast], times.__getitem__)[2] is None
    with pytest.raises(RuntimeError, match="no configuration runs"):
        script.best([broken], times.__getitem__)
    configs = list(script.candidates(128, 64))
    assert configs[0] == choose_config(head_dim=128, group_size=64, cache_bytes=2)
    assert {config.tile for config in configs} == {64, 128}


def test_tuning_keeps_other_entries(tmp_path: Path) -> None:
    script, path = load_script("tune_triton"), tmp_path / "tuned.json"
    script.write("One GPU", {"64/16/2": {"tile": 64}, "128/16/2": {"tile": 64}}, path)
    script.write("Another", {"128/16/2": {"tile": 32}}, path)
    script.write("One GPU", {"128/16/2": {"tile": 128}}, path)
    assert json.loads(path.read_text()) == {
        "One GPU": {"64/16/2": {"tile": 64}, "128/16/2": {"tile": 128}},
        "Another": {"128/16/2": {"tile": 32}},
    }


def test_tuning_runs_under_the_interpreter_and_writes_nothing(tmp_path: Path) -> None:
    before = TUNED_PATH.read_bytes() if TUNED_PATH.exists() else None
    done = run_bare(tmp_path, "tune_triton", "--head-dim", "64")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert [key for key in ("64/16/2: ", "64/16/1: ") if key in done.stdout] == [
        "64/16/2: ",
        "64/16/1: ",
    ]
    assert "WRONG" not in done.stdout
    assert "Error" not in done.stdout
    assert before == (TUNED_PATH.read_bytes() if TUNED_PATH.exists() else None)
