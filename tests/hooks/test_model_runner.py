"""The worker's side of counts on stand-ins for vLLM's runners and scheduler: what is attached,
merged, and handed on between pipeline stages.
"""

import pickle
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_toptheta.hooks import model_runner
from vllm_toptheta.kernels.columns import COLUMNS
from vllm_toptheta.requests import RequestOptions, Resolved, Target, Targets
from vllm_toptheta.telemetry.ledger import KEY
from vllm_toptheta.telemetry.shield import take_failures
from vllm_toptheta.telemetry.totals import Totals

WIDTH = len(COLUMNS)


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
            model_runner.record(step)
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
    model_runner.wrap(made, count=True)
    return made


def scheduled(*finished: str, new: list[Any] | None = None) -> Any:
    return SimpleNamespace(finished_req_ids=set(finished), scheduled_new_reqs=new or [])


def new(name: str, **asked: Any) -> Any:
    """A request that came by request intake."""
    params = SimpleNamespace(extra_args=None)
    server = Targets(Target(0.001, 0.5), None)
    Resolved.of(RequestOptions(**asked), server).write(params)
    return SimpleNamespace(req_id=name, sampling_params=params)


def options(runner: Any) -> dict[str, Resolved]:
    engine = model_runner._engines.get(runner)
    assert engine is not None
    return engine.options


def rows(totals: Totals, *others: Totals) -> dict[str, int]:
    record = totals.together(list(others))
    return {
        name: counts[0] for name, counts in zip(totals.request_ids, record.requests, strict=True)
    }


def test_outputs_carry_the_counts_of_their_step(runner_class: Any) -> None:
    before = runner_class.execute_model
    model_runner.wrap(runner_class, count=True)
    assert runner_class.execute_model is before, "the second time does nothing"
    model_runner.record(Step([100, 100]))  # a dummy run: no engine step is open
    for _ in range(2):
        runner = runner_class()
        runner.execute_model(scheduled())
        totals = runner.sample_tokens(None).toptheta
        assert rows(totals) == {"a": 3, "b": 5}
        assert [counts[0] for counts in totals.together([]).layers] == [8, 0]


@pytest.mark.parametrize("runner_class", [RunnerV2], indirect=True)
def test_the_v2_runner_hands_out_the_counts_with_its_late_output(runner_class: Any) -> None:
    runner = runner_class()
    runner.execute_model(scheduled())
    output = runner.sample_tokens(None)
    runner_class.steps = [Step([9, 9])]
    runner.execute_model(scheduled())  # the next step runs before the output is asked for
    assert rows(output.get_output().toptheta) == {"b": 3, "a": 5}
    assert model_runner._ids(runner, [4, 7]) == ["b", "a"]
    runner.execute_model(scheduled(), None, dummy_run=True)
    assert not hasattr(runner.sample_tokens(None).get_output(), KEY), "dummy runs are not recorded"


def test_a_late_output_does_not_hold_the_tensors_of_its_step() -> None:
    step = Step([3, 5], detail=[1])
    alive = weakref.ref(step)
    engine = model_runner.Engine(steps=[step])
    del step
    counts = model_runner._begin(Runner(), engine)
    assert counts is not None
    assert alive() is None
    assert rows(counts) == {"a": 3, "b": 5}


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


class Waiting(Step):
    """A step that may be asked for its counts later."""

    waits = True

    def of_rank(self, *others: Any) -> torch.Tensor:
        assert all(isinstance(other, Waiting) for other in others)
        return torch.stack([step.totals() for step in (self, *others)]).sum(0)


def test_steps_that_wait_are_added_up_when_they_are_asked_for(runner_class: Any) -> None:
    runner, told = runner_class(), []
    for counted in ([3, 5], [1, 2], [4, 0]):
        runner.input_batch.req_ids = ["a", "b"]
        runner_class.steps = [Waiting(counted, detail=[1]), Waiting([10, 20], detail=[1], layer=1)]
        runner.execute_model(scheduled())
        told.append(runner.sample_tokens(None).toptheta)
    first, *others = told
    assert all(one.counts is None and one.follows(first) for one in others)
    record = first.together(others)
    assert rows(first, *others) == {"a": 38, "b": 67}
    assert [counts[0] for counts in record.layers] == [15, 90]
    assert [counts[0] for counts in record.detail["b"]] == [7, 60]
    sent = pickle.loads(pickle.dumps(first))  # to a ledger in another process
    assert sent.follows(first)
    assert rows(sent) == {"a": 13, "b": 25}


def test_other_requests_do_not_follow(runner_class: Any) -> None:
    steps = [
        (["a", "b"], [Waiting([1, 1])]),
        (["b", "a"], [Waiting([1, 1])]),
        (["b", "a"], [Waiting([1, 1], detail=[0])]),
        (["b", "a"], [Waiting([1, 1], detail=[0]), Waiting([1, 1], detail=[0])]),
        (["b", "a"], [Step([1, 1], detail=[0])]),
    ]
    runner, before = runner_class(), Totals([])
    for runner.input_batch.req_ids, runner_class.steps in steps:
        runner.execute_model(scheduled())
        told = runner.sample_tokens(None).toptheta
        assert not told.follows(before)
        assert told.follows(told)
        before = told


def test_several_builders_add_up_and_padding_is_dropped(runner_class: Any) -> None:
    runner_class.steps = [Step([3, 5, 9]), Step([1, 1, 9], layer=1)]
    runner = runner_class()
    runner.execute_model(scheduled())
    totals = runner.sample_tokens(None).toptheta
    assert rows(totals) == {"a": 4, "b": 6}
    assert [counts[0] for counts in totals.together([]).layers] == [17, 11]


def test_layers_of_a_request_are_told_where_it_asked(runner_class: Any) -> None:
    runner_class.steps = [Step([3, 5], detail=[1]), Step([1, 2], detail=[1], layer=1)]
    runner = runner_class()
    runner.execute_model(scheduled())
    totals = runner.sample_tokens(None).toptheta
    assert {
        name: [c[0] for c in layers] for name, layers in totals.together([]).detail.items()
    } == {"b": [5, 2]}


def test_pipeline_stages_hand_their_counts_on(runner_class: Any) -> None:
    sent = SimpleNamespace(tensors={"hidden_states": torch.zeros(2)})

    class FirstStage(Runner):
        def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
            model_runner.record(Step([3, 5]))
            return sent

        def sample_tokens(self, grammar_output: Any) -> Any:
            return None

    model_runner.wrap(FirstStage, count=True)
    first = FirstStage()
    assert first.execute_model(scheduled()) is sent
    assert first.sample_tokens(None) is None
    assert set(sent.tensors) == {"hidden_states", KEY}
    runner_class.steps = [Step([10, 20], layer=1)]
    last = runner_class()
    last.execute_model(scheduled(), sent)
    totals = last.sample_tokens(None).toptheta
    assert set(sent.tensors) == {"hidden_states"}, "the model must not see the counts"
    assert rows(totals) == {"a": 13, "b": 25}
    assert [counts[0] for counts in totals.together([]).layers] == [8, 30]


def test_an_aborted_step_is_not_counted(runner_class: Any) -> None:
    runner = runner_class()
    runner.execute_model(scheduled())
    runner.execute_model(scheduled())
    assert rows(runner.sample_tokens(None).toptheta) == {"a": 3, "b": 5}


def test_options_are_noted_until_the_request_leaves(runner_class: Any) -> None:
    runner = runner_class()
    arrived = [new("a", k=64), new("b"), new("d", layers=True)]
    arrived += [
        SimpleNamespace(req_id="c", sampling_params=SimpleNamespace(extra_args={"toptheta_k": 64})),
        SimpleNamespace(req_id="pooling", sampling_params=None),
    ]
    runner.execute_model(scheduled(new=arrived))
    assert options(runner)["a"].targets.decode == Target(None, 0.5, 64)
    assert options(runner)["d"].layers
    assert set(options(runner)) == {"a", "d"}, "what was not checked runs as default"
    runner.execute_model(scheduled("d"))
    runner.execute_model(scheduled())
    assert set(options(runner)) == {"a"}
    runner.execute_model(scheduled("a", new=[new("a", pruning=False)]))
    assert options(runner)["a"].setting == "off"
    runner.execute_model(scheduled("a"))
    assert options(runner) == {}


def test_engines_of_one_process_keep_apart(runner_class: Any) -> None:
    first, second = runner_class(), runner_class()
    first.execute_model(scheduled(new=[new("a", k=64)]))
    runner_class.steps = [Step([7, 9])]
    second.execute_model(scheduled(new=[new("a", pruning=False)]))
    assert [options(one)["a"].setting for one in (first, second)] == ["k", "off"]
    assert rows(first.sample_tokens(None).toptheta) == {"a": 3, "b": 5}
    assert rows(second.sample_tokens(None).toptheta) == {"a": 7, "b": 9}
    gone = id(second)
    del second
    assert gone not in model_runner._engines._values


def test_a_failing_step_is_an_output_without_counts(
    runner_class: Any, caplog: pytest.LogCaptureFixture
) -> None:
    runner = runner_class()
    take_failures("worker")
    runner_class.steps = [SimpleNamespace(totals=lambda: 1 / 0)]
    runner.execute_model(scheduled())
    totals = runner.sample_tokens(None).toptheta
    assert (totals.request_ids, totals.failures) == ([], 1)
    runner_class.steps = [Step([3, 5])]
    runner.input_batch.req_ids = ["a", "b"]
    runner.execute_model(scheduled())
    assert rows(runner.sample_tokens(None).toptheta) == {"a": 3, "b": 5}


def test_a_rank_that_knows_no_requests_adds_up_with_the_others() -> None:
    added = []

    def totals() -> torch.Tensor:
        added.append("all ranks")
        return torch.zeros(WIDTH)

    step = SimpleNamespace(totals=totals, num_reqs=1, num_layers=0, detail=[])
    with pytest.raises(AttributeError):
        model_runner._begin(SimpleNamespace(), model_runner.Engine(steps=[step]))
    assert added == ["all ranks"], "or they would wait for it"


def test_without_counting_only_options_are_noted() -> None:
    made = type("Runner", (Runner,), {})
    made.execute_model, made.sample_tokens = Runner.execute_model, Runner.sample_tokens
    made.steps = [Step([1, 1])]
    model_runner.wrap(made, count=False)
    assert made.sample_tokens is Runner.sample_tokens, "nothing more than it needs"
    runner = made()
    runner.execute_model(scheduled())
    assert not hasattr(runner.sample_tokens(None), "toptheta")
    model_runner.wrap(made, count=True)
    runner.execute_model(scheduled())
    assert runner.sample_tokens(None).toptheta, "another engine of the process counts"


def test_a_moved_runner_method_changes_nothing() -> None:
    class Moved:
        def execute_model(self, scheduler_output: Any) -> None:
            return None

    before = Moved.execute_model
    with pytest.raises(AttributeError, match=r"Moved\.sample_tokens"):
        model_runner.wrap(Moved, count=True)
    assert Moved.execute_model is before
