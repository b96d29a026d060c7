"""The engine core's scheduler and the server's output processor under other names."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

import vllm.v1.core.sched.scheduler as scheduler_module  # noqa: E402
import vllm.v1.engine.output_processor as output_module  # noqa: E402
from moved_names.changes import (  # noqa: E402
    POLICY,
    Change,
    assert_left_alone,
    call,
    copy_of,
    errors,
    more_parameters,
    renamed_parameter,
    without,
)

from vllm_toptheta.hooks import output_processor, scheduler  # noqa: E402
from vllm_toptheta.kernels.columns import COLUMNS  # noqa: E402
from vllm_toptheta.requests import Resolved  # noqa: E402
from vllm_toptheta.telemetry import shield  # noqa: E402
from vllm_toptheta.telemetry.counters import zeros  # noqa: E402
from vllm_toptheta.telemetry.totals import Totals  # noqa: E402


class Scheduler:
    def __init__(self) -> None:
        parallel = SimpleNamespace(data_parallel_index=0)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)
        alive = SimpleNamespace(client_index=0, is_finished=lambda: False)
        self.requests = {"a": alive}

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        output = SimpleNamespace(request_id="a", kv_transfer_params=None)
        return {0: SimpleNamespace(outputs=[output])}


@pytest.fixture
def scheduler_class(monkeypatch: pytest.MonkeyPatch) -> type:
    made = copy_of(Scheduler)
    monkeypatch.setattr(scheduler_module, "Scheduler", made)
    return made


def run_scheduler(made: Any, **kwargs: Any) -> Any:
    record = Totals(["a"], 1, 1, counts=np.zeros(2 * len(COLUMNS), np.int64))
    outputs = call(made.update_from_output, None, SimpleNamespace(toptheta=record))
    return outputs[0].outputs[0]


def test_new_parameters_of_the_scheduler_change_nothing(scheduler_class: type) -> None:
    more_parameters("update_from_output")(scheduler_class)
    scheduler.install()
    assert "toptheta" in run_scheduler(scheduler_class()).kv_transfer_params


@pytest.mark.parametrize(
    "change", [without("update_from_output"), renamed_parameter("update_from_output")]
)
def test_a_scheduler_that_changed_is_left_alone(
    scheduler_class: type, change: Change, caplog: pytest.LogCaptureFixture
) -> None:
    assert_left_alone(scheduler_class, change, scheduler.install, caplog)


def test_a_scheduler_that_is_not_found_is_an_error_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(scheduler_module, "Scheduler")
    scheduler.install()
    assert len(errors(caplog)) == 1


@pytest.mark.parametrize("name", ["vllm_config", "requests", "data_parallel_index"])
def test_a_scheduler_without_a_name_runs_on(
    scheduler_class: type, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler.install()
    made: Any = scheduler_class()
    parallel = made.vllm_config.parallel_config
    delattr(parallel if name in vars(parallel) else made, name)
    for _ in range(3):
        assert run_scheduler(made).request_id == "a"
    assert len(errors(caplog)) == 1


class State:
    external_req_id, parent_req, request_index = "a", None, 0


class OutputProcessor:
    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}
        self.seen: list[Any] = []

    def add_request(self, request: Any) -> None:
        self.request_states[request.request_id] = State()

    def process_outputs(self, engine_core_outputs: Any) -> Any:
        self.seen += engine_core_outputs
        return "done"


@pytest.fixture
def output_class(monkeypatch: pytest.MonkeyPatch) -> type:
    made = copy_of(OutputProcessor)
    monkeypatch.setattr(output_module, "OutputProcessor", made)
    return made


def serve_one(processor: Any, *missing: str) -> Any:
    """One output of a request, without some of vLLM's names."""
    params = SimpleNamespace(extra_args=None)
    Resolved("default", POLICY.server).write(params)
    request = SimpleNamespace(request_id="a", sampling_params=params)
    content = {"engine": 0, "new": zeros(), "total": zeros()}
    output = SimpleNamespace(request_id="a", kv_transfer_params={"toptheta": content})
    for name in missing:
        for thing in (output, processor):
            if name in vars(thing):
                delattr(thing, name)
    call(processor.add_request, request)
    assert call(processor.process_outputs, [output]) == "done"
    assert processor.seen[-1:] == [output]
    return output


@pytest.mark.parametrize("method", ["add_request", "process_outputs"])
def test_new_parameters_of_the_output_processor_change_nothing(
    output_class: type, method: str
) -> None:
    more_parameters(method)(output_class)
    output_processor.install()
    assert serve_one(output_class()).kv_transfer_params["toptheta"]["rows"] == 0


@pytest.mark.parametrize(
    "change",
    [
        without("add_request"),
        without("process_outputs"),
        renamed_parameter("add_request"),
        renamed_parameter("process_outputs"),
    ],
)
def test_an_output_processor_that_changed_is_left_alone(
    output_class: type, change: Change, caplog: pytest.LogCaptureFixture
) -> None:
    assert_left_alone(output_class, change, output_processor.install, caplog)


def test_an_output_without_its_field_is_served(
    output_class: type, caplog: pytest.LogCaptureFixture
) -> None:
    output_processor.install()
    processor = output_class()
    for _ in range(3):
        serve_one(processor, "kv_transfer_params")
    assert len(errors(caplog)) == 1


def test_a_listener_that_fails_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(shield, "listeners", [lambda place: 1 // 0, heard.append])
    with shield.shielded("server"):
        raise OSError
    assert heard == ["server"]
