"""The server of the tests of counts: how it starts, what it is asked, what it leaves behind."""

import asyncio
import json
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.conftest import ENV, OPTIONS
from e2e.load import SHOWN, Load, Recount, Sent
from openai import AsyncOpenAI, OpenAI
from server import Server
from tables import save_table

KEY = "secret-of-the-test"
NUM_REQUESTS = int(os.environ.get("TOPTHETA_LOAD", "65"))


@dataclass
class Running:
    """A server with the test plug-in.

    Attributes:
        base: its URL.
        client: for it.
        model: name of the model.
        recount: file of the recount.
        broken: telemetry fails while this file exists.
        log: file of its log.
    """

    base: str
    client: OpenAI
    model: str
    recount: Path
    broken: Path
    log: Path

    def get(self, path: str, key: str | None = KEY) -> Any:
        """A JSON document of the server."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with urllib.request.urlopen(urllib.request.Request(self.base + path, headers=headers)) as r:
            return json.load(r)


def start(model: Path, folder: Path, *args: str, env: dict[str, str] | None = None) -> Server:
    table = save_table(model, folder / "table.safetensors")
    options = {"thresholds": str(table), "min_prob": 0.02, "min_kv_len": 32, "max_k": 128}
    recount = str(Path(__file__).parent / "recount")
    plug_ins = {
        **ENV,
        "PYTHONPATH": os.pathsep.join([recount, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TOPTHETA_RECOUNT": str(folder / "recount.jsonl"),
        "TOPTHETA_BREAK": str(folder / "broken"),
        **(env or {}),
    }
    more = ["--enforce-eager", "--max-num-seqs", "32", "--api-key", KEY, *args]
    return Server(
        model, *OPTIONS, *more, toptheta=options, log_path=folder / "server.log", env=plug_ins
    )


@dataclass
class Outcome:
    """What a load left behind.

    Attributes:
        sent: the requests.
        metrics: counters at rest.
        scraped: what Prometheus says they are; None without one.
        recount: of the kernel's tensors.
    """

    sent: list[Sent]
    metrics: dict[tuple[str, str], float]
    scraped: dict[tuple[str, str], float] | None
    recount: Recount


def send(base: str, model: str) -> list[Sent]:
    async def go() -> list[Sent]:
        client = AsyncOpenAI(base_url=base + "/v1", api_key=KEY, timeout=900, max_retries=0)
        return await Load(client, model).send(NUM_REQUESTS)

    return asyncio.run(go())


def totals(metrics: dict[tuple[str, str], float], reported: bool = False) -> dict[str, float]:
    """Counters by name, as `counts` names them."""
    dense = ("short", "window", "layer", "off")
    if reported:
        result = {name: metrics["reported_total", name] for name in SHOWN}
        return result | {"dense": sum(metrics["reported_total", f"dense_{r}"] for r in dense)}
    result = {name: metrics[f"{name}_total", ""] for name in SHOWN}
    return result | {"dense": sum(metrics["dense_rows_total", reason] for reason in dense)}


def post(running: Running, path: str, **fields: Any) -> bytes:
    """The answer to a JSON body; urllib's error where it is one."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    body = json.dumps({"model": running.model, **fields}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(running.base + path, body, headers)
    ) as answer:
        return bytes(answer.read())


ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "One two"}]},
    "/v1/chat/completions/batch": {"messages": [[{"role": "user", "content": "One two"}]] * 2},
    "/v1/completions": {"prompt": "One two"},
    "/v1/responses": {"input": "One two", "max_output_tokens": 8},
    "/v1/messages": {"messages": [{"role": "user", "content": "One two"}]},
    "/invocations": {"prompt": "One two"},
    "/inference/v1/generate": {"token_ids": [5, 6, 7]},
}
STREAMED = [path for path in ASKED if path not in ("/v1/chat/completions/batch",)]


def asked(path: str, **options: Any) -> dict[str, Any]:
    fields = dict(ASKED[path])
    if path == "/inference/v1/generate":
        params = {"max_tokens": 8, "ignore_eos": True, "extra_args": options}
        return fields | {"sampling_params": params}
    return fields | {"max_tokens": 8, "vllm_xargs": options}
