"""Request intake, registration and the command line under other names."""

import asyncio
import json
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

import vllm.config  # noqa: E402
import vllm.v1.attention.backends.registry as registry  # noqa: E402
import vllm.v1.engine.input_processor as input_module  # noqa: E402
from moved_names.changes import (  # noqa: E402
    POLICY,
    call,
    copy_of,
    errors,
    more_parameters,
    renamed_parameter,
)
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402

import vllm_toptheta  # noqa: E402
from vllm_toptheta.config import TopThetaConfig  # noqa: E402
from vllm_toptheta.hooks import attention_backend, input_processor  # noqa: E402
from vllm_toptheta.hooks import engine_args as engine_args_hook  # noqa: E402
from vllm_toptheta.serving import served as served_module  # noqa: E402
from vllm_toptheta.serving.served import Served, set_served  # noqa: E402

NOT_BY_VLLM = pytest.mark.skipif(
    not hasattr(registry.AttentionBackendEnum, "register"),
    reason="before vLLM 0.32 the package adds the member itself",
)


class InputProcessor:
    vllm_config = SimpleNamespace(instance_id="moved")

    def process_inputs(self, request_id: str, prompt: str, params: Any) -> Any:
        return SimpleNamespace(sampling_params=params, cache_salt=None)


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
    input_processor.install()
    params = SimpleNamespace(extra_args={"toptheta": "off"})
    for kwargs in ({"params": params}, {}):
        args = () if kwargs else (params,)
        request = call(input_class().process_inputs, "a", "text", *args, **kwargs)
        assert request.cache_salt == "toptheta:off:"


def test_options_that_nobody_would_check_refuse_the_start(input_class: type) -> None:
    renamed_parameter("process_inputs")(input_class)
    with pytest.raises(RuntimeError, match="Install a tested vLLM"):
        input_processor.install()


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
        input_processor.install()


def fails(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("moved")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (CpuPlatform, "get_attn_backend_cls"),
        (EngineArgs, "create_engine_config"),
        (registry, "register_backend"),
        (vllm.config, "AttentionConfig"),
        pytest.param(registry, "", marks=NOT_BY_VLLM),
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


@NOT_BY_VLLM
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
    with pytest.raises(RuntimeError, match="by half.*moved"):
        CpuPlatform.get_attn_backend_cls(member, None, num_heads=1)  # type: ignore[arg-type]
    config = SimpleNamespace(attention_config=SimpleNamespace(backend=member))
    with pytest.raises(RuntimeError, match="another --attention-backend"):
        attention_backend.is_requested(config)


def test_moved_layers_refuse_the_start(as_new: str) -> None:
    vllm_toptheta.register()
    member = registry.AttentionBackendEnum[as_new]
    with pytest.raises(RuntimeError, match="moved the description of layers"):
        CpuPlatform.get_attn_backend_cls(member, None, num_heads=1)  # type: ignore[arg-type]


def test_those_who_choose_another_backend_see_no_difference(as_new: str) -> None:
    def select(cls: Any, first: Any, selected: Any, *, new: int) -> tuple[Any, ...]:
        return (first, selected, new)

    CpuPlatform.get_attn_backend_cls = classmethod(select)  # type: ignore[assignment]

    class Made:
        def __init__(self, new: int) -> None:
            self.new = new

    def from_cli_args(cls: Any, new: int, *, args: Namespace) -> Any:
        return Made(new)

    EngineArgs.from_cli_args = classmethod(from_cli_args)  # type: ignore[assignment]
    vllm_toptheta.register()
    other = registry.AttentionBackendEnum.CPU_ATTN
    moved: Any = CpuPlatform.get_attn_backend_cls
    assert moved("layer", other, new=3) == ("layer", other, 3)
    made: Any = EngineArgs.from_cli_args
    command_line = Namespace()
    engine_args = made(5, args=command_line)
    assert engine_args.new == 5
    assert engine_args_hook._command_lines.get(engine_args) is command_line


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
    from vllm_toptheta import registration
    from vllm_toptheta.backend.plan import Plan

    def from_vllm_config(vllm_config: Any) -> Any:
        raise error("hf_text_config")

    monkeypatch.setattr(Plan, "from_vllm_config", from_vllm_config)

    def make(attention: Any) -> Any:
        def create(self: Any, **kwargs: Any) -> Any:
            return SimpleNamespace(attention_config=attention, additional_config={})

        monkeypatch.setattr(EngineArgs, "create_engine_config", create)
        engine_args_hook.look_up(registration._prepare).wrap()
        wrapped: Any = EngineArgs.create_engine_config
        return wrapped(None, new=1)

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
