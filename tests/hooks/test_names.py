"""The names of vLLM that telemetry and serving wrap or rely on are where they are expected."""

import importlib
import inspect
from typing import Any

import pytest

from vllm_toptheta.requests import Resolved, Target, Targets

pytest.importorskip("vllm", reason="needs an installed vLLM")


def find(path: str) -> Any:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("vllm.v1.core.sched.scheduler:Scheduler.update_from_output", ["model_runner_output"]),
        ("vllm.v1.engine.output_processor:OutputProcessor.add_request", ["request"]),
        (
            "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
            ["engine_core_outputs"],
        ),
        ("vllm.v1.engine.input_processor:InputProcessor.process_inputs", ["params"]),
        ("vllm.engine.arg_utils:EngineArgs.from_cli_args", ["args"]),
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model", ["scheduler_output"]),
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens", []),
        ("vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model", ["dummy_run"]),
        ("vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens", []),
        ("vllm.v1.engine.async_llm:AsyncLLM.collective_rpc", ["method", "timeout"]),
        (
            "vllm.entrypoints.serve.middleware.authenticate:AuthenticationMiddleware.verify_token",
            ["headers"],
        ),
    ],
)
def test_the_method_is_there_with_its_parameters(path: str, parameters: list[str]) -> None:
    present = inspect.signature(find(path)).parameters
    for name in parameters:
        assert name in present, f"{path}({', '.join(present)})"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("vllm.v1.engine:EngineCoreOutput", ["request_id", "new_token_ids", "kv_transfer_params"]),
        ("vllm.v1.engine:EngineCoreOutputs", ["outputs"]),
        ("vllm.v1.engine:EngineCoreRequest", ["cache_salt", "sampling_params"]),
    ],
)
def test_the_message_has_its_fields(path: str, fields: list[str]) -> None:
    assert set(fields) <= set(find(path).__struct_fields__)


def test_what_a_request_runs_with_reaches_its_sequences_and_other_processes() -> None:
    from types import SimpleNamespace

    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    params_class = find("vllm.sampling_params:SamplingParams")
    params = params_class(n=2, seed=1, extra_args={"toptheta_min_prob": 0.01, "other": 1})
    resolved = Resolved("min_prob", Targets(Target(0.01, 0.5), Target(0.01)))
    resolved.write(params)
    assert params.extra_args["other"] == 1
    request = SimpleNamespace(params=params, request_id="a", external_req_id="a")
    parent = find("vllm.v1.engine.parallel_sampling:ParentRequest")(request)
    assert Resolved.read(parent.get_child_info(0)[1]) == resolved
    sent = MsgpackDecoder(params_class).decode(MsgpackEncoder().encode(params))
    assert Resolved.read(sent) == resolved


def test_the_second_positional_argument_is_the_intermediate_tensors() -> None:
    for module in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"):
        method = find(f"{module}:GPUModelRunner.execute_model")
        names = list(inspect.signature(inspect.unwrap(method)).parameters)
        assert names[:3] == ["self", "scheduler_output", "intermediate_tensors"]


def test_the_command_line_lists_middleware() -> None:
    source = inspect.getsource(
        find("vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware")
    )
    assert "args.middleware" in source


def test_requests_meet_the_middleware_of_a_command_line() -> None:
    from argparse import Namespace

    from vllm.engine.arg_utils import EngineArgs

    import vllm_toptheta
    from vllm_toptheta.hooks import engine_args as hook

    vllm_toptheta.register()
    args = Namespace(model="none", middleware=["other.Middleware"])
    engine_args = EngineArgs.from_cli_args(args)
    assert hook._command_lines.get(engine_args) is args
    assert args.middleware == ["other.Middleware"], "nothing changes before the backend is chosen"
