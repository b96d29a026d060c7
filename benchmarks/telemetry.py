"""What telemetry costs: decode speed of `vllm serve` counting against not counting.

Both servers stay up; while one is measured the other is frozen. Pairs of neighbouring rounds are
compared, in both orders, so that a drift of the machine falls on both sides alike. Where the
machine's noise is larger than the cost, `--inside` adds up the time that telemetry's own code takes
while one engine decodes, all of its parts in one process. Run it with the environment's
interpreter:

    .venv/bin/python -m benchmarks.telemetry --json telemetry.jsonl
    .venv/bin/python -m benchmarks.telemetry --inside
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks import serve
from scripts.fetch_model import fetch
from scripts.server import Server

SIDES = ("off", "on")


async def measure(
    args: argparse.Namespace, servers: dict[str, Server], model: Path
) -> list[dict[str, Any]]:
    """One row per length."""
    ids = AutoTokenizer.from_pretrained(model)(serve.corpus())["input_ids"]
    clients = {side: serve.client_of(server) for side, server in servers.items()}
    rows = []
    for kv_len in args.kv_lens:
        count = kv_len - args.tokens
        prompts = [serve.part(ids, i * kv_len, count) for i in range(args.requests)]
        speed: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(args.rounds + 1):
            for side in SIDES if number % 2 else reversed(SIDES):
                servers[side].resume()
                client = clients[side]
                done = await serve.decode_round(client, str(model), prompts, args.tokens)
                servers[side].pause()
                if number:  # the first round fills the prefix cache
                    speed[side].append(done.tokens_per_s)
        cost = [1 - on / off for off, on in zip(speed["off"], speed["on"], strict=True)]
        quartiles = statistics.quantiles(cost, n=4)
        rows.append(
            {
                "kv_len": kv_len,
                "requests": args.requests,
                "rounds": args.rounds,
                "tokens_per_s_off": round(statistics.median(speed["off"]), 2),
                "tokens_per_s_on": round(statistics.median(speed["on"]), 2),
                "cost_p25": round(quartiles[0], 4),
                "cost_p50": round(quartiles[1], 4),
                "cost_p75": round(quartiles[2], 4),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


class Stopwatch:
    """Time inside telemetry: all of it runs under its shield.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        from vllm_toptheta.telemetry import shield

        self.seconds = 0.0
        self._shielded, self._open = shield.shielded, False
        shield.shielded = self.timed  # before the modules that take it by name

    def timed(self, place: str) -> contextlib.AbstractContextManager[None]:
        """The shield, timed; one inside another counts, and is slowed down, only once."""
        shield = self._shielded(place)
        return shield if self._open else self._timed(shield)

    @contextlib.contextmanager
    def _timed(self, shield: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        start, self._open = time.perf_counter(), True
        try:
            with shield:
                yield
        finally:
            self._open = False
            self.seconds += time.perf_counter() - start


def account(args: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """One row per length: telemetry's share of the time of steps that only decode."""
    watch = Stopwatch()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # One process does everything, so its threads exist before vLLM could bind them.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model),
        dtype="float32",
        max_model_len=max(args.kv_lens),
        max_num_seqs=args.requests,
        kv_cache_memory_bytes=3 << 30,
        enforce_eager=True,
        distributed_executor_backend="uni",
        attention_backend="toptheta",
        additional_config={"toptheta": {}},
    )
    engine = llm.llm_engine
    ids = AutoTokenizer.from_pretrained(model)(serve.corpus())["input_ids"]
    rows = []
    for kv_len in args.kv_lens:
        params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
        for number in range(args.requests):
            prompt = serve.part(ids, number * kv_len, kv_len - args.tokens)
            engine.add_request(f"{kv_len}-{number}", {"prompt_token_ids": prompt}, params)
        steps: list[tuple[float, float]] = []
        while engine.has_unfinished_requests():
            before, start = watch.seconds, time.perf_counter()
            outputs = engine.step()
            took = time.perf_counter() - start
            if len(outputs) == args.requests:
                steps.append((watch.seconds - before, took))
        # Steps are booked together, so that some take longer than others.
        inside = statistics.fmean(inside for inside, _ in steps)
        step = statistics.median(took for _, took in steps)
        rows.append(
            {
                "kv_len": kv_len,
                "requests": args.requests,
                "steps": len(steps),
                "inside_ms": round(1e3 * inside, 3),
                "step_ms": round(1e3 * step, 2),
                "share": round(inside / step, 5),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def compare(args: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """Start both servers and measure."""
    common = ["--dtype", "float32", "--max-model-len", str(max(args.kv_lens)), "--enforce-eager"]
    common += ["--max-num-seqs", str(args.requests), "--kv-cache-memory-bytes", str(3 << 30)]
    env = {"VLLM_CPU_OMP_THREADS_BIND": args.threads}
    with tempfile.TemporaryDirectory() as folder:
        servers: dict[str, Server] = {}
        try:
            for side in SIDES:
                options = {"telemetry": side == "on"}
                log = Path(folder) / f"{side}.log"
                servers[side] = Server(model, *common, toptheta=options, log_path=log, env=env)
                servers[side].wait_ready().pause()
            return asyncio.run(measure(args, servers, model))
        finally:
            for server in servers.values():
                server.stop()


def main() -> None:
    """Measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv-lens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="decoded tokens a request and round")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of rounds")
    parser.add_argument("--inside", action="store_true", help="time telemetry's own code instead")
    parser.add_argument("--threads", default="0-1", help="VLLM_CPU_OMP_THREADS_BIND, both sides")
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    args = parser.parse_args()
    rows = (account if args.inside else compare)(args, fetch())
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
