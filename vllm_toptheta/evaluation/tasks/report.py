"""Answers in, accuracy paired with dense beside what was pruned for it out."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_toptheta.evaluation.results import dashed
from vllm_toptheta.evaluation.tasks.generation import agreement
from vllm_toptheta.evaluation.tasks.records import Record, ordered
from vllm_toptheta.evaluation.tasks.run import DENSE

ENOUGH_PRUNED = 0.5
"""Below this share of pruned rows an accuracy says little about pruning."""

HEADINGS = (
    f"{'task':16} {'length':>6} {'variant':24} {'n':>4} {'dense':>6} {'score':>6} {'diff':>7} "
    f"{'s.e.':>6} {'same':>5} {'V rows':>7} {'mass':>6} {'pruned':>6} {'s':>6}"
)
"""Scores are percentages; the standard error is that of the paired difference; `same` are answers
that are dense attention's word for word."""


@dataclass(frozen=True)
class TaskResult:
    """One task at one length with one setting, against dense on the same questions. Numbers that
    nobody counted are NaN.

    Attributes:
        model: who answered.
        task: its name; "ruler" is the mean over RULER's tasks.
        length: tokens of context, question and answer together.
        question_rows: "prompt", or "decoded" where the question's rows were decode rows.
        variant: the setting.
        questions: number of pairs.
        dense_score, score: mean points, from 0 to 1.
        dense_standard_error, standard_error: of them.
        difference: score - dense_score.
        difference_standard_error: of the mean over pairs.
        same_answers: share of pairs with the same text.
        v_row_fraction: V rows that decode rows read / all of them.
        kept_mass: mean share of their attention that decode rows kept.
        pruned_row_share: pruned rows / rows that generated something, the first token's included,
            which the prompt's last row generates.
        first_difference: mean number of generated tokens before one differs from dense attention's,
            and
        agreement: share of equal tokens by position, in eight equal parts; of long generations.
        dense_seconds, seconds: median time of an answer, with what the prefix cache holds.
    """

    model: str
    task: str
    length: int
    question_rows: str
    variant: str
    questions: int
    dense_score: float
    dense_standard_error: float
    score: float
    standard_error: float
    difference: float
    difference_standard_error: float
    same_answers: float
    v_row_fraction: float
    kept_mass: float
    pruned_row_share: float
    dense_seconds: float
    seconds: float
    first_difference: float
    agreement: list[float]

    def to_row(self) -> str:
        """One line under HEADINGS; a dash stands for NaN."""
        cells = (
            f"{self.dense_score:6.1%}",
            f"{self.score:6.1%}",
            f"{100 * self.difference:+7.1f}",
            f"{100 * self.difference_standard_error:6.1f}",
            f"{self.same_answers:5.0%}",
            f"{self.v_row_fraction:7.2%}",
            f"{self.kept_mass:6.3f}",
            f"{self.pruned_row_share:6.3f}",
            f"{self.seconds:6.2f}",
        )
        head = f"{self.task:16} {self.length:6} {self.variant:24} {self.questions:4}"
        row = " ".join([head, *map(dashed, cells)])
        if self.agreement:
            parts = " ".join(f"{share:.0%}" for share in self.agreement)
            row += f"\n  as dense for {self.first_difference:.0f} tokens; equal tokens: {parts}"
        return row

    @property
    def warning(self) -> str | None:
        """What is wrong with the figure, if anything is."""
        if not self.pruned_row_share < ENOUGH_PRUNED:
            return None
        return (
            f"warning: {self.task} at {self.length}, {self.variant}: {self.pruned_row_share:.0%} "
            "of the rows that wrote the answers were pruned, so the score says little about "
            "pruning; prune the question's rows too (--question-rows decoded), ask at lengths "
            "above the server's min_kv_len, or leave fewer layers dense"
        )


def pruned_rows(record: Record) -> tuple[float, float]:
    """Of a record with counts: rows that were pruned, and rows that generated something."""
    counts = record.toptheta or {}
    dense = sum(n for reason, n in counts["dense_rows"].items() if reason != "prefill")
    rows = counts["rows"]
    # The prompt's last row writes the first token, and prompts are dense for what we know.
    per_token = rows / (record.tokens - 1) if record.tokens > 1 else 1
    return rows - dense, rows + per_token


def summarise(records: Sequence[Record]) -> list[TaskResult]:
    """Pair every setting's answers with dense ones.

    Args:
        records: of one plan; dense answers are among them.
    """
    groups: dict[tuple[str, str, int, str], dict[str, list[Record]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for record in ordered(records):
        group = (record.model, record.task, record.length, record.question_rows)
        groups[group][record.variant].append(record)
    return [
        _result(variant, ours, by_variant[DENSE])
        for by_variant in groups.values()
        for variant, ours in by_variant.items()
        if variant != DENSE and len(ours) == len(by_variant[DENSE])
    ]


def standard_error(numbers: Sequence[float]) -> float:
    """Of the mean; NaN of a single number."""
    if len(numbers) < 2:
        return math.nan
    return statistics.stdev(numbers) / math.sqrt(len(numbers))


def _result(variant: str, ours: Sequence[Record], dense: Sequence[Record]) -> TaskResult:
    scores, reference = [r.score for r in ours], [r.score for r in dense]
    differences = [a - b for a, b in zip(scores, reference, strict=True)]
    counted = [r for r in ours if r.toptheta]
    total = {
        name: sum(float((r.toptheta or {}).get(name) or 0) for r in counted)
        for name in ("rows", "v_rows_scored", "v_rows_read")
    }
    mass = sum(
        (r.toptheta or {})["rows"] * ((r.toptheta or {}).get("kept_mass") or 0) for r in counted
    )
    shares = [pruned_rows(r) for r in counted]
    first = ours[0]
    first_difference, parts = agreement([r.token_ids for r in ours], [r.token_ids for r in dense])
    return TaskResult(
        model=first.model,
        task=first.task,
        length=first.length,
        question_rows=first.question_rows,
        variant=variant,
        questions=len(ours),
        dense_score=statistics.fmean(reference),
        dense_standard_error=standard_error(reference),
        score=statistics.fmean(scores),
        standard_error=standard_error(scores),
        difference=statistics.fmean(differences),
        difference_standard_error=standard_error(differences),
        same_answers=statistics.fmean(a.text == b.text for a, b in zip(ours, dense, strict=True)),
        v_row_fraction=_share(total["v_rows_read"], total["v_rows_scored"]),
        kept_mass=_share(mass, total["rows"]),
        pruned_row_share=_share(sum(p for p, _ in shares), sum(a for _, a in shares)),
        dense_seconds=statistics.median(r.seconds for r in dense),
        seconds=statistics.median(r.seconds for r in ours),
        first_difference=first_difference,
        agreement=parts,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
