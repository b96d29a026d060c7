"""What the GPU check makes of its measurements: speed, goals, table, file."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


def test_the_bound_is_that_of_the_bytes() -> None:
    from gpu_bench import byte_bound
    from gpu_lib import E4M3, Shape

    shape = Shape((32768,) * 8)
    assert byte_bound(shape, 0.1) == pytest.approx(2 / (1 + 1 / 10 + 1 / 16))
    half = Shape((2048, 1024, 1024), min_kv_len=1024)
    assert byte_bound(half, 0.6) == pytest.approx(2 / (1 + 0.6 + 1 / 32))
    assert byte_bound(Shape((4096,), cache_dtype=E4M3), 0.1) == pytest.approx(2 / 1.225)
    assert byte_bound(Shape((4096,), compensation=False), 0.5) == pytest.approx(2 / 1.5)


def test_speed_is_against_the_fastest_dense_kernel() -> None:
    from gpu_bench import speed
    from gpu_lib import Shape

    shape = Shape((32768,) * 8)  # 1.07 GB
    times = {"slow": (3.0, 3.0, 3.0), "fast": (0.5, 1.0, 2.0), "toptheta": (0.6, 0.625, 0.7)}
    found = speed(shape, times, 0.1)
    assert found["best_dense"] == "fast"
    assert found["speed_up"] == pytest.approx(1.6)
    assert found["of_bound"] == pytest.approx(1.6 * 1.1625 / 2)
    assert found["dense GB/s"] == pytest.approx(1073.741824)
    assert found["GB/s"] == pytest.approx(1073.741824 / 2 * 1.1625 / 0.625)
    alone = speed(shape, {"toptheta": (1.0, 1.0, 1.0)}, 1.0)
    assert alone["best_dense"] is None
    assert alone["speed_up"] is None


def record(**changes: Any) -> dict[str, Any]:
    base = {
        "check": "speed",
        "shape": "8 x 32768",
        "batch": 8,
        "length": 32768,
        "gqa": 4,
        "cache": "bfloat16",
        "k": 128,
        "kept_fraction": 0.004,
        "v_row_fraction": 0.0157,
        "ms": {"toptheta": [0.2, 0.25, 0.3], "sdpa flash": [0.4, 0.45, 0.5]},
        "best_dense": "sdpa flash",
        "speed_up": 1.8,
        "of_bound": 0.95,
        "GB/s": 2300.0,
        "dense GB/s": 2400.0,
        "error_of_budget": 0.2,
        "ok": True,
    }
    return base | changes


def test_goals_are_judged_by_the_worst_row() -> None:
    from gpu_report import goals

    rows = [
        record(),
        record(of_bound=0.1, length=8192),  # neither goal is about these
        record(of_bound=0.1, batch=1),
        record(of_bound=0.1, ok=False),
        record(check="dense speed", speed_up=0.98, of_bound=None),
    ]
    bound, dense = goals(rows)
    assert bound.startswith("met: at least 90% of the byte bound")
    assert bound.endswith("(worst 0.950: 8 x 32768 gqa 4 bfloat16 k 128; 1 rows)")
    assert dense.startswith("met: short dense rows at most 3% slower")
    rows += [record(of_bound=0.89, gqa=8), record(check="dense speed", speed_up=0.96)]
    bound, dense = goals(rows)
    assert bound.startswith("NOT MET: ")
    assert bound.endswith("(worst 0.890: 8 x 32768 gqa 8 bfloat16 k 128; missed in 1 of 2 rows)")
    assert dense.startswith("NOT MET: ")
    assert [goal.split(":")[0] for goal in goals([record(of_bound=None)])] == ["not measured"] * 2


def test_the_table_can_be_pasted_and_the_file_read(tmp_path: Path) -> None:
    from gpu_report import Report

    path = tmp_path / "report.json"
    about = {"device": "Some GPU", "torch": "torch 2", "command": "scripts/gpu_check"}
    report = Report(about, path)
    report.add([record(ms={"toptheta": [math.nan] * 3, "sdpa flash": [0.4, 0.45, 0.5]})])
    report.add([record()])
    report.skip("decode 32 x 131072: no room")
    summary = report.summary()
    assert summary.startswith("Some GPU · torch 2 · scripts/gpu_check\n")
    assert (
        "| 8 x 32768 | 4 | bfloat16 | 128 | 0.45 (sdpa flash) | 0.25 | 1.8x | 95% | 2300 | 2400 | "
        "0.4% | 1.57% | 0.2 |" in summary
    )
    assert "Not measured:\n- decode 32 x 131072: no room" in summary
    assert "All 2 checks in 0 s passed." in summary
    report.save()
    found = json.loads(path.read_text())
    assert found["records"][0]["ms"]["toptheta"] == [None] * 3
    assert found["skipped"] == ["decode 32 x 131072: no room"]
