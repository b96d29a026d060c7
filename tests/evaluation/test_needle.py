"""Needles lie where they should, and are graded by every token of the number."""

from types import SimpleNamespace

import pytest
from tiny_models import tiny_tokenizer

from vllm_toptheta.calibration.corpus import Corpus
from vllm_toptheta.evaluation.needle import Case, NeedleResult, build_case, grade, to_row

CORPUS = Corpus("", ["hay " * 500], [1])


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_a_case_has_its_length_and_one_needle_at_its_depth(depth: float) -> None:
    tokenizer = tiny_tokenizer()
    case = build_case(tokenizer, CORPUS, 600, depth)
    assert len(case.prompt) + len(case.lead) + len(case.number) == 600
    prompt, lead, number = (
        "".join(tokenizer.convert_ids_to_tokens(ids))
        for ids in (case.prompt, case.lead, case.number)
    )
    sentence = (lead + number).strip() + "."
    assert prompt.count(sentence) == 1
    assert prompt.count("The secret number") == 1
    assert number.strip().isdigit()
    before, after = prompt.split(sentence)
    # One token a character; two line breaks on either side of the sentence.
    assert (len(before) - 2) / (len(before) + len(after) - 4) == pytest.approx(depth, abs=2e-3)


def test_cases_are_the_same_every_time_and_differ_from_each_other() -> None:
    first, again, other = (
        build_case(tiny_tokenizer(), CORPUS, 600, depth) for depth in (0.25, 0.25, 0.5)
    )
    assert first == again
    assert first.number != other.number


def test_no_room() -> None:
    with pytest.raises(ValueError, match="--lengths"):
        build_case(tiny_tokenizer(), CORPUS, 64, 0.5)
    with pytest.raises(ValueError, match="shorter"):
        build_case(tiny_tokenizer(), CORPUS, 4096, 0.5)


def logprobs(*ranks: int) -> list[dict[int, SimpleNamespace]]:
    return [{token: SimpleNamespace(rank=rank, logprob=-0.5)} for token, rank in enumerate(ranks)]


def test_every_token_of_the_number_must_be_the_most_likely_one() -> None:
    case = Case(10, 0, [], [0, 1], [2, 3])
    assert grade(case, logprobs(7, 7, 1, 1)) == (True, -1.0)
    assert grade(case, logprobs(1, 1, 1, 2)) == (False, -1.0)
    assert grade(case, logprobs(1, 1, 2, 1)) == (False, -1.0)


def result(found: bool, kept: float) -> NeedleResult:
    return NeedleResult("both k 128", None, 1024, 0.5, found, -1.0, kept, kept)


def test_row() -> None:
    stock = [result(True, 1), result(True, 1), result(False, 1)]
    row = to_row([result(True, 0.1), result(False, 0.2), result(True, 0.3)], stock)
    assert row.split()[-5:] == ["2/3", "1/3", "-1.000", "0.2000", "0.2000"]
