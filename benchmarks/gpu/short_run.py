"""Fifteen minutes on a GPU, in calls: `python -m benchmarks.gpu.short_run CALL`.

Each call ends by itself within its seconds, and prints and writes what it measures line by line, so
that it stays whatever happens next.

    probe     280 s   bandwidths (a copy; K rows of random pages), one bf16 and one fp8 case against
                      float64, one graph replay, then decode at four batches beside its dense rivals
    results   210 s   the rest of what is compared with float64, and a memory check of one case
    table     210 s   decode to 131072 keys, prompts, short dense rows, and launch parameters
    decode    150 s   after a change to the decode kernels, instead of the others: cases and a graph
                      replay, then batches of random and of clustered keys, to 131072, and with the
                      sketch of K

A wrong result in probe or decode ends it before anything is timed. With TRITON_INTERPRET=1 and no
GPU everything runs on tiny shapes, and nothing is timed.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu import bench, cases, check
from benchmarks.gpu.lib import E4M3, Batch, Machine
from benchmarks.gpu.report import Record, Report
from benchmarks.gpu.rivals import VllmTriton
from benchmarks.gpu.shape import Shape

SECONDS = {"probe": 280, "results": 210, "table": 210, "decode": 150}
DECODE = [(8192,), (32768,), (32768,) * 8, (8192,) * 16]
CLUSTERED = [Shape(lens, is_clustered=True) for lens in ((8192,) * 16, (32768,) * 8)]
SKETCHED = [
    Shape(lens, has_sketch=True) for lens in ((32768,), (32768,) * 8, (8192,) * 16, (131072,) * 8)
]
LONG = [Shape((131072,) * 8), Shape((32768,) * 8, cache_dtype=E4M3), Shape((131072,) * 16)]
LAST_START = 0.8
"""Of a call's seconds: nothing starts after that."""

Step = Callable[[], list[Record]]


def bandwidths(machine: Machine) -> list[Record]:
    """GB/s of a copy, and of reading what a scan reads: K of every token, half of each row of pages
    in random order. The second one bounds any kernel that reads all of K."""
    shape = bench.TINY if not machine.is_gpu else Shape((32768,) * 8)
    batch = Batch(shape, machine)
    pages = batch.layer.key  # [blocks, heads, slots, dim], strided over K and V
    order = torch.randperm(len(pages), device=machine.device)
    source = torch.zeros(shape.cache_bytes // 2, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    scan_bytes = shape.cache_bytes / 2
    launches = {
        "copy": ([lambda: target.copy_(source)], 2 * source.numel()),
        # A gather of strided pages writes what it reads.
        "K rows of random pages": ([lambda: pages[order].sum((0, 1, 2))], 3 * scan_bytes),
    }
    times = bench.time_variants({name: runs for name, (runs, _) in launches.items()}, machine, 10)
    return [
        {"check": "bandwidth", "of": name, "GB/s": size / times[name][1] / 1e6, "ok": True}
        for name, (_, size) in launches.items()
    ]


def compare(which: Callable[..., Record], spec: cases.Spec, machine: Machine) -> list[Record]:
    return [cases.guarded(which, spec, machine)]


def memory_check(machine: Machine) -> list[Record]:
    """One small case under compute-sanitizer, where there is one."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or not machine.is_gpu:
        return []
    code = (
        "import torch; from benchmarks.gpu import cases; from benchmarks.gpu.lib import Machine; "
        "assert cases.guarded(cases.check_decode, cases.TINY, Machine.find())['ok']"
    )
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    return [{"check": "memcheck", "output": done.stdout[-300:], "ok": done.returncode == 0}]


def steps(
    call: str, machine: Machine, vllm: VllmTriton | None, min_prob: float
) -> Iterator[tuple[str, Step]]:
    """What a call does, in order: a name, and what makes its records."""
    planned = check.planned(machine, quick=False)
    if call in ("probe", "decode"):
        if call == "probe":
            yield "bandwidths", lambda: bandwidths(machine)
        first, sketched = [planned[0]], [cases.TINY]
        if machine.is_gpu:
            kinds = [(cases.check_decode, spec) for spec in (cases.DECODE[1], cases.DECODE[2])]
            first, sketched = [*kinds, (cases.check_graph, cases.GRAPH)], cases.SKETCHED
            if call == "decode":
                first.append((cases.check_determinism, cases.DETERMINISM))
        if call == "decode":
            first += [(cases.check_sketched, spec) for spec in sketched]
        for which, spec in first:
            if machine.has_e4m3 or spec.cache_dtype != E4M3:
                yield spec_name(which, spec), lambda w=which, s=spec: compare(w, s, machine)
        shapes = [Shape(lens) for lens in DECODE] if machine.is_gpu else [bench.TINY]
        if call == "decode":
            tiny = dataclasses.replace(
                bench.TINY, block_size=64, is_clustered=True, has_sketch=True
            )
            shapes += SKETCHED + CLUSTERED + LONG if machine.is_gpu else [tiny]
        shapes = [shape for shape in shapes if machine.has_e4m3 or shape.cache_dtype != E4M3]
        for shape in shapes:
            yield (
                shape.describe(),
                lambda s=shape: bench.bench(s, [min_prob], machine, vllm),
            )
    elif call == "results":
        yield "memcheck", lambda: memory_check(machine)
        for which, spec in planned:
            yield spec_name(which, spec), lambda w=which, s=spec: compare(w, s, machine)
    else:
        for shape in bench.timed_shapes([131072, 32768, 8192], [8192], machine, quick=False):
            if machine.fits(shape.bytes_needed):
                yield (
                    shape.describe(),
                    lambda s=shape: bench.bench(s, [min_prob], machine, vllm),
                )
        timed = Shape((32768,) * 8) if machine.is_gpu else bench.TINY
        yield "launch parameters", lambda: bench.bench_launches(timed, min_prob, machine)


def spec_name(which: Callable[..., Record], spec: cases.Spec) -> str:
    return f"{which.__name__} {spec.lens}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("call", choices=list(SECONDS))
    parser.add_argument("--json", type=Path, help="written anew after every record")
    parser.add_argument("--min-prob", type=float, default=0.001)
    options = parser.parse_args()
    try:
        machine = Machine.find()
        vllm = VllmTriton.find(None, installed=machine.is_gpu)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    about = check.about_run(machine, vllm, "benchmarks.gpu.short_run")
    about["cache"] = os.environ.get("TRITON_CACHE_DIR", "Triton's default cache")
    report = Report(about, options.json)
    print("\n".join(about.values()), flush=True)
    min_prob = options.min_prob if machine.is_gpu else bench.TINY_MIN_PROB
    for name, step in steps(options.call, machine, vllm, min_prob):
        if report.seconds > LAST_START * SECONDS[options.call] and machine.is_gpu:
            report.skip(f"{name}: {SECONDS[options.call]} seconds are nearly over")
            continue
        try:
            report.add(*step())
        except Exception as problem:
            report.add({"check": name} | cases.failure(problem))
        if report.wrong and options.call in ("probe", "decode"):
            report.skip("the rest: a result is wrong")
            break
    report.save()
    print(f"\n{report.summary()}", flush=True)
    return int(bool(report.wrong))


if __name__ == "__main__":
    sys.exit(main())
