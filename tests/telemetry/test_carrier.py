"""The carrier on stand-ins for vLLM's runners and scheduler: what is attached, merged, handed on
between pipeline stages, and said when a name moved.
"""

import logging
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_toptheta.request_options import RequestOptions
from vllm_toptheta.telemetry import carrier
from vllm_toptheta.telemetry.counters import FIELDS
from vllm_toptheta.telemetry.step_log import STEP_LOG

WIDTH = len(FIELDS)


@dataclass
class Step:
    """An attention step of two layers; only the column `rows` is used."""

    rows: list[int]
    detail: list[int] = field(default_factory=list)
    num_layers: int = 2
    layer: int = 0

    @property
    def num_reqs(self) -> int:
        return len(self.rows)

    def totals(self) -> torch.Tensor:
        layers = [0] * self.num_layers
        layers[self.layer] = sum(self.rows)
        detail = [self.rows[row] if i == self.layer else 0 for row in self.detail for i in (0, 1)]
        lines = torch.zeros(self.num_reqs + self.num_layers + len(detail), WIDTH, dtype=torch.int64)
        lines[:, 0] = torch.tensor([*self.rows, *layers, *detail])
        return lines.flatten()


class Runner:
    """V1: the batch belongs to the runner, and the output is a plain one."""

    steps: list[Any] = []

    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(req_ids=["a", "b"])
        self.execute_model_state: Any = None

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        for step in self.steps:
            STEP_LOG.append(step)
        return None

    def sample_tokens(self, grammar_output: Any) -> Any:
        self.input_batch.req_ids = []  # sampling may drop rows
        return SimpleNamespace(req_ids=["a", "b"])


class RunnerV2(Runner):
    """V2: the batch belongs to the step, and the output comes later."""

    def __init__(self) -> None:
        self.req_states = SimpleNamespace(index_to_req_id={7: "a", 4: "b"})

    def execute_model(
        self, scheduler_output: Any, intermediate_tensors: Any = None, dummy_run: bool = False
    ) -> Any:
        batch = SimpleNamespace(req_ids=["b", "a"])
        self.execute_model_state = SimpleNamespace(input_batch=batch)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        self.execute_model_state = None
        return SimpleNamespace(get_output=lambda: SimpleNamespace(req_ids=["b", "a"]))


@pytest.fixture
def runner_class(request: pytest.FixtureRequest) -> Any:
    made = type("Runner", (getattr(request, "param", Runner),), {})
    made.steps = [Step([3, 5])]
    # The wraps go onto this class, not onto the shared ones.
    for name in ("execute_model", "sample_tokens"):
        setattr(made, name, getattr(made, name))
    carrier.install_on_runner(made, count=True)
    return made


def scheduled(*finished: str, new: list[Any] | None = None) -> Any:
    return SimpleNamespace(finished_req_ids=set(finished), scheduled_new_reqs=new or [])


def rows(record: Any) -> dict[str, int]:
    return {
        name: counts[0] for name, counts in zip(record.request_ids, record.requests, strict=True)
    }


def test_outputs_carry_the_counts_of_their_step(runner_class: Any) -> None:
    before = runner_class.execute_model
    carrier.install_on_runner(runner_class, count=True)
    assert runner_class.execute_model is before, "the second time does nothing"
    STEP_LOG.append(Step([100, 100]))  # a dummy run: no engine step is open
    for _ in range(2):
        runner = runner_class()
        runner.execute_model(scheduled())
        record = runner.sample_tokens(None).toptheta
        assert rows(record) == {"a": 3, "b": 5}
        assert [counts[0] for counts in record.layers] == [8, 0]


@pytest.mark.parametrize("runner_class", [RunnerV2], indirect=True)
def test_the_v2_runner_hands_out_the_counts_with_its_late_output(runner_class: Any) -> None:
    runner = runner_class()
    runner.execute_model(scheduled())
    output = runner.sample_tokens(None)
    runner_class.steps = [Step([9, 9])]
    runner.execute_model(scheduled())  # the next step runs before the output is asked for
    assert rows(output.get_output().toptheta) == {"b": 3, "a": 5}
    assert carrier.batch_request_ids(runner, [4, 7]) == ["b", "a"]
    runner.execute_model(scheduled(), None, dummy_run=True)
    assert STEP_LOG.runner is None, "dummy runs are not recorded"


def test_a_late_output_does_not_hold_the_tensors_of_its_step() -> None:
    STEP_LOG.begin(SimpleNamespace(), [], [])
    step = Step([3, 5], detail=[1])
    alive = weakref.ref(step)
    STEP_LOG.append(step)
    del step
    counts = carrier._begin(Runner(), {})
    assert counts is not None
    assert alive() is None
    assert rows(counts.record()) == {"a": 3, "b": 5}


@pytest.mark.parametrize("runner_class", [RunnerV2], indirect=True)
def test_counts_of_a_device_are_waited_for_when_the_output_is_taken(
    runner_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class OnDevice(torch.Tensor):
        @property
        def device(self) -> torch.device:
            return torch.device("cuda")

    class Event:
        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

    class Host(torch.Tensor):
        def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> Any:
            log.append("copy" if non_blocking else "blocking copy")
            return super().copy_(source.as_subclass(torch.Tensor))

    def empty(shape: Any, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        log.append("pinned" if pin_memory else "pageable")
        return torch.zeros(shape, dtype=dtype).as_subclass(Host)

    step = Step([3, 5])
    totals = step.totals().as_subclass(OnDevice)
    runner_class.steps = [SimpleNamespace(**vars(step), num_reqs=2, totals=lambda: totals)]
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    runner = runner_class()
    runner.execute_model(scheduled())
    output = runner.sample_tokens(None)
    assert log == ["pinned", "copy", "record"]
    assert rows(output.get_output().toptheta) == {"b": 3, "a": 5}
    assert log[3:] == ["wait"]


def test_several_builders_add_up_and_padding_is_dropped(runner_class: Any) -> None:
    runner_class.steps = [Step([3, 5, 9]), Step([1, 1, 9], layer=1)]
    runner = runner_class()
    runner.execute_model(scheduled())
    record = runner.sample_tokens(None).toptheta
    assert rows(record) == {"a": 4, "b": 6}
    assert [counts[0] for counts in record.layers] == [17, 11]


def test_layers_of_a_request_are_told_where_it_asked(runner_class: Any) -> None:
    runner_class.steps = [Step([3, 5], detail=[1]), Step([1, 2], detail=[1], layer=1)]
    runner = runner_class()
    runner.execute_model(scheduled())
    record = runner.sample_tokens(None).toptheta
    assert {name: [c[0] for c in layers] for name, layers in record.detail.items()} == {"b": [5, 2]}


def test_pipeline_stages_hand_their_counts_on(runner_class: Any) -> None:
    sent = SimpleNamespace(tensors={"hidden_states": torch.zeros(2)})

    class FirstStage(Runner):
        def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
            STEP_LOG.append(Step([3, 5]))
            return sent

        def sample_tokens(self, grammar_output: Any) -> Any:
            return None

    carrier.install_on_runner(FirstStage, count=True)
    first = FirstStage()
    assert first.execute_model(scheduled()) is sent
    assert first.sample_tokens(None) is None
    assert set(sent.tensors) == {"hidden_states", carrier.KEY}
    runner_class.steps = [Step([10, 20], layer=1)]
    last = runner_class()
    last.execute_model(scheduled(), sent)
    record = last.sample_tokens(None).toptheta
    assert set(sent.tensors) == {"hidden_states"}, "the model must not see the counts"
    assert rows(record) == {"a": 13, "b": 25}
    assert [counts[0] for counts in record.layers] == [8, 30]


def test_an_aborted_step_is_not_counted(runner_class: Any) -> None:
    runner = runner_class()
    runner.execute_model(scheduled())
    runner.execute_model(scheduled())
    assert rows(runner.sample_tokens(None).toptheta) == {"a": 3, "b": 5}


def test_options_are_noted_until_the_request_leaves(runner_class: Any) -> None:
    def new(name: str, **xargs: Any) -> Any:
        return SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args=xargs))

    runner = runner_class()
    runner.execute_model(scheduled(new=[new("a", toptheta_k=64), new("b"), new("c", toptheta_x=1)]))
    assert STEP_LOG.options == {"a": RequestOptions(k=64)}, "what was not checked runs as default"
    runner.execute_model(scheduled())
    assert set(STEP_LOG.options) == {"a"}
    runner.execute_model(scheduled("a", new=[new("a", toptheta="off")]))
    assert STEP_LOG.options["a"].off
    runner.execute_model(scheduled("a"))
    assert STEP_LOG.options == {}


def test_a_failing_step_is_an_output_without_counts(
    runner_class: Any, caplog: pytest.LogCaptureFixture
) -> None:
    runner = runner_class()
    carrier.take_failures("worker")
    runner_class.steps = [SimpleNamespace(totals=lambda: 1 / 0)]
    runner.execute_model(scheduled())
    record = runner.sample_tokens(None).toptheta
    assert (record.request_ids, record.failures) == ([], 1)
    runner_class.steps = [Step([3, 5])]
    runner.input_batch.req_ids = ["a", "b"]
    runner.execute_model(scheduled())
    assert rows(runner.sample_tokens(None).toptheta) == {"a": 3, "b": 5}


def test_a_rank_that_knows_no_requests_adds_up_with_the_others() -> None:
    added = []

    def totals() -> torch.Tensor:
        added.append("all ranks")
        return torch.zeros(WIDTH)

    STEP_LOG.begin(SimpleNamespace(), [], [])
    STEP_LOG.append(SimpleNamespace(totals=totals, num_reqs=1, num_layers=0, detail=[]))
    with pytest.raises(AttributeError):
        carrier._begin(SimpleNamespace(), {})
    assert added == ["all ranks"], "or they would wait for it"


def test_without_counting_only_options_are_noted() -> None:
    made = type("Runner", (Runner,), {})
    made.execute_model, made.sample_tokens = Runner.execute_model, Runner.sample_tokens
    made.steps = [Step([1, 1])]
    carrier.install_on_runner(made, count=False)
    runner = made()
    runner.execute_model(scheduled())
    assert not hasattr(runner.sample_tokens(None), "toptheta")


def test_a_moved_runner_method_is_one_error_and_nothing_breaks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)

    class Moved:
        def execute_model(self, scheduler_output: Any) -> None:
            return None

    before = Moved.execute_model
    carrier.install_on_runner(Moved, count=True)
    assert Moved.execute_model is before
    assert "Moved.sample_tokens" in caplog.text


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
            alive = SimpleNamespace(client_index=1, is_finished=lambda: False)
            self.requests = {"a": alive, "gone": alive}

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            if hasattr(model_runner_output, "toptheta"):
                del self.requests["gone"]
            return {0: SimpleNamespace(outputs=[output, other])}

    monkeypatch.setattr(module, "Scheduler", Scheduler)
    carrier.install_on_scheduler()
    scheduler = Scheduler()
    scheduler.update_from_output(None, SimpleNamespace())
    assert output.kv_transfer_params == {"remote": 1}
    counts = [[3] + [0] * (WIDTH - 1), [4] + [0] * (WIDTH - 1)]
    record = carrier.StepRecord(["a", "gone"], counts, np.array(counts[:1]), {})
    outputs = scheduler.update_from_output(None, SimpleNamespace(toptheta=record))
    assert output.kv_transfer_params["remote"] == 1
    assert output.kv_transfer_params["toptheta"]["new"][0] == 3
    assert output.kv_transfer_params["toptheta"]["engine"] == 2
    assert other.kv_transfer_params is None
    (letter,) = outputs[1].outputs
    assert letter.request_id == "gone"
    assert letter.kv_transfer_params["toptheta"]["letter"]
    assert letter.kv_transfer_params["toptheta"]["new"][0] == 4
