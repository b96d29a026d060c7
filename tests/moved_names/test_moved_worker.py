"""The worker's model runner under another name or signature."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs an installed vLLM")

import vllm.v1.worker.gpu_model_runner as runner_module  # noqa: E402
from moved_names.changes import (  # noqa: E402
    POLICY,
    Change,
    call,
    copy_of,
    errors,
    more_parameters,
    renamed_parameter,
    without,
)

import vllm_toptheta  # noqa: E402
from vllm_toptheta.backend import registration  # noqa: E402
from vllm_toptheta.request_options import (  # noqa: E402
    RequestOptions,
)
from vllm_toptheta.telemetry import carrier  # noqa: E402
from vllm_toptheta.telemetry.counters import FIELDS  # noqa: E402
from vllm_toptheta.telemetry.step_log import STEP_LOG  # noqa: E402


class Runner:
    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(instance_id="x")
        self.input_batch = SimpleNamespace(req_ids=["a"])
        self.execute_model_state = None

    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> Any:
        lines = torch.zeros(3, len(FIELDS), dtype=torch.int64).flatten()
        STEP_LOG.append(SimpleNamespace(num_reqs=1, num_layers=2, detail=[], totals=lambda: lines))

    def sample_tokens(self, grammar_output: Any) -> Any:
        return SimpleNamespace(req_ids=["a"])


def scheduled(**xargs: Any) -> Any:
    params = SimpleNamespace(extra_args=xargs)
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
    carrier.install_on_worker(config, count=True)


@pytest.mark.parametrize("method", ["execute_model", "sample_tokens"])
def test_new_parameters_of_the_runner_change_nothing(runner_class: type, method: str) -> None:
    more_parameters(method)(runner_class)
    install_on_worker()
    output = run_step(runner_class(), scheduled(toptheta="off"))
    assert output.toptheta.request_ids == ["a"]
    assert STEP_LOG.options["a"].off


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
    carrier.install_on_worker(config, count=True)
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
        assert run_step(runner, scheduled(toptheta="off")).req_ids == ["a"]
        STEP_LOG.runner = runner
        assert carrier.batch_request_ids(runner) in (["a"], [])
    assert len(errors(caplog)) <= 1


@pytest.mark.parametrize(
    "xargs",
    [
        {"toptheta_k": 4096},
        {"toptheta_k": 1},
        {"toptheta_min_prob": 0.5},
        {"toptheta_k": "no number"},
        {"toptheta_k": 64, "toptheta_min_prob": 0.01},
        {"toptheta_k": float("nan")},
        {"toptheta": []},
        {"toptheta_": None},
    ],
)
def test_options_that_got_around_the_check_run_as_default(
    runner_class: type, xargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carrier, "find_policy", lambda config: POLICY)
    monkeypatch.setattr(STEP_LOG, "policies", {})
    install_on_worker()
    run_step(runner_class(), scheduled(**xargs))
    assert STEP_LOG.options == {}
    run_step(runner_class(), scheduled(toptheta_k=32))
    assert STEP_LOG.options == {"a": RequestOptions(k=32)}


def test_the_worker_knows_what_requests_may_ask_for(as_new: str) -> None:
    vllm_toptheta.register()
    assert carrier.find_policy is registration._policy_of
