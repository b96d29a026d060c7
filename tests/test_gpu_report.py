"""What the GPU check makes of its measurements: speed, table, file."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


def test_the_bound_is_that_of_the_bytes() -> None:
    from benchmarks.gpu.bench import byte_bound
    from benchmarks.gpu.lib import E4M3
    from benchmarks.gpu.shape import Shape

    shape = Shape((32768,) * 8)
    assert byte_bound(shape, 0.1) == pytest.approx(2 / (1 + 1 / 10 + 1 / 64))
    half = Shape((2048, 1024, 1024), min_kv_len=1024)
    assert byte_bound(half, 0.6) == pytest.approx(2 / (1 + 0.6 + 1 / 128))
    assert byte_bound(Shape((4096,), cache_dtype=E4M3), 0.1) == pytest.approx(2 / (1.1 + 1 / 32))
    assert byte_bound(Shape((4096,), block_size=16), 0.5) == pytest.approx(2 / (1.5 + 1 / 16))


def test_speed_is_against_the_fastest_dense_kernel() -> None:
    from benchmarks.gpu.bench import speed
    from benchmarks.gpu.shape import Shape

    shape = Shape((32768,) * 8)  # 1.07 GB
    times = {"slow": (3.0, 3.0, 3.0), "fast": (0.5, 1.0, 2.0), "toptheta": (0.6, 0.625, 0.7)}
    found = speed(shape, times, 0.1)
    assert found["best dense"] == "fast"
    assert found["speed-up"] == pytest.approx(1.6)
    assert found["of bound"] == pytest.approx(1.6 * (1.1 + 1 / 64) / 2)
    assert found["dense GB/s"] == pytest.approx(1073.741824)
    assert found["GB/s"] == pytest.approx(1073.741824 / 2 * (1.1 + 1 / 64) / 0.625)
    alone = speed(shape, {"toptheta": (1.0, 1.0, 1.0)}, 1.0)
    assert alone["speed-up"] is None
    prompt = speed(Shape((4096,), is_prompt=True), times, 0.1)
    assert "of bound" not in prompt


def record(**changes: Any) -> dict[str, Any]:
    base = {
        "check": "speed",
        "rows x keys": "8 x 32768",
        "gqa": 4,
        "cache": "bfloat16",
        "min_prob": 0.001,
        "best dense": "sdpa flash",
        "Top-θ ms": 0.25,
        "speed-up": 1.8,
        "error / budget": 0.2,
        "ok": True,
        "ms": {"toptheta": [0.2, 0.25, 0.3], "sdpa flash": [0.4, 0.45, 0.5]},
        "left_out": {},
    }
    return base | changes


def test_the_table_can_be_pasted_and_the_file_read(tmp_path: Path) -> None:
    from benchmarks.gpu.report import Report

    path = tmp_path / "report.json"
    about = {"device": "Some GPU", "torch": "torch 2", "command": "python -m benchmarks.gpu.check"}
    report = Report(about, path)
    report.add(record(ms={"toptheta": [math.nan] * 3}, left_out={"cudnn": "no kernel"}))
    report.add(record(), record(gqa=8, **{"speed-up": None}))
    report.skip("32 x 131072: no room")
    summary = report.summary()
    assert summary.startswith("Some GPU · torch 2 · python -m benchmarks.gpu.check\n")
    assert "| rows x keys | gqa | cache | min_prob | best dense | Top-θ ms | speed-up |" in summary
    assert "| 8 x 32768 | 4 | bfloat16 | 0.001 | sdpa flash | 0.25 | 1.8 | 0.2 |" in summary
    assert "| 8 x 32768 | 8 | bfloat16 | 0.001 | sdpa flash | 0.25 | – | 0.2 |" in summary
    assert "- 32 x 131072: no room\n- cudnn on 8 x 32768 gqa 4 bfloat16: no kernel" in summary
    assert "All 3 checks in 0 s passed." in summary
    report.add(record(ok=False, gqa=16))
    assert "WRONG, 1 of 4 checks in 0 s:\n- FAIL speed: rows x keys 8 x 32768" in report.summary()
    assert "| 8 x 32768 | 16 |" not in report.summary()
    found = json.loads(path.read_text())
    assert found["records"][0]["ms"]["toptheta"] == [None] * 3
    assert found["skipped"] == ["32 x 131072: no room"]
