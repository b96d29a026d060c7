"""Speed of `vllm serve`: stock against toptheta, same prompts, dtype and threads, interleaved.

All servers stay up; while one is measured the others are frozen. For decoding, a first request per
prompt fills the prefix cache, so that the measured requests prefill next to nothing; with `--ttft`
every prompt is new, and the time to its first token is measured. Run it with the environment's
interpreter:

    .venv/bin/python -m benchmarks.serve --json serve.jsonl
    .venv/bin/python -m benchmarks.serve --ttft --kv-lens 8192 --phases decode both
"""

import argparse
import asyncio
import itertools
import json
import pydoc_data.topics
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI
from transformers import AutoTokenizer

from scripts.fetch_model import fetch
from scripts.server import Server, add_pruning_options, pruning_options

STOCK = "vllm"


def variants(args: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """What to serve, by name: the options of toptheta, or None for stock vLLM."""
    chosen = pruning_options(args)
    ours = {
        " ".join(("toptheta, phases", phases, *(map(str, more.values())))): {
            **chosen,
            "phases": phases,
            **more,
        }
        for phases in args.phases
        for more in ({"k_sketch": value} for value in args.k_sketch)
    }
    return {STOCK: None, **ours}


def described(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """What stands first in a server's rows."""
    options = variants(args)[name] or {}
    return {
        "impl": "toptheta" if options else STOCK,
        "phases": options.get("phases"),
        "k_sketch": options.get("k_sketch"),
        "dtype": args.dtype,
    }


def pruning_of(summary: dict[str, Any] | None) -> dict[str, Any]:
    """What stands last in a server's rows: what rows ran with, and what that cost.

    Args:
        summary: of a response, or its part about the prompt.
    """
    names = ("k", "min_prob", "kept_fraction", "kept_mass")
    return {name: (summary or {}).get(name) for name in names}


@dataclass(frozen=True)
class Round:
    """One measured round: tokens per second over all requests, seconds per token of each."""

    tokens_per_s: float
    tpot_s: list[float]


def corpus() -> str:
    """The text that prompts are cut from."""
    return "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def part(ids: list[int], start: int, count: int) -> list[int]:
    """Some tokens in a row; after the last one comes the first again."""
    start %= len(ids)
    return list(itertools.islice(itertools.cycle(ids), start, start + count))


async def decode_round(
    client: AsyncOpenAI, model: str, prompts: list[list[int]], tokens: int
) -> Round:
    """Decode `tokens` tokens for every prompt at once."""

    async def one(prompt: list[int]) -> list[float]:
        stream = await client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return [
            time.perf_counter()
            async for chunk in stream
            if chunk.choices and chunk.choices[0].text is not None
        ]

    arrivals = await asyncio.gather(*(one(prompt) for prompt in prompts))
    # While all of them decode: the first tokens come late by what the prefix cache did not hold.
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    decoded = sum(begin < moment <= end for times in arrivals for moment in times)
    return Round(
        tokens_per_s=decoded / (end - begin),
        tpot_s=[(times[-1] - times[0]) / (tokens - 1) for times in arrivals],
    )


async def time_to_first_token(
    client: AsyncOpenAI, model: str, prompt: list[int]
) -> tuple[float, dict[str, Any]]:
    """Seconds to the first token of a prompt, and the pruning summary ({} from a stock server)."""
    start = time.perf_counter()
    stream = await client.completions.create(
        model=model, prompt=prompt, max_tokens=1, temperature=0, stream=True
    )
    first, summary = None, {}
    async for chunk in stream:
        if first is None and chunk.choices:
            first = time.perf_counter() - start
        summary = getattr(chunk, "toptheta", None) or summary
    assert first is not None
    return first, summary


async def measure_ttft(
    args: argparse.Namespace, servers: dict[str, Server], model: Path
) -> list[dict[str, Any]]:
    """One row per length and server; a round is one new prompt, the same for all."""
    ids = AutoTokenizer.from_pretrained(model)(corpus())["input_ids"]
    clients = {name: client_of(server) for name, server in servers.items()}
    rows = []
    for kv_len in args.kv_lens:
        seconds: dict[str, list[float]] = {name: [] for name in servers}
        summaries: dict[str, dict[str, Any]] = {}
        for number in range(args.rounds):
            # Shifted by more than a block: no prompt shares a prefix with an earlier one.
            prompt = ids[number * 1009 :][: kv_len - 1]
            for name, server in servers.items():
                server.resume()
                done, summaries[name] = await time_to_first_token(clients[name], str(model), prompt)
                seconds[name].append(done)
                server.pause()
        speed = {name: 1 / statistics.median(times) for name, times in seconds.items()}
        for name, times in seconds.items():
            rows.append(
                {
                    **described(args, name),
                    "model": model.name,
                    "kv_len": kv_len,
                    "ttft_ms_p50": round(1e3 * statistics.median(times), 1),
                    "ttft_ms": [round(1e3 * moment, 1) for moment in times],
                    "speedup_vs_vllm": round(speed[name] / speed[STOCK], 3),
                    **pruning_of(summaries[name].get("prefill")),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def client_of(server: Server) -> AsyncOpenAI:
    """A client that waits as long as a slow machine needs."""
    return AsyncOpenAI(base_url=server.url, api_key="none", timeout=3600, max_retries=0)


async def pruned(client: AsyncOpenAI, model: str, prompt: list[int]) -> dict[str, Any] | None:
    """The pruning summary of one request; None from a stock server."""
    answer = await client.completions.create(
        model=model, prompt=prompt, max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
    )
    return getattr(answer, "toptheta", None)


async def measure(
    args: argparse.Namespace, servers: dict[str, Server], model: Path
) -> list[dict[str, Any]]:
    """One row per length, number of requests and server."""
    ids = AutoTokenizer.from_pretrained(model)(corpus())["input_ids"]
    clients = {name: client_of(server) for name, server in servers.items()}
    rows = []
    for kv_len in args.kv_lens:
        prompts = [part(ids, i * kv_len, kv_len - args.tokens) for i in range(max(args.requests))]
        summaries: dict[str, Any] = {}
        for name, server in servers.items():
            server.resume()
            for prompt in prompts:
                summaries[name] = await pruned(clients[name], str(model), prompt)
            server.pause()
        for requests in args.requests:
            rounds: dict[str, list[Round]] = {name: [] for name in servers}
            for _ in range(args.rounds):
                for name, server in servers.items():
                    server.resume()
                    chosen = prompts[:requests]
                    rounds[name].append(
                        await decode_round(clients[name], str(model), chosen, args.tokens)
                    )
                    server.pause()
            speed = {
                name: statistics.median(r.tokens_per_s for r in done)
                for name, done in rounds.items()
            }
            for name, done in rounds.items():
                summary = summaries[name] or {}
                rows.append(
                    {
                        **described(args, name),
                        "model": model.name,
                        "kv_len": kv_len,
                        "requests": requests,
                        "tokens_per_s": round(speed[name], 2),
                        "tpot_ms_p50": round(
                            1e3 * statistics.median(t for r in done for t in r.tpot_s), 2
                        ),
                        "speedup_vs_vllm": round(speed[name] / speed[STOCK], 3),
                        **pruning_of(summary),
                        "v_row_reduction": summary.get("v_row_reduction"),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Start the servers, measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="checkpoint (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--dtype", default="float32", help="of weights and KV cache, all servers")
    parser.add_argument("--kv-lens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=64, help="decoded tokens a request and round")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--ttft", action="store_true", help="time to the first token instead")
    parser.add_argument(
        "--phases",
        nargs="+",
        default=["decode"],
        choices=["decode", "prefill", "both"],
        help="one server of ours for each",
    )
    add_pruning_options(parser)
    parser.add_argument(
        "--k-sketch",
        nargs="+",
        type=json.loads,
        default=["auto"],
        help='values of the option, each a server: "auto", true, false (default: "auto")',
    )
    parser.add_argument("--threads", default="0-1", help="VLLM_CPU_OMP_THREADS_BIND, all servers")
    parser.add_argument("--json", type=Path, help="write one JSON object a line")
    args = parser.parse_args()
    model = args.model or fetch()
    common = ["--dtype", args.dtype, "--max-model-len", str(max(args.kv_lens)), "--enforce-eager"]
    common += ["--max-num-seqs", str(max(args.requests)), "--kv-cache-memory-bytes", str(5 << 30)]
    env = {"VLLM_CPU_OMP_THREADS_BIND": args.threads}
    with tempfile.TemporaryDirectory() as folder:
        servers: dict[str, Server] = {}
        try:
            for number, (name, options) in enumerate(variants(args).items()):
                log = Path(folder) / f"{number}.log"
                servers[name] = Server(model, *common, toptheta=options, log_path=log, env=env)
                servers[name].wait_ready().pause()
            rows = asyncio.run((measure_ttft if args.ttft else measure)(args, servers, model))
        finally:
            for server in servers.values():
                server.stop()
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
