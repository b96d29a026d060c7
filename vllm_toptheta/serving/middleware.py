"""The HTTP middleware: checks a request's options before any token, and puts what was pruned into
its response.

It edits the bytes of a response at one place and parses nothing but the last chunk of a stream, so
everything else arrives as vLLM wrote it.
"""

import json
import re
import reprlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vllm_toptheta.request_options import EXAMPLE, PREFIX
from vllm_toptheta.serving.responses import ResponseWriter
from vllm_toptheta.serving.served import get_served, is_authorised
from vllm_toptheta.serving.sinks import get_sinks
from vllm_toptheta.telemetry.delivery import CURRENT, Collector
from vllm_toptheta.telemetry.shield import shielded

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
PAGE = "/toptheta"

_INCLUDE_USAGE = re.compile(rb'"include_usage"\s*:\s*true')


class TopThetaMiddleware:
    """ASGI middleware; vLLM adds it to its server when the backend is asked for."""

    def __init__(self, app: Any) -> None:
        """Wrap an ASGI application.

        Args:
            app: vLLM's server.
        """
        self.app = app
        if get_served().config.telemetry:
            with shielded("server"):
                get_sinks()

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path == PAGE and not _page_is_on(scope):
            await _answer(send, 404, b"text/plain; charset=utf-8", _PAGE_IS_OFF)
            return
        if scope["method"] != "POST" or path not in PATHS or not is_authorised(scope):
            await self.app(scope, receive, send)
            return
        body, replay = await _read(receive)
        if (problem := _problem(body)) is not None:
            await _answer(send, 400, b"application/json", _error(problem))
            return
        if not get_served().config.telemetry:
            await self.app(scope, replay, send)
            return
        collector = Collector()
        forced = getattr(get_served().args, "enable_force_include_usage", False)
        usage_chunk = forced or _INCLUDE_USAGE.search(body) is not None
        token = CURRENT.set(collector)
        try:
            writer = ResponseWriter(send, path, collector, usage_chunk=usage_chunk)
            await self.app(scope, replay, writer)
        finally:
            CURRENT.reset(token)


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, and a `receive` that hands it out once more."""
    messages: list[Message] = []
    body = b""
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request":
            break
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break

    async def replay() -> Message:
        return messages.pop(0) if messages else await receive()

    return body, replay


def _problem(body: bytes) -> str | None:
    """What is wrong with the request's options; None where nothing is, or vLLM is to say it."""
    if PREFIX.encode() not in body:
        return None
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):  # RecursionError: brackets a hundred thousand deep
        return None
    if not isinstance(request, dict):
        return None
    # vLLM ignores unknown fields, which would leave the client believing that it was heard.
    if stray := sorted(key for key in request if key.startswith(PREFIX)):
        return (
            f"{', '.join(map(reprlib.repr, stray[:3]))} must stand inside of vllm_xargs: {EXAMPLE}"
        )
    try:
        get_served().policy.check(request.get("vllm_xargs"))
    except ValueError as error:
        return str(error)
    return None


def _error(problem: str) -> bytes:
    """The body of an error, as vLLM writes it."""
    error = {
        "message": f"toptheta: {problem}",
        "type": "BadRequestError",
        "param": "vllm_xargs",
        "code": 400,
    }
    return json.dumps({"error": error}).encode()


def _page_is_on(scope: Any) -> bool:
    plugins = getattr(scope["app"].state, "endpoint_plugins", ()) if "app" in scope else ()
    return any(getattr(plugin, "name", None) == PREFIX for plugin in plugins)


_PAGE_IS_OFF = (
    b"The toptheta page is off. Start the server with the environment variable\n\n"
    b"    VLLM_PLUGINS=toptheta\n\n"
    b"to get it here. The variable lists all plug-ins that vLLM may load, so add the names of "
    b"others\nthat you use: VLLM_PLUGINS=toptheta,other. Metrics are at /metrics in any case.\n"
)


async def _answer(send: Send, status: int, content_type: bytes, body: bytes) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
