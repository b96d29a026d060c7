"""Hours in minutes: a real server under mixed load, and whether its counts still add up.

Clients of two API servers send prompts of all lengths with every setting of the dial, whole and
streamed, several choices at once, prompts echoed and scored, wrong options, streams that they leave
in the middle, and are killed before the answer; the cache is small, so that requests are preempted.
In the end what responses said is held against the metrics, and the server's processes are looked
through for requests that they still hold.

    .venv/bin/python -m benchmarks.soak --minutes 10 --json soak.json

Exit status 1 where a count, a request or memory was lost, or nothing was preempted.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pydoc_data.topics
import random
import re
import signal
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

from benchmarks.watch import toptheta_watch
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
OPTIONS = ["--max-model-len", "4096", "--enforce-eager", "--max-num-seqs", "16"]
# Blocks of 128: too few for so many requests, some of whom ask for LEFT_TOKENS.
OPTIONS += ["--kv-cache-memory-bytes", str(256 << 20), "--num-gpu-blocks-override", "34"]
OPTIONS += ["--dtype", "bfloat16", "--api-server-count", "2"]
OPTIONS += ["--middleware", "toptheta_watch.Around"]
LEFT_TOKENS = 1500
"""Of answers that are not waited for: so many that hardly any is complete when its client is gone,
which may come to its turn seconds late where cores are few."""
MAX_COMPLETE = 0.2
"""Of four sequences for each client that left. A server that does not notice completes all that
there are, a quarter at least; how late one that does notice comes depends on the machine."""
TEXT = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
MAX_GROWTH = 0.05
"""Of the memory of the servers and the engine, from a third of the time to its end. Workers are
left out: on a CPU stock vLLM's grow for as long, by their allocator."""
MAX_HELD = 8
"""Objects of a kind that a process at rest may hold: its loops keep the last one they served."""


class Soak:
    """The load, and what it saw.

    Attributes:
        sent: requests by kind.
        shown: sums over all responses that carried counts.
        sequences: that answers had.
        rows_of_a_token: layers times heads.
        lost: what should not have happened.
    """

    def __init__(self, url: str, model: str, seed: int, longest: int) -> None:
        # A connection for each request: one that waits is closed after 5 s, perhaps just when it is
        # used again, and both servers get their share.
        http = httpx.AsyncClient(limits=httpx.Limits(max_keepalive_connections=0), timeout=600)
        self.client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=http)
        self.url, self.model, self.random = url, model, random.Random(seed)
        self.longest = longest
        self.sent: Counter[str] = Counter()
        self.shown: Counter[str] = Counter()
        self.sequences = 0
        self.rows_of_a_token = 0
        self.lost: list[str] = []

    async def worker(self, deadline: float, requests: float) -> None:
        """Send one request after another."""
        kinds: list[Callable[[dict[str, Any]], Coroutine[Any, Any, None]]] = [
            self.whole,
            self.whole,
            self.stream,
            self.stream,
            self.left_stream,
            self.killed,
            self.wrong,
        ]
        while time.monotonic() < deadline and self.sent.total() < requests:
            send = self.random.choice(kinds)
            start = self.random.randrange(len(TEXT) - self.longest)
            length = int(self.longest ** self.random.uniform(0.4, 1))
            body = {
                "model": self.model,
                "prompt": f"{self.random.random()} {TEXT[start : start + length]}",
                "max_tokens": self.random.randint(1, 48),
                "n": self.random.choice([1, 1, 1, 4]),
                "extra_body": {
                    "ignore_eos": True,
                    "vllm_xargs": self.random.choice(DIALS),
                },
            }
            self.sent[send.__name__] += 1
            try:
                await send(body)
            except (APIError, OSError, AssertionError, AttributeError) as error:
                self.lost.append(f"{send.__name__}: {type(error).__name__}: {str(error)[:200]}")

    def add(self, answer: Any) -> None:
        """Count what a response says; it must say it, of every choice."""
        counts = answer.toptheta
        for name in COUNTED:
            parts = [choice[name] for choice in counts.get("choices", [counts])]
            assert sum(parts) == counts[name], f"choices are not the {name} of {counts}"
        sequences = len(counts.get("choices", [counts]))
        self.sequences += sequences
        if answer.usage and (tokens := answer.usage.completion_tokens - sequences):
            self.rows_of_a_token = max(self.rows_of_a_token, counts["rows"] // tokens)
        self.shown.update({name: counts[name] for name in COUNTED})

    async def whole(self, body: dict[str, Any]) -> None:
        prompt = self.random.choice([{}, {}, {"echo": True}, {"prompt_logprobs": 1}])
        extra = {**body.pop("extra_body"), **prompt}
        self.add(await self.client.completions.create(**body, extra_body=extra))

    async def stream(self, body: dict[str, Any]) -> None:
        last = None
        async for chunk in await self.client.completions.create(**body, stream=True):
            last = chunk
        self.add(last)

    async def left_stream(self, body: dict[str, Any]) -> None:
        """Left at its first chunk, long before the one with the counts."""
        body["max_tokens"] = LEFT_TOKENS
        stream = await self.client.completions.create(**body, stream=True)
        async for _ in stream:
            break
        await stream.close()

    async def killed(self, body: dict[str, Any]) -> None:
        """A client that is killed before its answer: nobody is told."""
        options = body.pop("extra_body")
        content = json.dumps({**body, **options, "max_tokens": LEFT_TOKENS}).encode()
        request = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(content)}\r\n"
        request += "Content-Type: application/json\r\n\r\n"
        host, port = self.url.split("/")[2].split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(request.encode() + content)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), self.random.uniform(0.1, 1.0))
        finally:
            writer.transport.abort()  # what the kernel does for a process that is gone

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
            elif name == "vllm:request_success_total":
                name = f"finished {sample.labels['finished_reason']}"
            found[name] += sample.value
    return dict(found)


def memory_of(pid: int) -> int:
    """Bytes of a process and all below it but the workers."""
    root = psutil.Process(pid)
    every = (root, *root.children(recursive=True))
    return sum(one.memory_info().rss for one in every if "Worker" not in one.name())


def held_by(folder: Path) -> dict[int, dict[str, int]]:
    """Objects of single requests by process, see `watch`.

    Raises:
        TimeoutError: a process says nothing.
    """
    asked = [path for path in folder.glob("*.json") if psutil.pid_exists(int(path.stem))]
    for path in asked:
        path.write_text("")
        os.kill(int(path.stem), signal.SIGUSR2)
    deadline = time.monotonic() + 60
    while not all(path.read_text() for path in asked):
        if time.monotonic() > deadline:
            raise TimeoutError("a process of the server does not say what it holds")
        time.sleep(0.2)
    return {int(path.stem): json.loads(path.read_text()) for path in asked}


async def at_rest(url: str) -> dict[str, float]:
    """The metrics when nothing runs and no count moves, or after a minute."""
    before: dict[str, float] = {}
    for _ in range(30):
        metrics = await asyncio.to_thread(metrics_of, url)
        busy = metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]
        ours = {name: number for name, number in metrics.items() if "toptheta" in name}
        if not busy and ours == before:
            break
        before = ours
        await asyncio.sleep(2)
    return metrics


async def load(
    server: Server, soak: Soak, minutes: float, requests: float, clients: int
) -> dict[str, Any]:
    """Send requests until one of the bounds, then rest; what is to be reported."""
    start = time.monotonic()
    deadline = start + minutes * 60
    workers = [asyncio.create_task(soak.worker(deadline, requests)) for _ in range(clients)]
    memory = []
    while not all(worker.done() for worker in workers):
        await asyncio.wait(workers, timeout=5)
        memory.append((round(time.monotonic() - start), memory_of(server.pid)))
    await asyncio.gather(*workers)
    metrics = await at_rest(server.url)
    problems = list(soak.lost)
    gone = 4 * (soak.sent["left_stream"] + soak.sent["killed"])  # sequences
    complete = metrics["finished length"] - soak.sequences
    if not 0 <= complete <= MAX_COMPLETE * gone:
        problems.append(f"{complete:g} of {gone} sequences at most were complete that were left")
    for name in COUNTED:
        said, shown = metrics.get(f"reported {name}", 0), soak.shown[name]
        # What a client that left was told nobody knows.
        if said < shown or (said > shown and not complete):
            problems.append(f"{name}: responses said {shown}, the metrics {said:g}")
    unseen = metrics["reported rows"] - soak.shown["rows"]
    if unseen > complete * LEFT_TOKENS * soak.rows_of_a_token:
        problems.append(f"{unseen:g} more rows than {complete:g} sequences that were left have")
    for name in ("num_requests_running", "num_requests_waiting"):
        if metrics[f"vllm:{name}"]:
            problems.append(f"{name} is {metrics[f'vllm:{name}']:g} at rest")
    finished = metrics.get("vllm_toptheta_requests_total", 0)
    if not soak.sequences <= finished <= soak.sequences + gone:
        problems.append(
            f"{soak.sequences} sequences answered, {gone} left at most, {finished:g} finished"
        )
    if errors := metrics.get("vllm_toptheta_telemetry_errors_total", 0):
        problems.append(f"{errors:g} errors of telemetry")
    if not metrics["vllm:num_preemptions_total"]:
        problems.append("nothing was preempted")
    settled = [size for second, size in memory if second >= memory[-1][0] / 3]
    growth = settled[-1] / settled[0] - 1
    if growth > MAX_GROWTH:
        problems.append(f"memory grew by {growth:.1%}")
    return {
        "seconds": memory[-1][0],
        "requests": soak.sent.total(),
        "by kind": dict(soak.sent),
        "preemptions": metrics["vllm:num_preemptions_total"],
        "complete although left": complete,
        "counted": {name: soak.shown[name] for name in COUNTED},
        "memory growth": round(growth, 4),
        "MiB by second": [
            (second, size >> 20) for second, size in memory[:: max(len(memory) // 12, 1)]
        ],
        "problems": problems,
    }


def run(
    model: Path,
    *,
    minutes: float,
    requests: float = float("inf"),
    clients: int = 24,
    seed: int = 0,
    longest: int = 7900,
    env: dict[str, str] | None = None,
    **toptheta: Any,
) -> dict[str, Any]:
    """Start a server, and put load on it until one of the bounds.

    Args:
        model: the checkpoint.
        minutes: of load.
        requests: in all.
        clients: requests under way.
        seed: of the load.
        longest: characters of a prompt; with LEFT_TOKENS it must fit into 4096.
        env: more environment variables of the server.
        toptheta: options of the plug-in.

    Returns:
        What was seen; "problems" is empty where nothing was lost.
    """
    with tempfile.TemporaryDirectory() as folder:
        watch = Path(folder) / "watch"
        watch.mkdir()
        found = (str(Path(toptheta_watch.__file__).parent), os.environ.get("PYTHONPATH"))
        paths = os.pathsep.join(filter(None, found))
        server = Server(
            model,
            *OPTIONS,
            toptheta={"min_kv_len": 256, **toptheta},
            log_path=Path(folder) / "server.log",
            env={**(env or {}), "PYTHONPATH": paths, toptheta_watch.FOLDER: str(watch)},
        )
        with server:
            soak = Soak(server.url, str(model), seed, longest)
            result = asyncio.run(load(server, soak, minutes, requests, clients))
            held = held_by(watch)
            log = server.log_path.read_text(errors="replace")
        answering = sorted(set(re.findall(r"\((ApiServer_\d+) .* Top-theta: \d+ decode rows", log)))
        problems = result["problems"]
        if len(answering) != 2 or len(held) < 4:
            problems.append(f"answered by {answering}, watched {len(held)} processes")
        for pid, kinds in held.items():
            more = {name: number for name, number in kinds.items() if number > MAX_HELD}
            if more:
                problems.append(f"process {pid} still holds {more}")
        if problems:
            print(log[-2000:], file=sys.stderr)
    return {**result, "answered by": answering, "held at rest": list(held.values())}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--requests", type=float, default=float("inf"), help="end after so many")
    parser.add_argument("--clients", type=int, default=24, help="requests under way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = run(
        args.model or fetch(),
        minutes=args.minutes,
        requests=args.requests,
        clients=args.clients,
        seed=args.seed,
    )
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(result["problems"]))


if __name__ == "__main__":
    sys.exit(main())
