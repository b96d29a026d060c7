"""Puts the server side in place: an engine configuration that asks for toptheta in, wrapped request
intake and an HTTP middleware out.

Wraps of vLLM internals that live here:

* `EngineArgs.from_cli_args` shows the command line, whose list of `--middleware` gets ours. It can
  go when general plug-ins may add middleware.
* `InputProcessor.process_inputs` is where options of a request are checked for every way into the
  engine, and where its prefix-cache salt is set. It can go when block hashes may be extended.
"""

import contextlib
import functools
from argparse import Namespace
from typing import Any

from vllm_toptheta.request_options import cache_salt
from vllm_toptheta.serving.served import Served, policy_of, set_served
from vllm_toptheta.telemetry.delivery import install_on_output_processor, resolve
from vllm_toptheta.telemetry.shield import shielded
from vllm_toptheta.telemetry.wrapping import Argument, is_wrapped, mark_wrapped, optional

MIDDLEWARE = "vllm_toptheta.serving.middleware.TopThetaMiddleware"
_ARGS = "_toptheta_args"


def install_on_arguments() -> None:
    """Remember the command line with the engine arguments that are made from it."""
    with optional("responses show nothing of what was pruned, and wrong options are told late"):
        from vllm.engine.arg_utils import EngineArgs

        original = EngineArgs.from_cli_args.__func__

        @functools.wraps(original)
        def from_cli_args(cls: Any, *args: Any, **kwargs: Any) -> Any:
            engine_args = original(cls, *args, **kwargs)
            given = (*args, *kwargs.values())
            command_line = next((one for one in given if isinstance(one, Namespace)), None)
            with contextlib.suppress(Exception):  # an engine without it is still one
                setattr(engine_args, _ARGS, command_line)
            return engine_args

        EngineArgs.from_cli_args = classmethod(from_cli_args)


def install(engine_args: Any, vllm_config: Any, plan: Any) -> None:
    """Prepare this process to serve a configuration.

    Args:
        engine_args: vLLM's `EngineArgs` the configuration was made from.
        vllm_config: vLLM's `VllmConfig`.
        plan: the backend's `Plan` for it.

    Raises:
        RuntimeError: vLLM's request intake has moved, so options would be ignored.
    """
    args: Namespace | None = getattr(engine_args, _ARGS, None)
    name = vllm_config.model_config.served_model_name
    table = (plan.table, plan.table_path)
    served = Served(name, plan.config, plan.policy(), plan.identity, *table, args)
    set_served(served, vllm_config.instance_id)
    _install_on_input_processor()
    if plan.config.telemetry:
        install_on_output_processor()
    if args is not None and MIDDLEWARE not in (
        present := list(getattr(args, "middleware", None) or ())
    ):
        # The first one is the innermost: the operator's own see a request before it does.
        args.middleware = [MIDDLEWARE, *present]


def _install_on_input_processor() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

    if is_wrapped(InputProcessor):
        return
    original = InputProcessor.process_inputs
    given = Argument(original, "params")
    for name, there in (
        ("InputProcessor.process_inputs(params)", given.found),
        ("SamplingParams.extra_args", "extra_args" in SamplingParams.__struct_fields__),
        ("EngineCoreRequest.cache_salt", "cache_salt" in EngineCoreRequest.__struct_fields__),
    ):
        if not there:
            raise RuntimeError(
                f"toptheta: vLLM moved {name}; options of requests would be ignored, or their KV "
                "shared with others. Install a tested vLLM or a newer vllm-toptheta"
            )

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        policy = policy_of(self.vllm_config.instance_id)
        if policy is None:  # another engine of this process, with another backend
            return original(self, *args, **kwargs)
        try:
            options = policy.check(getattr(given.get(args, kwargs), "extra_args", None))
        except ValueError as error:
            raise VLLMValidationError(f"toptheta: {error}", parameter="vllm_xargs") from None
        request = original(self, *args, **kwargs)
        request.cache_salt = cache_salt(options, request.cache_salt)
        with shielded("server"):
            resolve(request, options.setting, policy.server.of(options))
        return request

    InputProcessor.process_inputs = process_inputs
    mark_wrapped(InputProcessor)
