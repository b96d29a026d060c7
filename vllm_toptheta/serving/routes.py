"""The page at /toptheta and the JSON behind it, as an endpoint plug-in of vLLM.

vLLM loads it when the environment variable VLLM_PLUGINS names toptheta. The page itself holds no
data; the JSON routes ask for the server's API key where it has one.
"""

import asyncio
import base64
import hashlib
import math
import re
import time
from argparse import Namespace
from dataclasses import asdict
from importlib import resources
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse

from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.serving.served import Served, get_served, is_authorised
from vllm_toptheta.serving.sinks import get_sinks
from vllm_toptheta.telemetry.counters import by_name, summarise

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
        if not served.config.telemetry:
            return {"telemetry": False, "heads": None, "heads_problem": "telemetry is off"}
        heads = await self._heads.fetch(served.model)
        metrics, live = get_sinks()
        return {
            "telemetry": True,
            "total": summarise(served.policy.server, live.total),
            "counts": by_name(live.total),
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

    async def fetch(self, model: ModelIdentity) -> dict[str, Any]:
        """`heads` as `merge_heads` has it, or None and `heads_problem`."""
        async with self._lock:
            if time.monotonic() - self._fetched[0] >= _HEADS_KEPT_S:
                self._fetched = (time.monotonic(), await self._ask(model))
        return self._fetched[1]

    async def _ask(self, model: ModelIdentity) -> dict[str, Any]:
        try:
            answers = await self.client.collective_rpc("toptheta_heads", timeout=_RPC_TIMEOUT_S)
            return {"heads": merge_heads(answers, model), "heads_problem": None}
        except Exception as error:  # the page shows why, and everything else
            return {"heads": None, "heads_problem": f"{type(error).__name__}: {error}"}


def merge_heads(answers: list[list[dict[str, Any]]], model: ModelIdentity) -> dict[str, Any]:
    """Put the workers' shares together.

    Args:
        answers: of every rank, what `backend.heads.toptheta_heads` returns.
        model: the served one.

    Returns:
        "v_rows": [num_layers][num_kv_heads] of [read, scored]; "kept_mass": [num_layers][num_heads]
        mean share of a row's attention, None where there were no rows.
    """
    group = model.num_heads // model.num_kv_heads
    v_rows = np.zeros((model.num_layers, model.num_kv_heads, 2), dtype=np.int64)
    masses = np.zeros((model.num_layers, model.num_heads))
    rows = np.zeros((model.num_layers, 1), dtype=np.int64)
    for part in (part for answer in answers for part in answer):
        layers, first = part["layers"], part["first_head"]
        # Ranks that share a kv head add up.
        read = np.stack([part["kept"], part["scored"]], axis=2)
        start = first // group
        v_rows[layers, start : start + read.shape[1]] += read
        kept = np.array(part["kept_mass"])
        masses[layers, first : first + kept.shape[1]] = kept
        rows[layers, 0] = part["rows"]
    with np.errstate(invalid="ignore"):
        shares = (masses / rows).round(6)
    shown = [[None if math.isnan(share) else share for share in layer] for layer in shares.tolist()]
    return {"v_rows": v_rows.tolist(), "kept_mass": shown}


def config_of(served: Served) -> dict[str, Any]:
    """The operator's options and what requests may ask for."""
    policy = served.policy
    return {
        "model_name": served.model_name,
        "config": served.config.model_dump(mode="json"),
        "server": asdict(policy.server),
        "requests_may_ask_for": {**policy.ranges, "off": policy.allow_off},
        "api_servers": getattr(served.args, "api_server_count", None) or 1,
    }


def thresholds_of(served: Served) -> dict[str, Any] | None:
    """Where the table came from, and what it knows; None without one."""
    table = served.table
    if table is None or served.table_path is None:
        return None
    return {
        "file": served.table_path.name,
        "metadata": table.metadata.model_dump(mode="json"),
        "lengths": table.lengths.tolist(),
        "log_probs": table.log_probs.tolist(),
        "mean_kept": table.mean_kept.tolist(),
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
