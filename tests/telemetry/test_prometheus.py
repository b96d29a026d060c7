"""Metrics and the log line from counts."""

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client import CollectorRegistry, generate_latest  # noqa: E402

from vllm_toptheta.kernels.columns import COLUMNS, MASS_UNIT  # noqa: E402
from vllm_toptheta.requests import Target, Targets  # noqa: E402
from vllm_toptheta.telemetry import live as live_module  # noqa: E402
from vllm_toptheta.telemetry import shield  # noqa: E402
from vllm_toptheta.telemetry.delivery import Choice  # noqa: E402
from vllm_toptheta.telemetry.live import Live  # noqa: E402
from vllm_toptheta.telemetry.prometheus import DRIFT_WINDOW, Metrics  # noqa: E402

TARGETS = Targets(Target(0.001, 0.5), None)


def row(**values: int) -> list[int]:
    return [values.get(name, 0) for name in COLUMNS]


@pytest.fixture
def registry() -> Iterator[CollectorRegistry]:
    before = list(shield.listeners)
    yield CollectorRegistry()
    shield.listeners[:] = before


def make(registry: CollectorRegistry) -> Metrics:
    return Metrics("m", {"min_prob": "0.001"}, registry)


def value(registry: CollectorRegistry, name: str, engine: str | None = "0", **labels: str) -> Any:
    engines = {} if engine is None else {"engine": engine}
    return registry.get_sample_value(
        f"vllm_toptheta_{name}", {"model_name": "m", **engines, **labels}
    )


def test_counts_become_counters_by_engine(registry: CollectorRegistry) -> None:
    metrics = make(registry)
    counts = row(rows=9, keys_kept=5, rows_lifted=2, dense_off=3)
    metrics.counted(0, counts)
    metrics.counted(1, counts)
    metrics.counted(1, counts)
    metrics.reported(1, counts)
    assert value(registry, "rows_total") == 9
    assert value(registry, "rows_total", "1") == 18
    assert (
        value(registry, "rows_lifted_total")
        == value(registry, "reported_total", "1", count="rows_lifted")
        == 2
    )
    assert value(registry, "reported_total", count="rows_lifted") == 0, "of the other engine"
    assert value(registry, "dense_rows_total", reason="off") == 3
    assert value(registry, "dense_rows_total", reason="short") == 0, "there before it happens"
    assert value(registry, "reported_total", "1", count="keys_kept") == 5
    assert value(registry, "info", None, min_prob="0.001") == 1


def test_a_finished_sequence_is_one_observation(registry: CollectorRegistry) -> None:
    metrics = make(registry)
    counts = row(
        rows=2, keys_scored=100, keys_kept=25, keys_target=20, kept_mass=MASS_UNIT * 19 // 10
    )
    assert value(registry, "kept_mass_count", adapter="") == 0, "there before it happens"
    metrics.finished(Choice("x", 0, "k", TARGETS, counts=counts))
    metrics.finished(Choice("x", 0, "k", TARGETS, counts=counts, adapter="style"))
    prompts = row(prefill_rows=4, prefill_kept_mass=3 * MASS_UNIT)
    metrics.finished(Choice("y", 0, "default", TARGETS, counts=prompts))  # no decode row
    assert value(registry, "request_kept_fraction_sum") == 0.5
    assert value(registry, "request_target_ratio_sum") == 2.5
    assert value(registry, "request_kept_fraction_count") == 2
    assert value(registry, "kept_mass_count", adapter="style") == 1
    assert value(registry, "kept_mass_sum", adapter="") == 0.95
    assert value(registry, "kept_mass_count", adapter="") == 1
    assert value(registry, "kept_mass_bucket", adapter="", le="0.925") == 0
    assert value(registry, "kept_mass_bucket", adapter="", le="0.95") == 1
    assert value(registry, "prefill_kept_mass_sum") == 0.75
    assert value(registry, "requests_total", setting="k") == 2
    assert value(registry, "requests_total", setting="default") == 1
    assert value(registry, "requests_total", setting="min_prob") == 0, "there before it happens"


def test_drift_is_of_the_recent_past(registry: CollectorRegistry) -> None:
    metrics = make(registry)
    metrics.layers_counted(0, [row(keys_kept=300, keys_target=100), row()])
    assert value(registry, "layer_target_ratio", layer="0") == 3
    assert value(registry, "layer_target_ratio", layer="1") is None, "nothing was pruned"
    for _ in range(DRIFT_WINDOW):
        metrics.layers_counted(0, [row(keys_kept=130, keys_dense=30, keys_target=100), row()])
    assert value(registry, "layer_target_ratio", layer="0") == 1
    assert metrics.drift() == {0: [1.0, None]}


def test_failures_of_every_process_are_counted(registry: CollectorRegistry) -> None:
    metrics = make(registry)
    metrics.failed(0, {"worker": 3})
    with shield.shielded("server"):
        raise RuntimeError("broken")
    assert value(registry, "telemetry_errors_total", place="worker") == 3
    assert value(registry, "telemetry_errors_total", place="server") == 1


def test_names_and_labels_follow_vllms_conventions(registry: CollectorRegistry) -> None:
    make(registry)
    for line in generate_latest(registry).decode().splitlines():
        if line.startswith("#") or line.startswith("vllm_toptheta_info"):
            continue
        assert line.startswith("vllm_toptheta_")
        assert 'model_name="m"' in line
        assert 'engine="0"' in line


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (
            {
                "rows": 10,
                "keys_scored": 100,
                "keys_kept": 25,
                "keys_target": 25,
                "kept_mass": 9 * MASS_UNIT,
                "rows_lifted": 2,
            },
            (
                "40 decode rows",
                "keys kept: 25.0%",
                "kept mass: 90.0%",
                "lifted rows: 20.0%",
                "kept/target: 1.00",
            ),
        ),
        (
            {
                "prefill_rows": 10,
                "prefill_keys_scored": 100,
                "prefill_keys_kept": 15,
                "prefill_kept_mass": 8 * MASS_UNIT,
            },
            ("40 prompt rows", "keys kept: 15.0%", "kept mass: 80.0%"),
        ),
    ],
)
def test_the_log_line_comes_while_there_is_traffic(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    counts: dict[str, int],
    words: tuple[str, ...],
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(live_module, "LOG_EVERY_S", 0.02)
    caplog.set_level(logging.INFO, logger="vllm.toptheta")

    async def traffic() -> None:
        live = Live(log=True)
        for _ in range(4):
            live.counted(0, row(**counts))
        await asyncio.sleep(0.1)  # and then none

    asyncio.run(traffic())
    # A logger that vLLM has configured hands a record to more than one of pytest's handlers.
    records = {id(record): record for record in caplog.records if "Top-theta" in record.message}
    lines = [record.message for record in records.values()]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


def test_the_log_line_tells_of_the_phases_there_were() -> None:
    decode = {"rows": 10, "keys_scored": 100, "keys_kept": 25}
    prompts = {"prefill_rows": 20, "prefill_keys_scored": 400, "prefill_keys_kept": 80}
    zero = dict.fromkeys(COLUMNS, 0)
    lines = [
        live_module.describe(zero | named)
        for named in (decode, prompts | {"dense_prefill": 5}, decode | prompts)
    ]
    assert [("decode rows" in line, "prompt rows" in line) for line in lines] == [
        (True, False),
        (False, True),
        (True, True),
    ]
    assert "20 prompt rows in the last 10 s, keys kept: 20.0%" in lines[1]
    assert "dense rows: 25.0%" in lines[1]
    assert "kept/target" not in lines[0], "no k rules"


def test_the_recent_past_is_bounded() -> None:
    live = Live(log=False)
    for number in range(live_module.REQUESTS_KEPT + 5):
        live.finished(Choice(f"r{number}", 0, "default", TARGETS, layers=[row()]))
    shown = live.requests()
    assert len(shown) == live_module.REQUESTS_KEPT
    assert shown[0]["request_id"] == f"r{live_module.REQUESTS_KEPT + 4}"
    assert "layers" not in shown[0]
    assert shown[0]["setting"] == "default"
    assert len(live.v_rows_per_second()) == 60


def test_seconds_show_what_was_saved_and_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000
    monkeypatch.setattr(live_module.time, "time", lambda: now)
    live = Live(log=False)
    for rows in (1, 3):
        live.counted(0, row(rows=rows, v_rows_scored=9, v_rows_read=2, kept_mass=MASS_UNIT))
    now = 1002
    *_, busy, idle = live.v_rows_per_second()
    assert busy == {"second": 1000, "read": 4, "saved": 14, "kept_mass": 0.5}
    assert idle == {"second": 1001, "read": 0, "saved": 0, "kept_mass": None}


SERVER = """
import os, sys
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from vllm_toptheta.telemetry.prometheus import Metrics

Metrics("m", {"min_prob": sys.argv[1]}, CollectorRegistry())
shown = CollectorRegistry()
MultiProcessCollector(shown)
print(generate_latest(shown).decode())
mark_process_dead(os.getpid())  # as vLLM does where a server ends
"""


def test_a_restart_with_other_options_leaves_no_info_behind(tmp_path: Path) -> None:
    """Several API servers keep their metrics in a folder, which may outlive them."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for min_prob in ("0.001", "0.002"):
        command = [sys.executable, "-c", SERVER, min_prob]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    series = [line for line in done.stdout.splitlines() if line.startswith("vllm_toptheta_info{")]
    assert series == ['vllm_toptheta_info{min_prob="0.002",model_name="m"} 1.0']
