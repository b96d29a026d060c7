"""Long generations: what is asked, repetition, and agreement by position."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from evaluation.tasks.stub import Stub

from vllm_toptheta import cli
from vllm_toptheta.evaluation.tasks.generation import agreement, new_grams


def test_repetition() -> None:
    assert new_grams("a b c d e f") == 1
    assert new_grams("a b c d " * 10) == pytest.approx(4 / 37)
    assert new_grams("short") == 1


def test_agreement_by_position() -> None:
    dense = list(range(16))
    first, parts = agreement([dense, [*range(10), *[0] * 6]], [dense, dense])
    assert first == (16 + 10) / 2
    assert parts == [1, 1, 1, 1, 1, 0.5, 0.5, 0.5]
    first, parts = agreement([[]], [dense])
    assert math.isnan(first)
    assert parts == []


def test_generations_through_a_server(stub: Stub, tmp_path: Path) -> None:
    def say(body: dict[str, Any], prompt: str) -> str:
        words = "".join(f"{n} " for n in range(100))
        off = body["vllm_xargs"].get("toptheta") == "off"
        return words if off else words[:40] + "x " * 100

    stub.say = say
    report = tmp_path / "report.json"
    command = ["evaluate", "tasks", "--url", "http://stub", "--json", str(report)]
    command += ["--records", str(tmp_path / "records"), "--generate", "80", "--min-prob", "0.01"]
    command += ["--tasks", "long_generation", "long_generation_sampled", "--questions", "2"]
    assert cli.main(command) == 0
    greedy, sampled = json.loads(report.read_text())
    assert greedy["first_difference"] == sampled["first_difference"] == 40
    assert greedy["agreement"][:4] == [1, 1, 1, 1]
    assert max(greedy["agreement"][4:]) < 0.7
    assert greedy["score"] < greedy["dense_score"] == 1
    long = [body for body in stub.requests if body["max_tokens"] == 80]
    assert all(body["ignore_eos"] for body in long)
    seeds = [body["seed"] for body in long if body["temperature"] == 1]
    assert len(seeds) == 4
    assert len(set(seeds)) == 2
    for text, group in itertools.groupby(long, lambda body: body["prompt"]):
        assert len(text) > 3500
        assert len({body.get("seed") for body in group}) == 1
