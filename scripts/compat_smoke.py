"""Asks one vLLM for everything that another version could break, and writes what it said as JSON:
two versions must say the same. Usage: python scripts/compat_smoke.py OUTPUT.json; the server's log
lies beside it.
"""

import json
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from fetch_model import fetch
from server import Server

ROOT = Path(__file__).parents[1]
TEXT = pydoc_data.topics.topics["exceptions"][:4000]
OPTIONS = {"k": 64, "min_kv_len": 256}
ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def post(base: str, path: str, **fields: Any) -> str:
    """The answer's body; urllib's error where the status is one."""
    body = {"model": "m", "temperature": 0, "max_tokens": 16, **fields}
    request = urllib.request.Request(
        base + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        return str(answer.read().decode())


def get(base: str, path: str) -> str:
    """A document of the server."""
    with urllib.request.urlopen(base + path, timeout=60) as answer:
        return str(answer.read().decode())


def serve(model: Path, log: Path) -> dict[str, Any]:
    """What a server says: plain and streamed answers, "off", a refusal, metrics, the page."""
    args = ("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager")
    args += ("--kv-cache-memory-bytes", str(1 << 28), "--served-model-name", "m")
    env = {**ENV, "VLLM_PLUGINS": "toptheta"}
    server = Server(model, *args, toptheta=OPTIONS, log_path=log, env=env)
    try:
        return ask(server.wait_ready(1800).url.removesuffix("/v1"))
    finally:
        server.stop()


def ask(base: str) -> dict[str, Any]:
    """The same of a server that runs, `base` its address."""
    said: dict[str, Any] = {}
    for name, xargs in (("completion", {}), ("off", {"toptheta": "off"})):
        fields = {"prompt": TEXT, "ignore_eos": True, "vllm_xargs": xargs}
        answer = json.loads(post(base, "/v1/completions", **fields))
        said[name] = [answer["choices"][0]["text"], answer["usage"], answer["toptheta"]]
    assert said["off"][2]["dense_rows"]["off"] > 0
    assert 0 < said["completion"][2]["kept_mass"] < 1

    chat = {"messages": [{"role": "user", "content": TEXT}], "stream": True}
    lines = post(base, "/v1/chat/completions", stream_options={"include_usage": True}, **chat)
    chunks = [json.loads(line[6:]) for line in lines.splitlines() if line.startswith("data: {")]
    texts = [choice["delta"].get("content") for one in chunks for choice in one["choices"]]
    (usage,) = (one["usage"] for one in chunks if one.get("usage"))
    (counts,) = (one["toptheta"] for one in chunks if one.get("toptheta"))
    said["chat"] = ["".join(filter(None, texts)), usage, counts]

    try:
        post(base, "/v1/completions", prompt="a", vllm_xargs={"toptheta_k": 0.5})
    except urllib.error.HTTPError as error:
        said["refusal"] = [error.code, "toptheta" in error.read().decode()]
    assert said["refusal"] == [400, True]

    metrics = [line.split() for line in get(base, "/metrics").splitlines()]
    said["metrics"] = {
        line[0]: float(line[-1])
        for line in metrics
        if line[0].startswith("vllm_toptheta_") and "_total{" in line[0]
    }
    assert said["metrics"]
    assert "<html" in get(base, "/toptheta")
    return said


def offline(model: Path) -> Any:
    """Tokens and counts of `LLM.generate`, one long prompt and one short."""
    toptheta = {"attention_backend": "toptheta", "additional_config": {"toptheta": OPTIONS}}
    prompts = [[100 + i * 7 % 3000 for i in range(n)] for n in (700, 40)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answers.json"
        engines = json.dumps([toptheta])
        program = ROOT / "tests/e2e/generate.py"
        command = [sys.executable, program, output, model, json.dumps(prompts), "16", engines]
        subprocess.run(command, check=True, env={**os.environ, **ENV, **IN_PROCESS})
        return json.loads(output.read_text())


def main() -> None:
    """Ask both."""
    model, output = fetch(), Path(sys.argv[1])
    said = {"served": serve(model, output.with_suffix(".log")), "offline": offline(model)}
    output.write_text(json.dumps(said, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
