"""The worker's model runner under another name or signature."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs an installed vLLM")

import vllm.v1.worker.gpu_model_runner as runner_module  # noqa: E402
from moved_names.changes import (  # noqa: E402
    Change,
    call,
    copy_of,
    errors,
    more_parameters,
    renamed_parameter,
    without,
)

from vllm_toptheta.hooks import model_runner  # noqa: E402
from vllm_toptheta.kernels.columns import COLUMNS  # noqa: E402
from vllm_toptheta.requests import Resolved, Targets  # noqa: E402


class Runner:
    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(instance_id="x")
        self.input_batch = SimpleNamespace(req_ids=["a"])
        self.execute_model_state = None

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        lines = torch.zeros(3, len(COLUMNS), dtype=torch.int64).flatten()
        model_runner.record(
            SimpleNamespace(num_reqs=1, num_layers=2, detail=[], totals=lambda: lines)
        )

    def sample_tokens(self, grammar_output: Any) -> Any:
        return SimpleNamespace(req_ids=["a"])


def scheduled(setting: str = "default", **xargs: Any) -> Any:
    params = SimpleNamespace(extra_args=xargs)
    if not xargs:
        Resolved(setting, Targets(None, None)).write(params)
    new = SimpleNamespace(req_id="a", sampling_params=params)
    return SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=[new])


def run_step(runner: Any, step: Any) -> Any:
    call(runner.execute_model, step)
    return call(runner.sample_tokens, None)


@pytest.fixture
def runner_class(monkeypatch: pytest.MonkeyPatch) -> type:
    made = copy_of(Runner)
    monkeypatch.setattr(runner_module, "GPUModelRunner", made)
    return made


def install_on_worker() -> None:
    config = SimpleNamespace(use_v2_model_runner=False, instance_id="x")
    model_runner.install(config, count=True)


def options(runner: Any) -> dict[str, Resolved]:
    engine = model_runner._engines.get(runner)
    assert engine is not None
    return engine.options


@pytest.mark.parametrize("method", ["execute_model", "sample_tokens"])
def test_new_parameters_of_the_runner_change_nothing(runner_class: type, method: str) -> None:
    more_parameters(method)(runner_class)
    install_on_worker()
    runner = runner_class()
    output = run_step(runner, scheduled("off"))
    assert output.toptheta.request_ids == ["a"]
    assert options(runner)["a"].setting == "off"


@pytest.mark.parametrize(
    "change",
    [without("execute_model"), without("sample_tokens"), renamed_parameter("execute_model")],
)
def test_a_runner_that_changed_is_left_alone(
    runner_class: type, change: Change, caplog: pytest.LogCaptureFixture
) -> None:
    change(runner_class)
    before = dict(vars(runner_class))
    install_on_worker()
    assert dict(vars(runner_class)) == before
    assert len(errors(caplog)) == 1


@pytest.mark.parametrize("name", ["GPUModelRunner", "use_v2_model_runner"])
def test_a_runner_that_is_not_found_is_an_error_in_the_log(
    monkeypatch: pytest.MonkeyPatch, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = SimpleNamespace(use_v2_model_runner=False, instance_id="x")
    monkeypatch.delattr(config if name in vars(config) else runner_module, name)
    model_runner.install(config, count=True)
    assert name in " ".join(errors(caplog))


@pytest.mark.parametrize("name", ["finished_req_ids", "scheduled_new_reqs"])
def test_a_step_without_a_name_runs_without_telemetry(
    runner_class: type, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    install_on_worker()
    runner = runner_class()
    for _ in range(3):
        step = scheduled()
        delattr(step, name)
        assert run_step(runner, step).req_ids == ["a"]
    assert len(errors(caplog)) == 1


@pytest.mark.parametrize("name", ["input_batch", "execute_model_state", "vllm_config"])
def test_a_runner_without_a_name_runs_on(
    runner_class: type, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    install_on_worker()
    runner = runner_class()
    delattr(runner, name)
    for _ in range(3):
        assert run_step(runner, scheduled("off")).req_ids == ["a"]
        assert model_runner._ids(runner, None) in (["a"], [])
    assert len(errors(caplog)) <= 1


@pytest.mark.parametrize(
    "xargs",
    [
        {"toptheta_k": 64},
        {"toptheta": "off"},
        {"toptheta": []},
        {"toptheta": {}},
        {"toptheta": {"setting": "k", "targets": {"decode": {"min_prob": "x"}, "prefill": None}}},
    ],
)
def test_options_that_got_around_the_check_run_as_default(
    runner_class: type, xargs: dict[str, Any]
) -> None:
    install_on_worker()
    runner = runner_class()
    run_step(runner, scheduled(**xargs))
    assert options(runner) == {}
    run_step(runner, scheduled("k"))
    assert options(runner) == {"a": Resolved("k", Targets(None, None))}
