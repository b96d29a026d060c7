"""`EngineArgs`: options are checked before any process is spawned, and the command line gets our
HTTP middleware."""

import contextlib
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from vllm_toptheta.hooks.attention_backend import is_requested
from vllm_toptheta.hooks.wrapping import Beside, Method, optional

MIDDLEWARE = "vllm_toptheta.serving.middleware.TopThetaMiddleware"

_command_lines: Beside[Namespace] = Beside()


def look_up(prepare: Callable[[Any, Any, Namespace | None], None]) -> Method:
    """The wrap that shows every configuration that asks for this backend.

    Args:
        prepare: takes the `EngineArgs`, vLLM's `VllmConfig`, and the command line where there is
            one; what it raises refuses the start.
    """
    from vllm.engine.arg_utils import EngineArgs

    method = Method(EngineArgs, "create_engine_config")

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = method.original(self, *args, **kwargs)
        if is_requested(vllm_config):
            try:
                prepare(self, vllm_config, _command_lines.get(self))
            except (ImportError, AttributeError, TypeError) as error:
                raise RuntimeError(
                    "toptheta: this vLLM has moved a name that the backend needs: "
                    f"{type(error).__name__}: {error}. Install a tested vLLM or a newer "
                    "vllm-toptheta, or serve with another --attention-backend"
                ) from error
        return vllm_config

    return method.by(create_engine_config)


def install_on_command_line() -> None:
    """Remember the command line with the engine arguments that are made from it."""
    with optional("responses show nothing of what was pruned, and wrong options are told late"):
        from vllm.engine.arg_utils import EngineArgs

        method = Method(EngineArgs, "from_cli_args")

        def from_cli_args(cls: Any, *args: Any, **kwargs: Any) -> Any:
            engine_args = method.original(cls, *args, **kwargs)
            given = (*args, *kwargs.values())
            command_line = next((one for one in given if isinstance(one, Namespace)), None)
            if command_line is not None:
                with contextlib.suppress(TypeError):  # an engine without it is still one
                    _command_lines.put(engine_args, command_line)
            return engine_args

        method.by(from_cli_args).wrap()


def add_middleware(command_line: Namespace) -> None:
    """Have vLLM's server run our middleware; does nothing the second time."""
    present = list(getattr(command_line, "middleware", None) or ())
    if MIDDLEWARE not in present:
        # The first one is the innermost: the operator's own see a request before it does.
        command_line.middleware = [MIDDLEWARE, *present]
