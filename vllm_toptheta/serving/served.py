"""What this process serves: set when the engine is configured, read by every serving module."""

import os
import secrets
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers

from vllm_toptheta.config import TopThetaConfig
from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.requests import RequestPolicy
from vllm_toptheta.thresholds import ThresholdTable


@dataclass(frozen=True)
class Served:
    """The engine behind this server.

    Attributes:
        model_name: as clients know it.
        config: the operator's options.
        policy: what requests may ask for.
        model: its sizes.
        table: of the model; None where it is served without.
        table_path: the file it came from; None without.
        args: vLLM's command line; None outside of `vllm serve`.
    """

    model_name: str
    config: TopThetaConfig
    policy: RequestPolicy
    model: ModelIdentity
    table: ThresholdTable | None
    table_path: Path | None
    args: Namespace | None


_served: dict[str, Served] = {}


def set_served(served: Served, instance_id: str) -> None:
    """Remember what this process serves.

    Args:
        served: the engine.
        instance_id: `VllmConfig.instance_id`.
    """
    _served[instance_id] = served


def get_served() -> Served:
    """What this server process serves: the engine that was configured last.

    Raises:
        RuntimeError: no engine was configured in this process.
    """
    if not _served:
        raise RuntimeError("toptheta is not configured in this process")
    return next(reversed(_served.values()))


def server_args(scope: Any) -> Any:
    """The command line of the HTTP server; None where nobody knows it. vLLM keeps it in its
    application: further API servers configure their engines without one.

    Args:
        scope: ASGI scope of a request.
    """
    state = getattr(scope.get("app"), "state", None)
    return getattr(state, "args", None) or get_served().args


def policy_of(instance_id: str) -> RequestPolicy | None:
    """What requests to one engine of this process may ask for; None for other backends' engines."""
    served = _served.get(instance_id)
    return None if served is None else served.policy


def is_authorised(scope: Any) -> bool:
    """Whether an HTTP request shows one of the server's keys; vLLM itself guards only /v1.

    Nobody is where the server's command line is unknown, and its keys with it.

    Args:
        scope: ASGI scope of the request.
    """
    args = server_args(scope)
    if args is None or not hasattr(args, "api_key"):
        return False
    keys = [key for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]
    scheme, _, shown = Headers(scope=scope).get("authorization", "").partition(" ")
    matches = [secrets.compare_digest(shown.encode(), key.encode()) for key in keys]
    return not keys or (scheme.lower() == "bearer" and any(matches))
