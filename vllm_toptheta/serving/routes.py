"""The page at /toptheta and the JSON behind it, as an endpoint plug-in of vLLM.

vLLM loads it when the environment variable VLLM_PLUGINS names toptheta. The page itself holds no
data; the JSON routes ask for the server's API key where it has one.
"""

import asyncio
import base64
import hashlib
import re
import time
from argparse import Namespace
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse

from vllm_toptheta.serving.served import Served, get_served, is_authorised
from vllm_toptheta.serving.sinks import get_sinks
from vllm_toptheta.telemetry.counters import FIELDS, summarise

_HEADS_KEPT_S = 1.0
_RPC_TIMEOUT_S = 10.0


class TopThetaEndpoints:
    """vLLM's `EndpointPlugin`.

    Attributes:
        name: what VLLM_PLUGINS must list.
        required_tasks: vLLM attaches the routes to servers that generate.
    """

    name = "toptheta"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._heads = Heads()

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes to vLLM's server."""
        page = resources.files("vllm_toptheta.serving").joinpath("page.html").read_text("utf-8")
        headers = _page_headers(page)
        guarded: dict[str, Any] = {
            "dependencies": [Depends(_guard)],
            "include_in_schema": False,
        }

        @app.get("/toptheta", include_in_schema=False)
        async def show_page() -> HTMLResponse:
            return HTMLResponse(page, headers=headers)

        @app.get("/toptheta/stats", **guarded)
        async def show_stats() -> JSONResponse:
            return JSONResponse(await self._stats())

        @app.get("/toptheta/config", **guarded)
        async def show_config() -> JSONResponse:
            return JSONResponse(config_of(get_served()))

        @app.get("/toptheta/thresholds", **guarded)
        async def show_thresholds() -> JSONResponse:
            return JSONResponse(thresholds_of(get_served()))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Remember the way to the workers."""
        self._heads.client = engine_client

    async def _stats(self) -> dict[str, Any]:
        served = get_served()
        heads = await self._heads.fetch(served)
        if not served.config.telemetry:
            return {"telemetry": False, **heads}
        metrics, live = get_sinks()
        return {
            "telemetry": True,
            "total": summarise(served.policy.server, live.total),
            "counts": dict(zip(FIELDS, live.total, strict=True)),
            "v_rows_per_second": live.v_rows_per_second(),
            "requests": live.requests(),
            "target_ratio_by_layer": metrics.drift(),
            **heads,
        }


class Heads:
    """Counts per layer and head, fetched from the workers at most once a second.

    Attributes:
        client: vLLM's engine client.
    """

    def __init__(self) -> None:
        self.client: Any = None
        self._lock = asyncio.Lock()
        self._fetched = (0.0, {"heads": None, "heads_problem": "not fetched"})

    async def fetch(self, served: Served) -> dict[str, Any]:
        """`heads` as [num_layers][num_heads] of [kept, scored], or None and `heads_problem`."""
        async with self._lock:
            if time.monotonic() - self._fetched[0] >= _HEADS_KEPT_S:
                self._fetched = (time.monotonic(), await self._ask(served))
        return self._fetched[1]

    async def _ask(self, served: Served) -> dict[str, Any]:
        try:
            answers = await self.client.collective_rpc("toptheta_heads", timeout=_RPC_TIMEOUT_S)
            grid = merge_heads(answers, served.table.num_layers, served.table.num_heads)
        except Exception as error:  # the page shows why, and everything else
            return {"heads": None, "heads_problem": f"{type(error).__name__}: {error}"}
        return {"heads": grid, "heads_problem": None}


def merge_heads(
    answers: list[list[dict[str, Any]]], num_layers: int, num_heads: int
) -> list[list[list[int]]]:
    """Put the workers' shares together.

    Args:
        answers: of every rank, what `backend.heads.toptheta_heads` returns.
        num_layers: of the model.
        num_heads: query heads of the model.
    """
    grid = [[[0, 0] for _ in range(num_heads)] for _ in range(num_layers)]
    for answer in answers:
        for part in answer:
            rows = zip(part["layers"], part["kept"], part["scored"], strict=True)
            for layer, kept, scored in rows:
                for head, pair in enumerate(zip(kept, scored, strict=True)):
                    grid[layer][part["first_head"] + head] = list(pair)
    return grid


def config_of(served: Served) -> dict[str, Any]:
    """The operator's options and what requests may ask for."""
    policy = served.policy
    return {
        "model_name": served.model_name,
        "config": served.config.model_dump(mode="json"),
        "requests_may_ask_for": {
            "min_k": policy.min_k,
            "max_k": policy.max_k,
            "off": policy.allow_off,
        },
        "api_servers": getattr(served.args, "api_server_count", None) or 1,
    }


def thresholds_of(served: Served) -> dict[str, Any]:
    """Where the threshold table came from, and what it promises."""
    table = served.table
    return {
        "file": served.table_path.name,
        "metadata": table.metadata.model_dump(mode="json"),
        "levels": table.levels.tolist(),
        "lengths": table.lengths.tolist(),
        "mean_lost_mass": table.mean_lost_mass.tolist(),
        "head_k": table.at_k(served.config.k).head_k.tolist(),
    }


def _guard(request: Request) -> None:
    """Answer 401 without the API key, 503 where another backend serves."""
    try:
        authorised = is_authorised(request.scope)
    except RuntimeError as error:
        detail = f"{error}: start the server with --attention-backend toptheta"
        raise HTTPException(503, detail) from None
    if not authorised:
        raise HTTPException(401, "Unauthorized", {"WWW-Authenticate": "Bearer"})


def _page_headers(page: str) -> dict[str, str]:
    """Headers that let the page run its own script and talk to its own server, nothing else."""
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = hashlib.sha256(script.group(1).encode() if script else b"").digest()
    allowed = base64.b64encode(digest).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed}'; style-src 'unsafe-inline'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
