"""Rules and dashboard: promtool's own checks and unit tests, and names that exist."""

import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from vllm_toptheta.telemetry.prometheus import Metrics

DOCKER = Path(__file__).parent.parent.parent / "docker"
RULES = sorted((DOCKER / "prometheus/rules").glob("*.yml"))
TESTS = sorted((DOCKER / "prometheus/tests").glob("*.yml"))
DASHBOARD = DOCKER / "grafana/dashboards/toptheta.json"


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", str(DOCKER / "prometheus/prometheus.yml")],
        ["check", "rules", *map(str, RULES)],
        ["test", "rules", *map(str, TESTS)],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_promtool(arguments: list[str]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool: apt-get install prometheus")
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_unit_tested_both_ways() -> None:
    names = set(re.findall(r"alert: (\w+)", "".join(path.read_text() for path in RULES)))
    assert names
    silent = set(
        re.findall(r"alertname: (\w+)", (DOCKER / "prometheus/tests/healthy.yml").read_text())
    )
    firing = (DOCKER / "prometheus/tests/firing.yml").read_text()
    fired = set(re.findall(r"alertname: (\w+)\n\s+eval_time: \w+\n\s+exp_alerts", firing))
    fired |= set(re.findall(r'alertname="(\w+)", alertstate="firing", job', firing))
    assert silent == fired == names


def test_rules_and_dashboard_name_series_that_exist() -> None:
    registry = CollectorRegistry()
    Metrics("m", {"min_prob": "0.001"}, registry=registry)
    exist = set()
    for family in registry.collect():
        exist |= {
            family.name,
            *(family.name + end for end in ("_total", "_bucket", "_sum", "_count")),
        }
    text = "".join(path.read_text() for path in (*RULES, DASHBOARD))
    used = set(re.findall(r"\bvllm_toptheta_\w+", text))
    assert len(used) > 8
    assert used <= exist
    recorded = set(re.findall(r"record: (\S+)", "".join(path.read_text() for path in RULES)))
    assert set(re.findall(r"\btoptheta:[\w:]+", text)) <= recorded


def test_the_dashboard_is_what_its_script_writes() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="pip install grafana-foundation-sdk")
    made = runpy.run_path(str(DOCKER / "grafana/make_dashboard.py"))["make"]()
    assert made == DASHBOARD.read_text(), "run docker/grafana/make_dashboard.py"


def test_the_dashboard_reads_back_with_the_sdk() -> None:
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    content = json.loads(DASHBOARD.read_text())
    dashboard = models.Dashboard.from_json(content)
    assert dashboard.uid == "toptheta"
    identifiers = [panel["id"] for panel in content["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    for panel in content["panels"]:
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["description"]
            assert panel["targets"]
