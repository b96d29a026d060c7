"""A vLLM plug-in for the soak: every process of a server says on SIGUSR2 how many objects of single
requests it still holds.

Objects are looked up among all of the process, so that no place where one may be forgotten has to
be known.
"""

import gc
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response

FOLDER = "TOPTHETA_WATCH"
"""Environment variable: the folder that takes a file per process, empty until it is asked."""

OF_A_REQUEST = {
    "vllm.v1.engine.output_processor.RequestState",
    "vllm.v1.engine.parallel_sampling.ParentRequest",
    "vllm.v1.request.Request",
    "vllm.v1.worker.gpu_input_batch.CachedRequestState",
    "vllm_toptheta.hooks.output_processor._Sequence",
    "vllm_toptheta.requests.Resolved",
    "vllm_toptheta.telemetry.delivery.Choice",
    "vllm_toptheta.telemetry.delivery.Collector",
    "vllm_toptheta.telemetry.totals.Totals",
    "vllm_toptheta.telemetry.ledger._Account",
}


class Around(BaseHTTPMiddleware):
    """An operator's middleware of the kind that runs the server in a task of its own."""

    async def dispatch(self, request: Request, call_next: Any) -> Response:
        """Hand on."""
        response: Response = await call_next(request)
        return response


def register() -> None:
    """Be ready to be asked."""
    path = Path(os.environ[FOLDER]) / f"{os.getpid()}.json"

    def tell(*_: Any) -> None:
        gc.collect()
        kinds = (type(one) for one in gc.get_objects())
        names = (f"{kind.__module__}.{kind.__qualname__}" for kind in kinds)
        scratch = path.with_suffix(".new")
        scratch.write_text(json.dumps(Counter(name for name in names if name in OF_A_REQUEST)))
        scratch.rename(path)

    signal.signal(signal.SIGUSR2, tell)
    path.touch()
