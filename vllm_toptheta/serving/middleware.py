"""The HTTP middleware: checks a request's options before any token, and puts what was pruned into
its response.

It edits the bytes of a response at one place and parses nothing but the last chunk of a stream, so
everything else arrives as vLLM wrote it.
"""

import io
import json
import re
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from vllm_toptheta.requests import PREFIX
from vllm_toptheta.serving.endpoints import OPEN, PLACES, SHOWING, may_name_options, problem_of
from vllm_toptheta.serving.responses import ResponseWriter
from vllm_toptheta.serving.served import get_served, is_authorised, server_args
from vllm_toptheta.serving.sinks import get_sinks
from vllm_toptheta.telemetry.delivery import CURRENT, Collector
from vllm_toptheta.telemetry.shield import shielded

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

PAGE = "/toptheta"

_USAGE = b"include_usage"
_INCLUDE_USAGE = re.compile(rb'"stream_options"\s*:\s*\{[^{}]*"include_usage"\s*:\s*true')


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
        guarded = path not in OPEN and not is_authorised(scope)
        if scope["method"] != "POST" or path not in PLACES or guarded:
            await self.app(scope, receive, send)
            return
        read = await _read(receive)
        replay, served = read.replay, get_served()
        if read.named and (problem := problem_of(path, read.named, served.policy)) is not None:
            await _answer(send, 400, b"application/json", _error(path, problem))
            return
        usage_chunk = read.usage or getattr(server_args(scope), "enable_force_include_usage", False)
        del read  # the body is vLLM's from here on, and may be large
        if not served.config.telemetry or path not in SHOWING:
            await self.app(scope, replay, send)
            return
        collector = Collector()
        token = CURRENT.set(collector)
        try:
            writer = ResponseWriter(send, path, collector, usage_chunk=usage_chunk)
            await self.app(scope, replay, writer)
        finally:
            CURRENT.reset(token)
            collector.close()


@dataclass
class _Read:
    """A body that has come in.

    Attributes:
        named: the body, where it may name options; nothing elsewhere.
        usage: whether it asks for a chunk of its own for the usage.
        replay: a `receive` that hands the messages out once more, and lets go of each.
    """

    named: bytes
    usage: bool
    replay: Receive


async def _read(receive: Receive) -> _Read:
    # One buffer, which `getvalue` hands out as it is, in place of a list of parts and a copy of it:
    # the memory of a large body costs more time than looking through it.
    buffer = io.BytesIO()
    more = True
    while more:
        last = await receive()
        if last["type"] != "http.request":  # the client is gone
            break
        buffer.write(last.get("body", b""))
        more = last.get("more_body", False)
    body = buffer.getvalue()
    messages: deque[Message] = deque([{"type": "http.request", "body": body, "more_body": more}])
    if more:
        messages.append(last)

    async def replay() -> Message:
        return messages.popleft() if messages else await receive()

    named = body if may_name_options(body) else b""
    usage = _USAGE in body and _INCLUDE_USAGE.search(body) is not None
    return _Read(named, usage, replay)


def _error(path: str, problem: str) -> bytes:
    """The body of an error, as vLLM writes it."""
    error = {
        "message": f"toptheta: {problem}",
        "type": "BadRequestError",
        "param": ".".join(PLACES[path] or ()) or None,
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
