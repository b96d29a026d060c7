"""What tasks are made of: lengths, seeds, needles that are really there, and what scores."""

import itertools
import re

import pytest
from evaluation.tasks.stub import Stub

from vllm_toptheta.evaluation.tasks import haystack, retrieval, ruler
from vllm_toptheta.evaluation.tasks.cases import (
    Case,
    Source,
    Task,
    Unbuildable,
    begins_with,
    contains_all,
    contains_any,
)

TASKS: dict[str, Task] = {**ruler.TASKS, "kv_retrieval": retrieval.kv_retrieval}
LENGTH = 24000
"""Characters: the stub's tokens. The shortest at which every task exists."""


def source(stub: Stub, length: int = LENGTH, seed: int = 0) -> Source:
    return Source(stub.server, length, seed, haystack.read_text(None))


def used(case: Case) -> int:
    return len(case.context) + max(len(q.text + q.lead) + q.max_tokens for q in case.questions)


@pytest.mark.parametrize("name", TASKS)
def test_a_case_fills_its_length_and_depends_on_the_seed_only(stub: Stub, name: str) -> None:
    first, second = itertools.islice(TASKS[name](source(stub)), 2)
    again = next(TASKS[name](source(stub)))
    other = next(TASKS[name](source(stub, seed=1)))
    assert used(first) <= LENGTH
    assert used(first) > 0.97 * LENGTH
    assert again.context == first.context
    assert len({first.context, second.context, other.context}) == 3


@pytest.mark.parametrize("name", TASKS)
def test_a_length_without_room_is_named(stub: Stub, name: str) -> None:
    with pytest.raises(Unbuildable, match="needs at least .* --lengths 100"):
        next(TASKS[name](source(stub, 100)))


@pytest.mark.parametrize(("name", "values"), [(n, t.values) for n, t in ruler.NEEDLES.items()])
def test_the_asked_needles_score_and_others_do_not(stub: Stub, name: str, values: str) -> None:
    case = next(TASKS[name](source(stub)))
    (question,) = case.questions
    asked = re.findall(r"[a-z]+-[a-z]+|[0-9a-f-]{36}", question.text)
    needle = re.compile(r"magic \w+ for (\S+) is: (\S+)\.")
    pairs = needle.findall(case.context)
    right = [value for key, value in pairs if key in asked]
    assert question.score(" and ".join(right)) == 1
    assert question.score("none") == 0
    assert len(right) == {"niah_multivalue": 4, "niah_multiquery": 4}.get(name, 1)
    wrong = [value for key, value in pairs if key not in asked]
    assert not wrong or question.score(" ".join(wrong)) == 0
    hidden = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}
    assert len(pairs) == hidden.get(name, 1) or "multikey_" in name


def test_tracked_variables_follow_the_chain(stub: Stub) -> None:
    case = next(TASKS["vt"](source(stub)))
    number = re.findall(r"\d{5}", case.questions[0].text)[0]
    real = case.context.rsplit("Memorize", 1)[1]
    values = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", real))
    found = [number]
    for _ in range(5):
        found += [name for name, value in values.items() if value == found[-1]]
    assert case.questions[0].score(" ".join(found[1:])) == 1
    assert case.questions[0].score(" ".join(found[2:])) == 0.8


@pytest.mark.parametrize(("name", "most"), [("cwe", 10), ("fwe", 3)])
def test_the_most_frequent_words_score(stub: Stub, name: str, most: int) -> None:
    case = next(TASKS[name](source(stub)))
    real = case.context.rsplit("Below is", 1)[-1]
    words = re.findall(r"\b[a-z]+\b", real.split(". ", 2)[-1])
    ranking = sorted(set(words), key=words.count, reverse=True)
    assert case.questions[0].score(", ".join(ranking[:most])) == 1
    assert case.questions[0].score(", ".join(ranking[most:])) == 0


def test_every_key_of_a_retrieval_context_has_its_question(stub: Stub) -> None:
    case = next(retrieval.kv_retrieval(source(stub)))
    codes = dict(re.findall(r"The code of the ([a-z]+ [a-z]+) is (\d{5})\.", case.context))
    assert len(codes) == len(case.questions) == 64
    for question in case.questions:
        key = question.text.removesuffix("?").rpartition("of the ")[2]
        assert question.score(f" {codes[key]}.") == 1
        assert question.score(f" {codes[key]}1.") == 0
        assert question.score(f" not {codes[key]}") == 0


def test_scores() -> None:
    assert contains_all(["Ab", "c"])("xaBx") == 0.5
    assert contains_any(["Ab", "c"])("xaBx") == 1
    assert begins_with("12")("\n12, 13") == 1
    assert begins_with("12")("123") == 0
