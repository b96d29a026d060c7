"""Reads metrics: from a server's /metrics, and through a real Prometheus."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

PREFIX = "vllm_toptheta_"


def read_metrics(base: str) -> dict[tuple[str, str], float]:
    """Counters of the package by name and value of their own label ("" where they have none).

    Args:
        base: URL of the server.
    """
    with urllib.request.urlopen(f"{base}/metrics") as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            own = set(sample.labels) - {"model_name", "engine", "pid"}
            if sample.name.startswith(PREFIX) and len(own) <= 1:
                label = sample.labels[own.pop()] if own else ""
                found[sample.name.removeprefix(PREFIX), label] = sample.value
    return found


def read_metric(base: str, name: str) -> float:
    """The sum over a series of vLLM's own."""
    with urllib.request.urlopen(f"{base}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def wait_until_idle(base: str) -> None:
    """Wait until no request runs and no count moves."""
    last: object = None
    for _ in range(120):
        now = read_metrics(base)
        running = read_metric(base, "vllm:num_requests_running")
        if running == 0 and now == last:
            return
        last = now
        time.sleep(1)
    raise AssertionError("the server does not come to rest")


class Prometheus:
    """A real Prometheus that scrapes one server every second.

    Attributes:
        url: its address.
    """

    def __init__(self, target: str, folder: Path, configuration: str | None = None) -> None:
        """Start it.

        Args:
            target: host and port of the server.
            folder: takes its files; rules that the configuration names are there already.
            configuration: of Prometheus; one that only scrapes unless given.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.url = f"http://{address}"
        config = folder / "prometheus.yml"
        config.write_text(
            configuration
            or "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
            "scrape_configs:\n"
            f"- {{job_name: vllm, static_configs: [{{targets: ['{target}']}}]}}\n"
        )
        self._log = (folder / "prometheus.log").open("wb")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Evaluate PromQL now: labels and value of every series."""
        arguments = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{arguments}") as answer:
            result = json.load(answer)["data"]["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def value(self, expression: str) -> float:
        """Evaluate PromQL that gives one number; 0 where there is no series."""
        return sum(value for _, value in self.query(expression))

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)
        self._log.close()


@contextlib.contextmanager
def prometheus(
    base: str, folder: Path, configuration: str | None = None
) -> Iterator[Prometheus | None]:
    """A Prometheus for a server; None where the program is missing."""
    if shutil.which("prometheus") is None:
        yield None
        return
    server = Prometheus(base.removeprefix("http://"), folder, configuration)
    try:
        yield server
    finally:
        server.stop()
