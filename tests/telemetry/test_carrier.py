"""The carrier on stand-ins for vLLM's runner and scheduler: what is attached, merged, and said when a name moved."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_toptheta.telemetry import carrier
from vllm_toptheta.telemetry.counters import FIELDS


class Step:
    def __init__(self, *rows: int) -> None:
        self.rows = rows

    def totals(self) -> list[list[int]]:
        return [[count] + [0] * (len(FIELDS) - 1) for count in self.rows]


def make_runner() -> Any:
    class Runner:
        def __init__(self) -> None:
            self.input_batch = SimpleNamespace(req_ids=["a", "b"])

        def execute_model(self, scheduler_output: Any) -> None:
            carrier.STEP_LOG.append(Step(3, 5))

        def sample_tokens(self, grammar_output: Any) -> Any:
            return SimpleNamespace(req_ids=["a", "b"])

    return Runner


def scheduled(*finished: str) -> Any:
    return SimpleNamespace(finished_req_ids=set(finished))


def test_runner_outputs_carry_cumulative_summaries() -> None:
    runner_class = make_runner()
    carrier.install_on_runner(runner_class, k=128)
    carrier.install_on_runner(runner_class, k=128)  # the second time does nothing
    runner = runner_class()
    carrier.STEP_LOG.append(Step(100, 100))  # a dummy run: no engine step is open
    for expected in (3, 6):
        runner.execute_model(scheduled())
        output = runner.sample_tokens(None)
        assert output.toptheta["a"]["rows"] == expected
    runner.execute_model(scheduled("a"))
    assert runner.sample_tokens(None).toptheta["a"]["rows"] == 3


def test_an_aborted_step_is_not_counted() -> None:
    runner_class = make_runner()
    carrier.install_on_runner(runner_class, k=128)
    runner = runner_class()
    runner.execute_model(scheduled())
    runner.execute_model(scheduled())
    assert runner.sample_tokens(None).toptheta["a"]["rows"] == 3


def test_a_moved_runner_method_is_one_error_and_nothing_breaks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    runner_class = make_runner()
    del runner_class.sample_tokens
    before = runner_class.execute_model
    carrier.install_on_runner(runner_class, k=128)
    assert runner_class.execute_model is before
    assert "Runner.sample_tokens" in caplog.text


def test_scheduler_outputs_keep_a_connectors_own_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler_module = pytest.importorskip("vllm.v1.core.sched.scheduler", reason="needs an installed vLLM")
    output = SimpleNamespace(request_id="a", kv_transfer_params={"remote": 1})
    other = SimpleNamespace(request_id="b", kv_transfer_params=None)

    class Scheduler:
        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            return {0: SimpleNamespace(outputs=[output, other])}

    monkeypatch.setattr(scheduler_module, "Scheduler", Scheduler)
    carrier.install_on_scheduler()
    Scheduler().update_from_output(None, SimpleNamespace(toptheta={"a": {"rows": 3}}))
    assert output.kv_transfer_params == {"remote": 1, "toptheta": {"rows": 3}}
    assert other.kv_transfer_params is None
    Scheduler().update_from_output(None, SimpleNamespace())
    assert output.kv_transfer_params == {"remote": 1, "toptheta": {"rows": 3}}
