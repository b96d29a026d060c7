"""The scheduler's side of counts on a stand-in for vLLM's: which outputs carry them, and when."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_toptheta.hooks import scheduler
from vllm_toptheta.kernels.columns import COLUMNS
from vllm_toptheta.telemetry import ledger
from vllm_toptheta.telemetry.totals import Totals

WIDTH = len(COLUMNS)


class Scheduler:
    """Requests in, one output for each."""

    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_index=0))

    def __init__(self, **stops: list[str]) -> None:
        self.requests = {
            name: SimpleNamespace(
                client_index=0,
                is_finished=lambda: False,
                sampling_params=SimpleNamespace(stop=stop),
            )
            for name, stop in stops.items()
        }
        self.finishing: set[str] = set()

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = [
            SimpleNamespace(
                request_id=name,
                kv_transfer_params=None,
                finish_reason="stop" if name in self.finishing else None,
            )
            for name in self.requests
        ]
        for name in self.finishing:
            del self.requests[name]
        self.finishing = set()
        return {0: SimpleNamespace(outputs=outputs)}

    def told(self, *rows: int) -> dict[str, tuple[int, int]]:
        """Run a step; rows of every output that says something, so far and new."""
        counts = np.zeros((len(rows) + 1, WIDTH), dtype=np.int64)
        counts[:, 0] = *rows, sum(rows)
        record = Totals(list(self.requests), len(rows), 1, counts=counts.flatten())
        ran = SimpleNamespace(toptheta=record) if rows else SimpleNamespace()
        (outputs,) = self.update_from_output(None, ran).values()
        carried = [
            (one.request_id, one.kv_transfer_params["toptheta"])
            for one in outputs.outputs
            if one.kv_transfer_params
        ]
        return {
            name: (content.get("total", [0])[0], content.get("new", [0])[0])
            for name, content in carried
            if "total" in content or "new" in content
        }


@pytest.fixture
def scheduler_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("vllm.v1.core.sched.scheduler", reason="needs an installed vLLM")
    made = type("Scheduler", (Scheduler,), {"update_from_output": Scheduler.update_from_output})
    monkeypatch.setattr(module, "Scheduler", made)
    scheduler.install()
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(ledger.time, "monotonic", lambda: now.seconds)
    return now


def test_counts_travel_with_outputs_that_may_be_a_requests_last(
    scheduler_class: Any, clock: SimpleNamespace
) -> None:
    made = scheduler_class(a=[], b=[])
    assert made.told(1, 2) == {"a": (1, 3)}, "what is new, told once, after a step or half a second"
    assert made.told(1, 2) == {}, "nobody waits for them"
    made.finishing = {"a"}
    assert made.told(1, 2) == {"a": (3, 6)}
    assert made.told(2) == {}
    made.finishing = {"b"}
    assert made.told(2) == {"b": (10, 4)}


def test_a_request_with_stop_strings_may_end_with_any_output(
    scheduler_class: Any, clock: SimpleNamespace
) -> None:
    made = scheduler_class(a=["\n"], b=[])
    for step in range(1, 4):
        assert made.told(1, 2) == {"a": (step, 3)}


def test_counts_do_not_wait_longer_than_half_a_second(
    scheduler_class: Any, clock: SimpleNamespace
) -> None:
    made, told = scheduler_class(a=[]), []
    for step in range(12):
        clock.seconds = 100 + step / 8
        told.append(made.told(1).get("a"))
    assert [at for at, one in enumerate(told) if one] == [0, 4, 8]
    assert told[8] == (9, 4)


def test_counts_of_requests_that_left_are_told_with_a_step_without_any(
    scheduler_class: Any, clock: SimpleNamespace
) -> None:
    made = scheduler_class(a=[])
    made.told(1)
    assert made.told(1) == {}
    made.requests.clear()  # aborted; vLLM tells its workers in a step of no requests
    assert made.told() == {ledger.ENGINE_LETTER: (0, 1)}


def test_scheduler_outputs_keep_a_connectors_own_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = pytest.importorskip("vllm.v1.core.sched.scheduler", reason="needs an installed vLLM")
    output = SimpleNamespace(request_id="a", kv_transfer_params={"remote": 1})
    other = SimpleNamespace(request_id="b", kv_transfer_params=None)
    config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_index=2))

    class Scheduler:
        vllm_config = config

        def __init__(self) -> None:
            self.requests = {
                name: SimpleNamespace(client_index=client, is_finished=lambda: False)
                for name, client in (("a", 0), ("gone", 1))
            }

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            if hasattr(model_runner_output, "toptheta"):
                del self.requests["gone"]
            return {0: SimpleNamespace(outputs=[output, other])}

    monkeypatch.setattr(module, "Scheduler", Scheduler)
    scheduler.install()
    made = Scheduler()
    made.update_from_output(None, SimpleNamespace())
    assert output.kv_transfer_params == {"remote": 1}
    counts = np.zeros((3, WIDTH), dtype=np.int64)
    counts[:, 0] = 3, 4, 7
    record = Totals(["a", "gone"], 2, 1, counts=counts.flatten())
    outputs = made.update_from_output(None, SimpleNamespace(toptheta=record))
    assert output.kv_transfer_params["remote"] == 1
    assert output.kv_transfer_params["toptheta"]["new"][0] == 3
    assert output.kv_transfer_params["toptheta"]["engine"] == 2
    assert other.kv_transfer_params is None
    (letter,) = outputs[1].outputs
    assert letter.kv_transfer_params["toptheta"]["letter"]
    assert letter.kv_transfer_params["toptheta"]["new"][0] == 4
