"""Real servers for the end-to-end tests, each started once."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

from openai import OpenAI  # noqa: E402
from server import Server  # noqa: E402


def _cpus() -> str:
    """Of the servers that this process starts: where tests run side by side, a part of all."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    cpus = os.cpu_count() or 1
    each = max(cpus // count, 1)
    first = worker * each % cpus
    return f"{first}-{first + each - 1}"


ENV = {"VLLM_CPU_OMP_THREADS_BIND": _cpus()}
OPTIONS = ["--dtype", "float32", "--max-model-len", "2048", "--kv-cache-memory-bytes", str(1 << 29)]
ONE_THREAD = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""For tiny models and interpreted kernels, whose threads wait for each other; a rank."""
KEEP_ALL = 1e-300
"""A min_prob that every key reaches: the whole Top-theta path, and dense answers."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


def serve(model: Path, folder: Path, *args: str, toptheta: dict[str, Any] | None) -> Server:
    return Server(
        model, *OPTIONS, *args, toptheta=toptheta, log_path=folder / "server.log", env=ENV
    )


def client_of(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="none", timeout=600, max_retries=0)


def toptheta(**options: Any) -> dict[str, Any]:
    """Arguments of `LLM` for an engine with Top-theta."""
    return {"attention_backend": "toptheta", "additional_config": {"toptheta": options}}


def run_program(
    *command: object, env: dict[str, str] = ONE_THREAD, timeout: int = 600
) -> subprocess.CompletedProcess[str]:
    """Run a Python program that must succeed."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **env},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def generate(
    model: Path,
    prompts: list[list[int]],
    max_tokens: int,
    engines: list[dict[str, Any]],
    env: dict[str, str] = ENV,
) -> list[list[dict[str, Any]]]:
    """What every engine generates for the prompts, and its summaries; see `generate.py`."""
    script = Path(__file__).with_name("generate.py")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answers.json"
        arguments = [output, model, json.dumps(prompts), str(max_tokens), json.dumps(engines)]
        run_program(script, *arguments, env=env)
        answers: list[list[dict[str, Any]]] = json.loads(output.read_text())
    return answers


@pytest.fixture(scope="module")
def stock(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """Stock vLLM."""
    folder = tmp_path_factory.mktemp("stock")
    with serve(smollm2, folder, "--enforce-eager", toptheta=None) as server:
        yield client_of(server)


@pytest.fixture(scope="module")
def keep_all(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """Top-theta that keeps everything, with little KV memory and small prefill chunks."""
    folder = tmp_path_factory.mktemp("keep_all")
    tight = ["--num-gpu-blocks-override", "17", "--max-num-batched-tokens", "256"]
    # Keys that K itself scores, as stock does.
    options = {"thresholds": "none", "min_prob": KEEP_ALL, "min_kv_len": 0, "k_sketch": False}
    with serve(smollm2, folder, "--enforce-eager", *tight, toptheta=options) as server:
        yield client_of(server)


@pytest.fixture(scope="module")
def pruning(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """Top-theta with the shipped table, compiled by vLLM."""
    folder = tmp_path_factory.mktemp("pruning")
    options = {"k": 64, "min_kv_len": 256}
    with serve(smollm2, folder, toptheta=options) as server:
        yield client_of(server)
