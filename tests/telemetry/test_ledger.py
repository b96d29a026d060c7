"""The engine core's books: every count is told exactly once, whatever becomes of its request."""

import random

import numpy as np
import pytest

from vllm_toptheta.kernels.columns import COLUMNS
from vllm_toptheta.telemetry import ledger as ledger_module
from vllm_toptheta.telemetry.counters import add, zeros
from vllm_toptheta.telemetry.ledger import ENGINE_LETTER, Ledger
from vllm_toptheta.telemetry.totals import Totals


def row(rows: int) -> list[int]:
    return [rows] + [0] * (len(COLUMNS) - 1)


def record(**rows: int) -> Totals:
    lines = [row(value) for value in rows.values()]
    counts = np.array([*lines, row(sum(rows.values()))])
    return Totals(list(rows), len(rows), 1, counts=counts.flatten())


def client_of(request_id: str) -> int:
    return 3 if request_id.startswith("three") else 0


def test_an_output_carries_its_total_and_the_first_one_what_is_new_for_its_client() -> None:
    ledger = Ledger(engine=1)
    ledger.add(record(a=2), client_of)
    ledger.add(record(a=3, b=1, three=7), client_of)  # prefill chunks have no output in between
    assert ledger.close(lambda name: True)[0].request_id == ENGINE_LETTER
    told = [ledger.tell(name) for name in ("a", "b", "three")]
    assert [x and (x["engine"], x["total"][0]) for x in told] == [(1, 5), (1, 1), (1, 7)]
    assert [x and x.get("new", [None])[0] for x in told] == [6, None, 7]
    ledger.add(record(b=4, three=2, a=1), client_of)  # in another order
    told = [ledger.tell(name) for name in ("a", "b", "three")]
    assert [x and (x["total"][0], x.get("new", [None])[0]) for x in told] == [
        (6, 5),
        (5, None),
        (9, 2),
    ]
    assert ledger.tell("unknown") is None


def test_counts_of_an_aborted_request_travel_in_a_letter_to_its_client() -> None:
    ledger = Ledger(engine=0)
    ledger.add(record(three=2, a=1), client_of)
    ledger.tell("a")
    letters = ledger.close(lambda name: False)
    assert [(x.client, x.content["new"][0]) for x in letters[:-1]] == [(3, 2)]
    # A step that was under way when the request left.
    ledger.add(record(three=5), client_of)
    (letter, _) = ledger.close(lambda name: False)
    assert (letter.client, letter.content["new"][0]) == (3, 5)
    assert ledger.tell("three") is None


def test_a_request_of_a_name_that_was_used_before_starts_from_nothing() -> None:
    ledger = Ledger(engine=0)
    for _ in range(2):
        ledger.add(record(a=3), client_of)
        content = ledger.tell("a")
        assert content is not None
        assert content["total"][0] == 3
        ledger.close(lambda name: False)


def test_layers_are_told_once_a_second_and_when_the_engine_is_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now)
    ledger = Ledger(engine=0)
    told = []
    for step, live in [(0.0, True), (0.1, True), (0.5, True), (1.1, True), (1.2, False)]:
        now = 100.0 + step
        ledger.add(record(a=1), client_of)
        ledger.tell("a")
        letters = ledger.close(lambda name, live=live: live)  # type: ignore[misc]
        told.append([x.content["new_layers"][0][0] for x in letters])
    assert told == [[1], [], [], [3], [1]]


def test_failures_are_told_at_once_and_once() -> None:
    ledger = Ledger(engine=0)
    ledger.add(Totals([], failures=2), client_of)
    ledger.note_failures(1)
    (letter,) = ledger.close(lambda name: True)
    assert letter.request_id == ENGINE_LETTER
    assert letter.content["failures"] == {"worker": 2, "engine": 1}
    assert ledger.close(lambda name: True) == []


def test_layers_of_requests_that_asked_are_cumulative() -> None:
    ledger = Ledger(engine=0)
    for _ in range(2):
        counts = np.array([row(rows) for rows in (3, 1, 2, 1, 2)])
        ledger.add(Totals(["a"], 1, 2, [0], counts.flatten()), client_of)
    content = ledger.tell("a")
    assert content is not None
    assert [counts[0] for counts in content["layers"]] == [2, 4]


@pytest.mark.parametrize("seed", range(20))
def test_everything_added_is_told_whatever_happens(seed: int) -> None:
    dice = random.Random(seed)
    ledger = Ledger(engine=0)
    live: set[str] = set()
    added, told, layers = zeros(), zeros(), zeros()
    for step in range(200):
        live |= {f"r{step}"} if dice.random() < 0.4 else set()
        batch = {name: dice.randrange(5) for name in live if dice.random() < 0.8}
        if batch:
            ledger.add(record(**batch), client_of)
            add(added, row(sum(batch.values())))
        if step == 199:
            live = set()
        live -= {name for name in live if dice.random() < 0.1}  # aborted or finished
        for name in batch:
            if dice.random() < 0.7 and (content := ledger.tell(name)) is not None:
                add(told, content.get("new", zeros()))
        for letter in ledger.close(live.__contains__):
            add(told, letter.content.get("new", zeros()))
            for counts in letter.content.get("new_layers", []):
                add(layers, counts)
    assert told == added
    assert layers == added
