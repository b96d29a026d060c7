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

from vllm_toptheta.telemetry import carrier, delivery, shield  # noqa: E402
from vllm_toptheta.telemetry.counters import FIELDS, zeros  # noqa: E402
from vllm_toptheta.telemetry.ledger import StepRecord  # noqa: E402


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


def run_scheduler(scheduler: Any, **kwargs: Any) -> Any:
    record = StepRecord(["a"], [zeros()], np.zeros((1, len(FIELDS)), np.int64), {})
    outputs = call(scheduler.update_from_output, None, SimpleNamespace(toptheta=record))
    return outputs[0].outputs[0]


def test_new_parameters_of_the_scheduler_change_nothing(scheduler_class: type) -> None:
    more_parameters("update_from_output")(scheduler_class)
    carrier.install_on_scheduler()
    assert "toptheta" in run_scheduler(scheduler_class()).kv_transfer_params


@pytest.mark.parametrize(
    "change", [without("update_from_output"), renamed_parameter("update_from_output")]
)
def test_a_scheduler_that_changed_is_left_alone(
    scheduler_class: type, change: Change, caplog: pytest.LogCaptureFixture
) -> None:
    assert_left_alone(scheduler_class, change, carrier.install_on_scheduler, caplog)


def test_a_scheduler_that_is_not_found_is_an_error_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(scheduler_module, "Scheduler")
    carrier.install_on_scheduler()
    assert len(errors(caplog)) == 1


@pytest.mark.parametrize("name", ["vllm_config", "requests", "data_parallel_index"])
def test_a_scheduler_without_a_name_runs_on(
    scheduler_class: type, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    carrier.install_on_scheduler()
    scheduler: Any = scheduler_class()
    parallel = scheduler.vllm_config.parallel_config
    delattr(parallel if name in vars(parallel) else scheduler, name)
    for _ in range(3):
        assert run_scheduler(scheduler).request_id == "a"
    assert len(errors(caplog)) == 1


class OutputProcessor:
    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}
        self.seen: list[Any] = []

    def add_request(self, request: Any) -> None:
        self.request_states[request.request_id] = SimpleNamespace(
            external_req_id="a", parent_req=None, request_index=0
        )

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
    request = SimpleNamespace(request_id="a", sampling_params=SimpleNamespace())
    delivery.resolve(request, "default", POLICY.server)
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
    delivery.install_on_output_processor()
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
    assert_left_alone(output_class, change, delivery.install_on_output_processor, caplog)


def test_an_output_without_its_field_is_served(
    output_class: type, caplog: pytest.LogCaptureFixture
) -> None:
    delivery.install_on_output_processor()
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
