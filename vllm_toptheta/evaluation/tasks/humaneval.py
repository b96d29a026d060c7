"""HumanEval with a long few-shot context: solved problems of the same file come first, and are one
prefill for all questions."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_toptheta.evaluation.tasks import sandbox
from vllm_toptheta.evaluation.tasks.cases import Case, Question, Score, Source, Task

_STARTS = ("def ", "class ", "if ", "print(", "#", "from ", "import ", "@", "assert")
"""What a line after a function begins with."""
_STOP = ("\n\n\n", "\ndef ", "\nclass ", "\nprint(")
"""Servers take four; the rest is cut off here."""
_MAX_TOKENS = 256
_FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")


def humaneval(path: Path) -> Task:
    """Half of a file's problems as questions, the other half as examples.

    Args:
        path: HumanEval.jsonl, or HumanEval.jsonl.gz.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is something else.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        problems = [json.loads(line) for line in text.splitlines() if line.strip()]
        missing = {name for problem in problems for name in _FIELDS if name not in problem}
    except (ValueError, TypeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not JSON lines: {error}") from error
    if missing or len(problems) < 2:
        raise ValueError(
            f"{path} is not HumanEval: {len(problems)} problems, without {sorted(missing)}"
        )

    def cases(source: Source) -> Iterator[Case]:
        order = source.chance("humaneval").sample(problems, len(problems))
        asked, shown = order[: len(order) // 2], order[len(order) // 2 :]

        def build(units: int) -> Case:
            examples = [p["prompt"] + p["canonical_solution"].rstrip() for p in shown[:units]]
            return Case(
                "\n\n\n".join(examples) + "\n\n\n",
                [
                    Question(
                        problem["prompt"],
                        lead="",
                        max_tokens=_MAX_TOKENS,
                        score=_passes(problem),
                        stop=_STOP,
                    )
                    for problem in asked
                ],
            )

        yield source.fill(build)

    return cases


def _passes(problem: dict[str, Any]) -> Score:
    def score(text: str) -> float:
        ends = [at for start in _STARTS if (at := text.find(f"\n{start}")) >= 0]
        text = text[: min(ends, default=None)]
        check = f"{problem['test']}\ncheck({problem['entry_point']})\n"
        return float(sandbox.runs(f"{problem['prompt']}{text}\n\n{check}"))

    return score
