"""The deployment, as far as it runs without containers: the image's entry script serves with
compose's arguments, a real Prometheus with the shipped configuration scrapes it under load, and
every query has an answer.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.conftest import ENV, OPTIONS
from e2e.load import TEXT
from e2e.scrape import Prometheus, prometheus
from openai import OpenAI
from server import Server
from tables import save_table

DOCKER = Path(__file__).parent.parent.parent / "docker"
KEY = "key-of-the-deployment"
IMAGE_ENV = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "VLLM_PLUGINS": "toptheta",
    "VLLM_API_KEY": KEY,
}


def compose_arguments() -> list[str]:
    """What compose.yaml passes after the model, with the defaults of its variables."""
    command = yaml.safe_load((DOCKER / "compose.yaml").read_text())["x-server"]["command"]
    return [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", argument) for argument in command[1:]]


def with_options(argument: str, **more: str) -> str:
    """The same argument; options of the plug-in with some more."""
    name, _, value = argument.partition("=")
    if name != "--additional-config":
        return argument
    options = json.loads(value)["toptheta"]
    return f"{name}={json.dumps({'toptheta': {**options, **more}})}"


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("deployment")
    env = {**ENV, **IMAGE_ENV, "TOPTHETA_HOME": str(folder)}
    # A table, so that requests may ask for a k, and pruned prompts: every panel has data.
    table = save_table(smollm2, folder / "table.safetensors")
    arguments = [
        with_options(argument, thresholds=str(table), phases="both")
        for argument in compose_arguments()
    ]
    # Last wins: a short context and little memory keep the test small.
    arguments += [*OPTIONS, "--enforce-eager"]
    with Server(
        smollm2,
        *arguments,
        log_path=folder / "server.log",
        env=env,
        program=[DOCKER / "entrypoint"],
    ) as server:
        yield server


def base(server: Server) -> str:
    return server.url.removesuffix("/v1")


def status(server: Server, path: str, key: str | None = None) -> int:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(base(server) + path, headers=headers)
        ) as r:
            return int(r.status)
    except urllib.error.HTTPError as error:
        return error.code


def load(server: Server) -> None:
    """Long and short requests, with every setting, for some time."""
    client = OpenAI(base_url=server.url, api_key=KEY, timeout=600, max_retries=0)
    model = client.models.list().data[0].id
    extras: list[dict[str, Any]] = [{}, {"toptheta_k": 64}, {"toptheta": "off"}]
    extras.append({"toptheta_min_prob": 0.01, "toptheta_min_mass": 0.6})

    def send(number: int) -> None:
        # A common start of more than min_kv_len tokens comes from the prefix cache.
        text = TEXT[:5600] if number % 4 else TEXT[:300]
        client.completions.create(
            model=model,
            prompt=f"{text} {number}",
            max_tokens=24,
            temperature=0,
            extra_body={"ignore_eos": True, "vllm_xargs": extras[number // 4 % 4]},
        )

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(send, range(16)))


@dataclass
class Scraped:
    """A Prometheus with shipped configuration and rules, after a load."""

    prometheus: Prometheus

    def rules(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.prometheus.url}/api/v1/rules") as answer:
            groups = json.load(answer)["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def problem(self, expression: str) -> str | None:
        """Why a query shows nothing; None where it has numbers."""
        values = [value for _, value in self.prometheus.query(expression)]
        if not values:
            return "no series"
        return None if any(math.isfinite(value) for value in values) else f"only {values}"


@pytest.fixture(scope="module")
def scraped(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "rules").symlink_to(DOCKER / "prometheus" / "rules")
    configuration = (DOCKER / "prometheus" / "prometheus.yml").read_text()
    assert "vllm:8000" in configuration
    configuration = configuration.replace("vllm:8000", base(server).removeprefix("http://"))
    configuration = configuration.replace("15s", "1s")
    with prometheus(base(server), folder, configuration) as scraper:
        if scraper is None:
            pytest.skip("needs the program prometheus: apt-get install prometheus")
        time.sleep(3)  # counters are seen at rest before they move
        load(server)
        time.sleep(4)
        yield Scraped(scraper)


def dashboard_queries() -> list[tuple[str, str]]:
    """Panel and expression of every query, with the variables filled in."""
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "toptheta.json").read_text())
    values = {"$__rate_interval": "1m", "$instance": ".+", "$model": ".+"}
    found = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in values.items():
                expression = expression.replace(name, value)
            found.append((panel["title"], expression))
    return found


def test_the_entry_script_serves_with_toptheta(server: Server) -> None:
    with urllib.request.urlopen(base(server) + "/metrics") as answer:
        text = answer.read().decode()
    info = next(line for line in text.splitlines() if line.startswith("vllm_toptheta_info{"))
    assert 'min_prob="0.001"' in info


def test_the_health_check_says_how_it_is(server: Server) -> None:
    port = base(server).rsplit(":", 1)[1]
    for number, healthy in ((port, True), ("9", False)):
        command = [sys.executable, str(DOCKER / "healthcheck.py")]
        done = subprocess.run(command, env={**os.environ, "PORT": number}, capture_output=True)
        assert (done.returncode == 0) == healthy, done.stderr


def test_the_key_from_the_environment_guards_requests_and_data(server: Server) -> None:
    for path in ("/v1/models", "/toptheta/stats", "/toptheta/config", "/toptheta/thresholds"):
        assert status(server, path) == 401, path
        assert status(server, path, "wrong") == 401, path
        assert status(server, path, KEY) == 200, path
    for path in ("/health", "/metrics", "/toptheta"):
        assert status(server, path) == 200, path


def test_every_query_of_the_dashboard_returns_data(scraped: Scraped) -> None:
    queries = dashboard_queries()
    assert len(queries) > 20
    problems = [f"{title}: {why}: {q}" for title, q in queries if (why := scraped.problem(q))]
    assert not problems, "\n".join(problems)


def test_every_rule_evaluates_and_finds_its_series(scraped: Scraped) -> None:
    rules = scraped.rules()
    assert len(rules) == 17
    problems = []
    for rule in rules:
        assert rule["health"] == "ok", rule
        if rule["type"] == "recording":
            names = {rule["name"]}
        else:  # an alert's own expression is empty while all is well
            names = set(
                re.findall(r"\b(?:vllm_toptheta_\w+|vllm:\w+|toptheta:[\w:]+)", rule["query"])
            )
        problems += [f"{rule['name']}: {n}: {why}" for n in names if (why := scraped.problem(n))]
    assert not problems, "\n".join(problems)


def test_a_healthy_server_raises_no_alert(scraped: Scraped) -> None:
    firing = [rule["name"] for rule in scraped.rules() if rule.get("state") == "firing"]
    assert firing == []


def test_metrics_tell_nothing_of_a_prompt(server: Server, scraped: Scraped) -> None:
    with urllib.request.urlopen(base(server) + "/metrics") as answer:
        text = answer.read().decode()
    assert not any(TEXT[i : i + 20] in text for i in range(0, 5600, 10))
    assert KEY not in text
