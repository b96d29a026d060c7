"""Long generation: a text goes on for many tokens, so that small errors add up and show.

A text's score is its share of new word 4-grams: what loops repeats itself. How long two texts
agree is in `agreement`.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from vllm_toptheta.evaluation.tasks.cases import Case, Question, Source, Task
from vllm_toptheta.evaluation.tasks.haystack import passage

_GRAM = 4
BUCKETS = 8
"""Parts of a generation, of which each has its own agreement."""


def long_generation(tokens: int, *, sampled: bool) -> Task:
    """Texts to continue.

    Args:
        tokens: to generate.
        sampled: at temperature 1, with a seed of its own for every text; else greedy.
    """

    def build(source: Source, units: int, index: int) -> Case:
        chance = source.chance("long_generation", source.length, index)
        sampling: dict[str, Any] = {"ignore_eos": True}
        if sampled:
            sampling |= {"temperature": 1.0, "seed": chance.randrange(2**31)}
        context = " ".join(passage(source.text, units, chance))
        return Case(context, [Question("", "", tokens, new_grams, sampling=sampling)])

    def cases(source: Source) -> Iterator[Case]:
        for index in itertools.count():
            yield source.fill(partial(build, source, index=index))

    return cases


def new_grams(text: str) -> float:
    """The share of a text's word 4-grams that it did not have before; 1 where there are none."""
    words = text.split()
    grams = list(zip(*(words[start:] for start in range(_GRAM)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def agreement(
    ours: Sequence[Sequence[int]], dense: Sequence[Sequence[int]]
) -> tuple[float, list[float]]:
    """Where texts part from dense ones.

    Args:
        ours, dense: token ids of pairs of texts.

    Returns:
        The mean number of tokens before the first that differs, and the share of equal tokens in
        each of BUCKETS parts, in order; parts are empty, and so the list, without token ids.
    """
    pairs = [(a, b) for a, b in zip(ours, dense, strict=True) if a and b]
    if not pairs:
        return float("nan"), []
    same = [[x == y for x, y in zip(a, b, strict=False)] for a, b in pairs]
    first = [row.index(False) if False in row else len(row) for row in same]
    length = min(map(len, same))
    edges = [length * part // BUCKETS for part in range(BUCKETS + 1)]
    shares = [
        sum(sum(row[start:end]) for row in same) / max(1, (end - start) * len(same))
        for start, end in itertools.pairwise(edges)
    ]
    return sum(first) / len(first), shares
