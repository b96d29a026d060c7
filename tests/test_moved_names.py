"""A vLLM that is not the tested one: every name of it that is wrapped or read is changed, one at a
time. Serving then goes on without telemetry, with an error in the log, or the start refuses."""

import asyncio
import inspect
import json
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs an installed vLLM")

import vllm.config  # noqa: E402
import vllm.v1.attention.backends.registry as registry  # noqa: E402
import vllm.v1.core.sched.scheduler as scheduler_module  # noqa: E402
import vllm.v1.engine.input_processor as input_module  # noqa: E402
import vllm.v1.engine.output_processor as output_module  # noqa: E402
import vllm.v1.worker.gpu_model_runner as runner_module  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402

import vllm_toptheta  # noqa: E402
from vllm_toptheta.backend import registration  # noqa: E402
from vllm_toptheta.config import TopThetaConfig  # noqa: E402
from vllm_toptheta.request_options import (  # noqa: E402
    RequestOptions,
    RequestPolicy,
    Target,
    Targets,
)
from vllm_toptheta.serving import install as install_module  # noqa: E402
from vllm_toptheta.serving import served as served_module  # noqa: E402
from vllm_toptheta.serving.served import Served, set_served  # noqa: E402
from vllm_toptheta.telemetry import carrier, delivery, shield  # noqa: E402
from vllm_toptheta.telemetry.counters import FIELDS, zeros  # noqa: E402
from vllm_toptheta.telemetry.ledger import StepRecord  # noqa: E402
from vllm_toptheta.telemetry.step_log import STEP_LOG  # noqa: E402

vllm_toptheta.register()

POLICY = RequestPolicy(
    Targets(Target(0.001), None), {"min_prob": (1e-6, 0.1), "k": (16.0, 64.0)}, allow_off=True
)
Change = Callable[[type], None]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(shield, "_logged", set())
    monkeypatch.setattr(shield, "_failures", type(shield._failures)())
    monkeypatch.setattr(STEP_LOG, "options", {})
    monkeypatch.setattr(carrier, "find_policy", None)
    monkeypatch.setattr(delivery, "_sinks", [])


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def more_parameters(name: str) -> Change:
    """The method gets a keyword, which its callers use."""

    def change(owner: type) -> None:
        old = getattr(owner, name)

        def changed(self: Any, *args: Any, new: int, **kwargs: Any) -> Any:
            return old(self, *args, **kwargs)

        signature = inspect.signature(old)
        added = inspect.Parameter("new", inspect.Parameter.KEYWORD_ONLY)
        parameters = [*signature.parameters.values(), added]
        vars(changed)["__signature__"] = signature.replace(parameters=parameters)
        setattr(owner, name, changed)

    return change


def without(name: str) -> Change:
    return lambda owner: setattr(owner, name, None) or delattr(owner, name)


def renamed_parameter(name: str) -> Change:
    def change(owner: type) -> None:
        old = getattr(owner, name)
        setattr(owner, name, lambda self, *moved: old(self, *moved))

    return change


def call(method: Any, *args: Any, **kwargs: Any) -> Any:
    """As vLLM calls its own method: with the new keyword, where there is one."""
    if "new" in inspect.signature(method).parameters:
        kwargs["new"] = 1
    return method(*args, **kwargs)


def copy_of(owner: type) -> type:
    """Another class of the same, to be changed and wrapped."""
    own = {name: value for name, value in vars(owner).items() if name not in _OF_EVERY_CLASS}
    return type(owner.__name__, (), own)


_OF_EVERY_CLASS = ("__dict__", "__weakref__")


# The worker.


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


# The engine core.


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
    change(scheduler_class)
    before = dict(vars(scheduler_class))
    carrier.install_on_scheduler()
    assert dict(vars(scheduler_class)) == before
    assert len(errors(caplog)) == 1


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


# The server.


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
    change(output_class)
    before = dict(vars(output_class))
    delivery.install_on_output_processor()
    assert dict(vars(output_class)) == before
    assert len(errors(caplog)) == 1


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


# The start.


class InputProcessor:
    vllm_config = SimpleNamespace(instance_id="moved")

    def process_inputs(self, request_id: str, prompt: str, params: Any) -> Any:
        return SimpleNamespace(sampling_params=SimpleNamespace(), cache_salt=None)


@pytest.fixture
def input_class(monkeypatch: pytest.MonkeyPatch) -> type:
    made = copy_of(InputProcessor)
    monkeypatch.setattr(input_module, "InputProcessor", made)
    monkeypatch.setattr(served_module, "_served", {})
    nothing: Any = None
    set_served(Served("m", TopThetaConfig(), POLICY, nothing, None, None, None), "moved")
    return made


def test_new_parameters_of_the_input_processor_change_nothing(input_class: type) -> None:
    more_parameters("process_inputs")(input_class)
    install_module._install_on_input_processor()
    params = SimpleNamespace(extra_args={"toptheta": "off"})
    for kwargs in ({"params": params}, {}):
        args = () if kwargs else (params,)
        request = call(input_class().process_inputs, "a", "text", *args, **kwargs)
        assert request.cache_salt == "toptheta:off:"


def test_options_that_nobody_would_check_refuse_the_start(input_class: type) -> None:
    renamed_parameter("process_inputs")(input_class)
    with pytest.raises(RuntimeError, match="Install a tested vLLM"):
        install_module._install_on_input_processor()


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("vllm.sampling_params.SamplingParams", "extra_args"),
        ("vllm.v1.engine.EngineCoreRequest", "cache_salt"),
    ],
)
def test_fields_that_carry_options_refuse_the_start_where_they_moved(
    input_class: type, path: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = SimpleNamespace(__struct_fields__=("other",))
    monkeypatch.setattr(path, moved)
    with pytest.raises(RuntimeError, match=field):
        install_module._install_on_input_processor()


@pytest.fixture
def as_new(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A name that is not registered yet; what registering wraps is put back."""
    monkeypatch.setattr(registration, "NAME", "TOPTHETA_MOVED")
    monkeypatch.setattr(registration, "backend_path", lambda: "moved.Backend")
    for owner, name in (
        (CpuPlatform, "get_attn_backend_cls"),
        (EngineArgs, "create_engine_config"),
        (EngineArgs, "from_cli_args"),
    ):
        monkeypatch.setattr(owner, name, vars(owner)[name])
    yield "TOPTHETA_MOVED"
    members = registry.AttentionBackendEnum
    if (member := members._member_map_.pop("TOPTHETA_MOVED", None)) is not None:
        members._member_names_.remove("TOPTHETA_MOVED")
        members._value2member_map_.pop(member.value, None)
        delattr(members, "TOPTHETA_MOVED")


def fails(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("moved")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (CpuPlatform, "get_attn_backend_cls"),
        (EngineArgs, "create_engine_config"),
        (registry, "register_backend"),
        (vllm.config, "AttentionConfig"),
        (registry, ""),
    ],
)
def test_a_failed_registration_leaves_no_name_and_no_wrap(
    as_new: str,
    owner: Any,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if name:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(registry, "register_backend", fails)
    if owner is CpuPlatform:
        monkeypatch.delattr("vllm.platforms.interface.Platform.get_attn_backend_cls")
    before = [vars(CpuPlatform).get("get_attn_backend_cls"), vars(EngineArgs).copy()]
    vllm_toptheta.register()
    assert as_new not in registry.AttentionBackendEnum.__members__
    with pytest.raises((KeyError, ValueError), match=as_new):
        registry.AttentionBackendEnum[as_new]
    (error,) = errors(caplog)
    assert "toptheta doctor" in error
    select = vars(CpuPlatform).get("get_attn_backend_cls")
    assert getattr(select, "__func__", select) is getattr(before[0], "__func__", before[0])
    assert vars(EngineArgs) == before[1]


@pytest.mark.parametrize("field", ["attention_config", "additional_config", "instance_id"])
def test_a_configuration_without_a_field_is_never_asked_for_it(
    as_new: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = dict(vllm.config.VllmConfig.__dataclass_fields__)
    del fields[field]
    moved = type("VllmConfig", (), {"__dataclass_fields__": fields})
    monkeypatch.setattr(vllm.config, "VllmConfig", moved)
    vllm_toptheta.register()
    assert as_new not in registry.AttentionBackendEnum.__members__


def test_a_name_that_got_through_a_failed_registration_never_runs_another_backend(
    as_new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = registry.register_backend

    def half(name: str, path: str) -> None:
        real(name, path)
        raise RuntimeError("moved")

    monkeypatch.setattr(registry, "register_backend", half)
    vllm_toptheta.register()
    member = registry.AttentionBackendEnum[as_new]
    with pytest.raises(RuntimeError, match="moved the description of layers"):
        CpuPlatform.get_attn_backend_cls(member, None, num_heads=1)  # type: ignore[arg-type]


def test_those_who_choose_another_backend_see_no_difference(as_new: str) -> None:
    def select(cls: Any, first: Any, selected: Any, *, new: int) -> tuple[Any, ...]:
        return (first, selected, new)

    CpuPlatform.get_attn_backend_cls = classmethod(select)  # type: ignore[assignment]

    def from_cli_args(cls: Any, new: int, *, args: Namespace) -> Any:
        return SimpleNamespace(new=new)

    EngineArgs.from_cli_args = classmethod(from_cli_args)  # type: ignore[assignment]
    vllm_toptheta.register()
    other = registry.AttentionBackendEnum.CPU_ATTN
    moved: Any = CpuPlatform.get_attn_backend_cls
    assert moved("layer", other, new=3) == ("layer", other, 3)
    made: Any = EngineArgs.from_cli_args
    command_line = Namespace()
    engine_args = made(5, args=command_line)
    assert engine_args.new == 5
    assert getattr(engine_args, install_module._ARGS) is command_line


@pytest.mark.parametrize("gone", [True, False])
def test_a_moved_command_line_costs_the_middleware_only(
    as_new: str, gone: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if gone:
        monkeypatch.delattr(EngineArgs, "from_cli_args")
    else:
        monkeypatch.setattr(EngineArgs, "from_cli_args", staticmethod(lambda args: None))
    vllm_toptheta.register()
    assert as_new in registry.AttentionBackendEnum.__members__
    (error,) = errors(caplog)
    assert "serving goes on" in error


@pytest.mark.parametrize("error", [AttributeError, ImportError, TypeError])
def test_a_name_that_is_missed_at_the_start_is_one_clear_refusal(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_toptheta.backend.plan import Plan

    def from_vllm_config(vllm_config: Any) -> Any:
        raise error("hf_text_config")

    monkeypatch.setattr(Plan, "from_vllm_config", from_vllm_config)

    def make(attention: Any) -> Any:
        create = registration._check_options(
            lambda self, **kwargs: SimpleNamespace(attention_config=attention)
        )
        return create(None, new=1)

    make(SimpleNamespace(backend=None))
    with pytest.raises(RuntimeError, match="hf_text_config.*another --attention-backend"):
        make(SimpleNamespace(backend=registry.AttentionBackendEnum["TOPTHETA"]))


def test_moved_authentication_of_vllm_lets_nobody_in_and_serves_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import vllm.entrypoints.serve.middleware.authenticate as module

    from vllm_toptheta.serving.middleware import TopThetaMiddleware

    monkeypatch.delattr(module, "AuthenticationMiddleware")
    nothing: Any = None
    config = TopThetaConfig(telemetry=False)
    args = Namespace(api_key=["secret"])
    served = Served("m", config, POLICY, nothing, None, None, args)
    monkeypatch.setattr(served_module, "_served", {"x": served})

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(key: str) -> int:
        sent: list[Any] = []

        async def receive() -> Any:
            body = json.dumps({"vllm_xargs": {"toptheta_k": 1}}).encode()
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"authorization", f"Bearer {key}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        await TopThetaMiddleware(inner)(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(ask("secret")) == 400
    assert asyncio.run(ask("wrong")) == 200, "left to vLLM, which knows the keys"
