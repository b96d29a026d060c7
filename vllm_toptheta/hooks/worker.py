"""`WorkerBase`: a method for `collective_rpc`."""

from collections.abc import Callable
from typing import Any

from vllm_toptheta.hooks.wrapping import optional


def publish(name: str, method: Callable[[Any], Any]) -> None:
    """Give workers a method.

    Args:
        name: of the method.
        method: called with vLLM's worker.
    """
    with optional("the page shows no heads"):
        from vllm.v1.worker.worker_base import WorkerBase

        setattr(WorkerBase, name, method)
