"""Checks the Triton kernels on a GPU and times them: correctness, determinism, graph replay, and
speed against the dense kernels there are.

From the repository root: `python -m benchmarks.gpu.check`. It needs torch and triton and nothing
else; a folder that carry_vllm_triton.py wrote adds vLLM's Triton attention to the rivals.
Exit status 1 where a result is wrong, whose speed is not printed.
With TRITON_INTERPRET=1 and no GPU it runs tiny shapes through all of its code and times nothing.
FlashInfer is no rival here: it compiles its kernels with nvcc, so it cannot be carried.
docs/gpu.md says how to read the output.
"""

import argparse
import concurrent.futures.process
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu import cases
from benchmarks.gpu.bench import TINY_MIN_PROB, bench, bench_launches, timed_shapes
from benchmarks.gpu.lib import E4M3, Machine
from benchmarks.gpu.report import Record, Report
from benchmarks.gpu.rivals import VllmTriton, flash_attention
from vllm_toptheta.testing.cases import Spec

Check = Callable[[Spec, Machine], Record]


def planned(machine: Machine, *, quick: bool) -> list[tuple[Check, Spec]]:
    """Everything but speed."""
    if not machine.is_gpu:
        return [
            (cases.check_decode, cases.TINY),
            (cases.check_sketched, cases.TINY),
            (cases.check_prompts, cases.TINY_PROMPT),
            (cases.check_determinism, cases.TINY_DETERMINISM),
        ]
    most = 3 if quick else None
    wanted: list[tuple[Check, Spec]] = [
        (cases.check_determinism, cases.DETERMINISM),
        (cases.check_graph, cases.GRAPH),
    ]
    wanted += [(cases.check_decode, spec) for spec in cases.DECODE[:most]]
    wanted += [(cases.check_sketched, spec) for spec in cases.SKETCHED[:most]]
    wanted += [(cases.check_prompts, spec) for spec in cases.PROMPTS[:most]]
    if flash_attention() is not None:
        wanted += [(cases.check_flash, spec) for spec in cases.FLASH]
    return [case for case in wanted if machine.has_e4m3 or case[1].cache_dtype != E4M3]


def check_results(machine: Machine, report: Report, *, quick: bool, jobs: int) -> None:
    """Compare results, several cases at a time: compiling is what takes long, and fills Triton's
    cache for what is timed afterwards."""
    wanted = planned(machine, quick=quick)
    if jobs == 1:
        for check, spec in wanted:
            report.add(cases.guarded(check, spec, machine))
        return
    # A process for each, so that an illegal access spoils no other case.
    with concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        running = [(case, pool.submit(cases.guarded, *case, machine)) for case in wanted]
        for (check, spec), done in running:
            try:
                report.add(done.result())
            except concurrent.futures.process.BrokenProcessPool as problem:
                about = cases.about(check.__name__, spec)
                report.add(about | cases.failure(problem))


def measure(
    options: argparse.Namespace, machine: Machine, report: Report, vllm: VllmTriton | None
) -> None:
    """All timed shapes that fit into memory, until the time is up."""
    shapes = timed_shapes(options.length, options.prompt, machine, quick=options.quick)
    tasks: list[tuple[str, Any]] = [("", shape) for shape in shapes]
    min_probs = options.min_prob if machine.is_gpu else [TINY_MIN_PROB]
    if options.launches:
        chosen = [next(s for s in shapes if s.is_prompt == kind) for kind in (False, True)]
        tasks += [("launch parameters of ", shape) for shape in chosen]
    for kind, shape in tasks:
        what = f"{kind}{shape.describe()}"
        if report.seconds > options.minutes * 60:
            report.skip(f"{what}: {options.minutes:g} minutes are over (--minutes)")
            continue
        if not machine.fits(shape.bytes_needed):
            report.skip(f"{what}: no room for {shape.cache_bytes / 1e9:.1f} GB of cache")
            continue
        try:
            if kind:
                report.add(*bench_launches(shape, min_probs[0], machine))
            else:
                report.add(*bench(shape, min_probs, machine, vllm))
        except torch.cuda.OutOfMemoryError:
            report.skip(f"{what}: out of memory")
        except Exception as problem:
            report.add({"check": "speed", "shape": what} | cases.failure(problem))
            if machine.is_gpu:
                torch.cuda.synchronize()  # raises where the device is lost, as all others would


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=numbers, default=[32768, 8192, 131072])
    parser.add_argument("--prompt", type=numbers, default=[8192], help="prompt lengths")
    parser.add_argument(
        "--min-prob", type=lambda text: [float(p) for p in text.split(",")], default=[0.001]
    )
    parser.add_argument("--minutes", type=float, default=8, help="start no timing after that")
    parser.add_argument("--quick", action="store_true", help="a few shapes of every kind")
    parser.add_argument("--jobs", type=int, help="cases compared at a time [8 on a GPU]")
    parser.add_argument("--no-benchmark", action="store_true")
    parser.add_argument("--launches", action="store_true", help="time other launch parameters too")
    parser.add_argument(
        "--vllm-triton", type=Path, help="folder of carry_vllm_triton [build/vllm_triton]"
    )
    parser.add_argument("--json", type=Path, help="write all records here, as they come")
    return parser.parse_args()


def about_run(machine: Machine, vllm: VllmTriton | None, module: str) -> dict[str, str]:
    """What a report says of the machine, the versions and the command."""
    return {
        "device": machine.name,
        "torch": f"torch {torch.__version__}",
        "triton": f"triton {triton.__version__}",
        "rival": vllm.origin if vllm else "without vLLM's Triton kernel",
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
    }


def main() -> int:
    options = parse()
    try:
        machine = Machine.find()
        vllm = VllmTriton.find(options.vllm_triton, installed=machine.is_gpu)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    about = about_run(machine, vllm, "benchmarks.gpu.check")
    report = Report(about, options.json)
    print("\n".join(about.values()), flush=True)
    jobs = options.jobs or (min(8, os.cpu_count() or 1) if machine.is_gpu else 1)
    try:
        check_results(machine, report, quick=options.quick, jobs=jobs)
        if not options.no_benchmark:
            measure(options, machine, report, vllm)
    finally:
        report.save()
        print(f"\n{report.summary()}", flush=True)
    return int(bool(report.wrong))


if __name__ == "__main__":
    sys.exit(main())
