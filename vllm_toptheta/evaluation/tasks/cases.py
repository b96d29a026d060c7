"""A task in, contexts with questions out: what every task's module produces, and how answers are
scored.

A question comes after its context, so that all questions about one context share the context's
KV in the server's prefix cache, and answers are decoded against it.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_toptheta.evaluation.tasks.server import Answerer

Score = Callable[[str], float]
"""The share of a question's points, from 0 to 1, that a generated text earns."""


class Unbuildable(ValueError):
    """A case cannot be made from the text, or not at this length."""


@dataclass(frozen=True)
class Question:
    """What follows a context.

    Attributes:
        text: the question.
        lead: the beginning of its answer; a chat's answer begins before it.
        max_tokens: most tokens of the answer.
        score: of the answer.
        stop: texts that end an answer.
        sampling: how to generate, as `Request` takes it, where greedy is not meant.
    """

    text: str
    lead: str
    max_tokens: int
    score: Score
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A context and its questions."""

    context: str
    questions: Sequence[Question]


@dataclass(frozen=True)
class Source:
    """What tasks are made from.

    Attributes:
        server: whose tokenizer measures.
        length: most tokens of context, question and answer together.
        seed: another one gives other contexts and questions.
        text: haystacks are cut from it.
        reserved: tokens of a chat's template.
    """

    server: Answerer
    length: int
    seed: int
    text: str
    reserved: int = 0

    def chance(self, *names: object) -> random.Random:
        """Random numbers that depend on the seed and these names only."""
        return random.Random(" ".join(map(str, (self.seed, *names))))

    def tokens(self, case: Case) -> int:
        """Tokens of a case's context and its longest question and answer."""
        answers = max(
            self.server.count(question.text + question.lead) + question.max_tokens
            for question in case.questions
        )
        context = len(self.server.tokenize(case.context, special=True))
        return context + answers + self.reserved

    def fill(self, build: Callable[[int], Case], smallest: int = 1) -> Case:
        """The largest case that fits the length.

        Args:
            build: a case from a number of units of context; more units are more tokens.
            smallest: units that make sense at least.

        Raises:
            Unbuildable: the smallest case is too long.
        """

        best, size = build(smallest), smallest
        used = self.tokens(best)
        if used > self.length:
            raise Unbuildable(
                f"needs at least {used} tokens, got --lengths {self.length}; give a larger one"
            )
        # Units are about equally long: two or three steps of a secant, then halving.
        step = build(2 * smallest + 8)
        a_unit = max((self.tokens(step) - used) / (smallest + 8), 0.01)
        too_many = None
        for _ in range(20):
            guess = size + int((self.length - used) / a_unit)
            if too_many is not None and guess >= too_many:
                guess = (size + too_many) // 2
            if guess <= size:
                break
            case = build(guess)
            if (length := self.tokens(case)) <= self.length:
                best, size, used = case, guess, length
            else:
                too_many = guess
        return best


Task = Callable[[Source], Iterator[Case]]
"""Cases without end, or as many as there are; the runner stops where it has enough questions."""


def contains_all(answers: Sequence[str]) -> Score:
    """The share of the answers that a text contains, whatever the case (RULER's
    string_match_all)."""
    return lambda text: sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def contains_any(answers: Sequence[str]) -> Score:
    """Whether a text contains one of the answers (RULER's string_match_part)."""
    return lambda text: float(any(answer.lower() in text.lower() for answer in answers))


def begins_with(answer: str) -> Score:
    """Whether a text is the answer, up to what may follow it."""

    def score(text: str) -> float:
        text = text.strip()
        rest = text[len(answer) : len(answer) + 1]
        return float(text.startswith(answer) and not rest.isalnum())

    return score
