"""Times the CPU kernels of decode or prompts: shapes or a model's queries, keys and values in, one
line per kernel out.

vLLM's own kernel as it would run on this machine, our dense kernel and Top-theta run interleaved in
one process, with warm caches and with swept ones. Every output is compared with float64 first: a
wrong one ends the run before anything is timed.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, as for the workers of an engine

import torch  # noqa: E402

from benchmarks import kernel_case  # noqa: E402
from benchmarks.kernel_case import Case, Run, Shape  # noqa: E402
from vllm_toptheta.kernels.cpu.native import has_avx512  # noqa: E402

_SHAPES = {
    "decode": [
        *(f"32/8/128:{kv_len}:1" for kv_len in (2048, 8192, 32768)),
        "32/8/128:8192:8",
        *(f"9/3/64:{kv_len}:{batch}" for batch in (1, 8) for kv_len in (2048, 8192)),
    ],
    "prefill": ["9/3/64:2048:1", "9/3/64:8192:1", "32/8/128:2048:1", "32/8/128:8192:1"],
}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def measure(runs: list[Run], args: argparse.Namespace, cold: bool) -> list[float]:
    """Median milliseconds of every run, all of them in turn; CPU time where there is one thread,
    which others on the machine disturb less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    sweep = torch.zeros(args.cold * (1 << 20) // 4) if cold else None
    times: list[list[float]] = [[] for _ in runs]
    deadline = time.perf_counter() + args.seconds
    while time.perf_counter() < deadline or len(times[0]) < args.min_rounds:
        for run, measured in zip(runs, times, strict=True):
            if sweep is not None:
                sweep.add_(1)
            start = clock()
            run.call()
            measured.append((clock() - start) * 1e3)
    return [statistics.median(measured) for measured in times]


def bench(name: str, case: Case, args: argparse.Namespace) -> list[dict[str, object]]:
    """Check and time every kernel on one case; print and return one row each."""
    print(name, flush=True)
    stock = case.stock()
    runs = [] if stock is None else [stock]
    runs += [case.ours(min_prob) for min_prob in (None, *args.min_prob)]
    if case.decode:
        runs += [case.ours(min_prob, sketch=True) for min_prob in args.min_prob]
    errors = []
    for run in runs:
        try:
            errors.append(case.error(run))
        except ValueError as error:
            sys.exit(f"{run.name} (min_prob {run.min_prob}) is wrong: {error}; nothing is timed")
    rows: list[dict[str, object]] = [
        {
            "case": name,
            "phase": args.phase,
            "dtype": args.dtype,
            "kernel": run.name,
            "min_prob": run.min_prob,
            **case.shares(run),
            "error": error,
        }
        for run, error in zip(runs, errors, strict=True)
    ]
    for cold in (False, True) if args.cold else (False,):
        times = measure(runs, args, cold)
        dense = times[runs.index(next(run for run in runs if run.name == "dense"))]
        what = "cold" if cold else "warm"
        for row, ms in zip(rows, times, strict=True):
            row[f"{what}_ms"] = ms
            row[f"{what}_vs_stock"] = None if stock is None else times[0] / ms
            row[f"{what}_vs_dense"] = dense / ms
    for row in rows:
        print("  " + _line(row), flush=True)
    return rows


def _line(row: dict[str, object]) -> str:
    label = str(row["kernel"])
    if row["min_prob"] is not None:
        label += f" {row['min_prob']:g}"
    parts = [f"{label:18}"]
    for what in ("warm", "cold"):
        if f"{what}_ms" not in row:
            continue
        stock, dense = row[f"{what}_vs_stock"], row[f"{what}_vs_dense"]
        ratio = "" if stock is None else f"{stock:5.2f}x stock "
        parts.append(f"{what} {row[f'{what}_ms']:9.4f} ms {ratio}{dense:5.2f}x dense")
    names = ("kept", "kept_mass", "v_tiles")
    parts += [f"{name} {row[name]:.4f}" for name in names if name in row]
    return "  ".join([*parts, f"error {row['error']:.1e}"])


def cases(args: argparse.Namespace) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
    """Query, key and value of every case, made when it is its turn."""
    dtype, decode = _DTYPES[args.dtype], args.phase == "decode"
    if args.captured:
        yield from kernel_case.captured_tensors(
            args.captured, 1 if decode else args.query_len, dtype
        )
        return
    for shape in args.shapes or [Shape.parse(text) for text in _SHAPES[args.phase]]:
        query_len = 1 if decode else min(args.query_len or shape.kv_len, shape.kv_len)
        yield str(shape), kernel_case.random_tensors(shape, query_len, dtype, args.query_scale)


def main() -> None:
    """Parse, bench, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--shapes",
        nargs="+",
        type=Shape.parse,
        help="num_heads/num_kv_heads/head_dim:kv_len:batch (default: "
        + "; ".join(f"{phase}: {' '.join(shapes)}" for phase, shapes in _SHAPES.items())
        + ")",
    )
    add("--phase", choices=list(_SHAPES), default="decode")
    add("--query-len", type=int, help="of prompts (default: all tokens)")
    add("--min-prob", nargs="+", type=float, default=[0.001])
    add("--min-mass", type=float, default=0.0, help="of decode rows")
    add("--query-scale", type=float, default=3.0, help="of random queries: how peaked softmax is")
    add("--threads", type=int, help="default: torch's choice")
    add("--dtype", choices=list(_DTYPES), default="bfloat16")
    add("--block-size", type=int, default=128)
    add("--cold", type=int, default=96, metavar="MB", help="swept before a call; 0: warm only")
    add("--seconds", type=float, default=2.0, help="a case, warm and cold each")
    add("--min-rounds", type=int, default=11)
    add("--json", type=Path, help="write JSON lines, one object a row")
    add("--captured", type=Path, metavar="FILE", help="run on what --capture wrote")
    add("--capture", metavar="MODEL", help="write --captured from a model folder, and run on it")
    add("--text", type=Path, help="of --capture")
    add("--tokens", type=int, default=4096, help="of --capture")
    add("--layers", nargs="+", type=int, default=[], help="of --capture (default: all)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.capture:
        if not args.text or not args.captured:
            parser.error("--capture needs --text and --captured")
        rows = args.query_len or args.tokens
        text = args.text.read_text()
        kernel_case.capture(args.capture, text, args.captured, args.tokens, rows, args.layers)
    print(
        f"{_cpu_name()}, {_threads()}, {args.phase}, {args.dtype}, block "
        f"{args.block_size}, torch {torch.__version__}, {kernel_case.vllm_version()}, ours "
        f"{'AVX512' if has_avx512() else 'AVX2'}"
    )
    found = []
    for name, tensors in cases(args):
        case = Case(
            *tensors,
            block_size=args.block_size,
            decode=args.phase == "decode",
            min_mass=args.min_mass,
        )
        found += bench(name, case, args)
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in found))


def _threads() -> str:
    count = torch.get_num_threads()
    return "1 thread (CPU time)" if count == 1 else f"{count} threads (wall time)"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
