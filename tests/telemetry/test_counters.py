"""Counters per request: steps add up, summaries show ratios and dense reasons, requests that left are forgotten."""

from vllm_toptheta.telemetry.counters import FIELDS, RequestCounters, summarise


def row(**values: int) -> list[int]:
    return [values.get(name, 0) for name in FIELDS]


def test_steps_of_a_request_add_up_whatever_its_place_in_the_batch() -> None:
    counters = RequestCounters(k=128)
    counters.add(["a", "b"], [row(rows=2, keys_scored=100, keys_kept=10), row(rows=1)])
    counters.add(["b", "a"], [row(rows=1), row(rows=2, keys_scored=102, keys_kept=11)])
    summary = counters.summary("a")
    assert summary is not None
    assert (summary["rows"], summary["keys_scored"], summary["keys_kept"]) == (4, 202, 21)
    assert summary["kept_fraction"] == round(21 / 202, 6)
    assert counters.summary("b") == summarise(128, row(rows=2))


def test_padding_rows_without_a_request_are_dropped() -> None:
    counters = RequestCounters(k=128)
    counters.add(["a"], [row(rows=1), row(rows=7)])
    assert counters.summary("a") == summarise(128, row(rows=1))


def test_dense_rows_are_shown_by_reason() -> None:
    summary = summarise(64, row(rows=9, dense_short=4, dense_prefill=5))
    assert summary["dense_rows"] == {"short": 4, "window": 0, "layer": 0, "prefill": 5}


def test_a_request_without_decode_rows_has_no_fractions() -> None:
    summary = summarise(64, row(dense_prefill=5))
    assert summary["kept_fraction"] is None
    assert summary["v_row_fraction"] is None


def test_requests_that_left_are_forgotten() -> None:
    counters = RequestCounters(k=128)
    counters.add(["a"], [row(rows=1)])
    counters.forget(["a", "never-seen"])
    assert counters.summary("a") is None
