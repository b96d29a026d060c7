"""Hours in minutes: a real server under mixed load, and whether its counts still add up.

Clients send prompts of all lengths with every setting of the dial, whole and streamed, several
choices at once, wrong options, streams that they leave in the middle, and connections that are cut
before the answer; the cache is small, so that requests are preempted. In the end what responses
said is held against the metrics.

    .venv/bin/python -m benchmarks.soak --minutes 10 --json soak.json

Exit status 1 where a count, a request or memory was lost.
"""

import argparse
import asyncio
import json
import pydoc_data.topics
import random
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import APIError, AsyncOpenAI, BadRequestError
from prometheus_client.parser import text_string_to_metric_families

from scripts.fetch_model import fetch
from scripts.server import Server

COUNTED = ("rows", "keys_scored", "keys_kept", "v_rows_scored", "v_rows_read", "rows_lifted")
DIALS: list[dict[str, Any]] = [
    {},
    {"toptheta_min_prob": 0.01},
    {"toptheta_min_prob": 0.0003, "toptheta_min_mass": 0.8},
    {"toptheta_k": 64},
    {"toptheta": "off"},
    {"toptheta_layers": True},
]
WRONG: list[dict[str, Any]] = [
    {"toptheta_min_prob": 5},
    {"toptheta_k": 1e9},
    {"toptheta_typo": 1},
    {"toptheta": "maybe"},
]
TEXT = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
MAX_GROWTH = 1.05
"""Of the memory of the servers and the engine, from a third of the time to its end. Workers are
left out: on a CPU stock vLLM's grow for as long, by their allocator."""


class Soak:
    """The load, and what it saw.

    Attributes:
        sent: requests by kind.
        shown: sums over all responses that carried counts.
        lost: what should not have happened.
    """

    def __init__(self, url: str, model: str, seed: int) -> None:
        self.client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        self.url, self.model, self.random = url, model, random.Random(seed)
        self.sent: Counter[str] = Counter()
        self.shown: Counter[str] = Counter()
        self.lost: list[str] = []

    async def worker(self, deadline: float) -> None:
        """Send one request after another."""
        kinds: list[Callable[[dict[str, Any]], Coroutine[Any, Any, None]]] = [
            self.whole,
            self.whole,
            self.stream,
            self.stream,
            self.left_stream,
            self.cut,
            self.wrong,
        ]
        while time.monotonic() < deadline:
            send = self.random.choice(kinds)
            start = self.random.randrange(len(TEXT) - 9000)
            length = int(10 ** self.random.uniform(1.5, 3.9))  # characters, 3 to 2000 tokens
            body = {
                "model": self.model,
                "prompt": f"{self.random.random()} {TEXT[start : start + length]}",
                "max_tokens": self.random.randint(1, 48),
                "extra_body": {
                    "ignore_eos": True,
                    "vllm_xargs": self.random.choice(DIALS),
                },
            }
            self.sent[send.__name__] += 1
            try:
                await send(body)
            except (APIError, httpx.HTTPError, AssertionError, AttributeError) as error:
                self.lost.append(f"{send.__name__}: {type(error).__name__}: {str(error)[:200]}")

    def add(self, answer: Any) -> None:
        """Count what a response says; it must say it."""
        counts = answer.toptheta
        self.shown.update({name: counts[name] for name in COUNTED})

    async def whole(self, body: dict[str, Any]) -> None:
        n = self.random.choice([1, 1, 1, 3])
        self.add(await self.client.completions.create(**body, n=n))

    async def stream(self, body: dict[str, Any]) -> None:
        last = None
        async for chunk in await self.client.completions.create(**body, stream=True):
            last = chunk
        self.add(last)

    async def left_stream(self, body: dict[str, Any]) -> None:
        """Left at its first chunk, long before the one with the counts."""
        stream = await self.client.completions.create(**{**body, "max_tokens": 400}, stream=True)
        async for _ in stream:
            break
        await stream.close()

    async def cut(self, body: dict[str, Any]) -> None:
        """A client that is gone long before its answer, as one that was killed: nobody is told."""
        raw = {**body, **body.pop("extra_body"), "max_tokens": 400}
        async with httpx.AsyncClient(timeout=600) as client:
            task = asyncio.create_task(client.post(f"{self.url}/completions", json=raw))
            await asyncio.sleep(self.random.uniform(0, 1.0))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled(), "answered before it was cut"

    async def wrong(self, body: dict[str, Any]) -> None:
        body["extra_body"]["vllm_xargs"] = self.random.choice(WRONG)
        try:
            await self.client.completions.create(**body)
        except BadRequestError:
            return
        raise AssertionError(f"not refused: {body['extra_body']}")


def metrics_of(url: str) -> dict[str, float]:
    """vLLM's and our metrics; of ours what responses reported by count."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        text = answer.read().decode()
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name
            if name == "vllm_toptheta_reported_total":
                name = f"reported {sample.labels['count']}"
            found[name] += sample.value
    return dict(found)


def memory_of(pid: int) -> int:
    """Bytes of a process and all below it but the workers."""
    root = psutil.Process(pid)
    every = (root, *root.children(recursive=True))
    return sum(one.memory_info().rss for one in every if "Worker" not in one.name())


async def run(args: argparse.Namespace, server: Server, model: str) -> dict[str, Any]:
    """The load for its time, then rest; what is to be reported."""
    soak = Soak(server.url, model, args.seed)
    start = time.monotonic()
    deadline = start + args.minutes * 60
    workers = [asyncio.create_task(soak.worker(deadline)) for _ in range(args.clients)]
    memory = []
    while time.monotonic() < deadline:
        await asyncio.sleep(5)
        memory.append((round(time.monotonic() - start), memory_of(server.pid)))
    await asyncio.gather(*workers)
    for _ in range(60):
        metrics = await asyncio.to_thread(metrics_of, server.url)
        if metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"] == 0:
            break
        await asyncio.sleep(1)
    await asyncio.sleep(3)  # the last counts are on their way
    metrics = await asyncio.to_thread(metrics_of, server.url)
    problems = list(soak.lost)
    for name in COUNTED:
        if (said := metrics.get(f"reported {name}", 0)) != soak.shown[name]:
            problems.append(f"{name}: responses said {soak.shown[name]}, the metrics {said:g}")
    for name in ("num_requests_running", "num_requests_waiting"):
        if metrics[f"vllm:{name}"]:
            problems.append(f"{name} is {metrics[f'vllm:{name}']:g} at rest")
    if errors := metrics.get("vllm_toptheta_telemetry_errors_total", 0):
        problems.append(f"{errors:g} errors of telemetry")
    settled = [size for second, size in memory if second >= args.minutes * 20]
    growth = settled[-1] / settled[0]
    if growth > MAX_GROWTH:
        problems.append(f"memory grew by {growth - 1:.1%}")
    return {
        "minutes": args.minutes,
        "requests": sum(soak.sent.values()),
        "by kind": dict(soak.sent),
        "preemptions": metrics["vllm:num_preemptions_total"],
        "counted": {name: soak.shown[name] for name in COUNTED},
        "memory growth": round(growth - 1, 4),
        "MiB by second": [
            (second, size >> 20) for second, size in memory[:: max(len(memory) // 12, 1)]
        ],
        "problems": problems,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=12, help="requests under way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = args.model or fetch()
    options = ["--max-model-len", "3072", "--enforce-eager", "--max-num-seqs", "8"]
    options += ["--kv-cache-memory-bytes", str(96 << 20), "--dtype", "bfloat16"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        server = Server(model, *options, toptheta={"min_kv_len": 256}, log_path=log)
        with server:
            result = asyncio.run(run(args, server, str(model)))
            if result["problems"]:
                print(server.tail(2000), file=sys.stderr)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(result["problems"]))


if __name__ == "__main__":
    sys.exit(main())
