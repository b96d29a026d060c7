"""Writes the object "toptheta" into a response: ASGI messages of vLLM in, the same with one more
field out.
"""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from vllm_toptheta.telemetry.delivery import Choice, Collector, report, show_all
from vllm_toptheta.telemetry.shield import shielded

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

FIELD = "toptheta"

_DATA = b"data: "
_FINISHED = b'"finish_reason":"'
_NO_CHOICES = b'"choices":[]'
_RESPONSE_ENDS = (b"event: response.completed\n", b"event: response.incomplete\n")
_MESSAGE_ENDS = (b"event: message_delta\n",)
_ENDS = {"/v1/responses": _RESPONSE_ENDS, "/v1/messages": _MESSAGE_ENDS}
"""First lines of the last event, by path, where events have names."""
_NUMBERED = {"/v1/completions": "-", "/v1/chat/completions/batch": "_"}


class ResponseWriter:
    """An ASGI `send` that adds the field; one per request."""

    def __init__(self, send: Send, path: str, collector: Collector, *, usage_chunk: bool) -> None:
        """Prepare for one response.

        Args:
            send: takes the messages.
            path: of the request, without the server's root path.
            collector: where the choices of the request gather.
            usage_chunk: whether a stream ends with a chunk of its own for the usage.
        """
        self._send = send
        self._path = path
        self._collector = collector
        self._usage_chunk = usage_chunk
        self._mode = "pass"
        self._start: Message = {}
        self._body: list[bytes] = []
        self._num_finished = 0

    async def __call__(self, message: Message) -> None:
        """Pass a message on, changed where the field belongs into it."""
        if message["type"] == "http.response.start":
            with shielded("server"):
                self._mode = _mode(message)
            self._start = message
            if self._mode == "json":
                return  # its length changes, so it waits for the body
        elif message["type"] == "http.response.body":
            if self._mode == "json":
                self._body.append(message.get("body", b""))
                if message.get("more_body", False):
                    return
                await self._send_json(message)
                return
            if self._mode == "stream":
                with shielded("server"):
                    message = {**message, "body": self._edit_events(message.get("body", b""))}
        await self._send(message)

    async def _send_json(self, message: Message) -> None:
        body = b"".join(self._body)
        with shielded("server"):
            body = self._insert(body)
        headers = [(k, v) for k, v in self._start["headers"] if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({**message, "body": body})

    def _edit_events(self, body: bytes) -> bytes:
        marks = _ENDS.get(self._path) or ((_NO_CHOICES,) if self._usage_chunk else (_FINISHED,))
        if not any(mark in body for mark in marks):
            return body
        return b"\n\n".join(self._edit_event(event) for event in body.split(b"\n\n"))

    def _edit_event(self, event: bytes) -> bytes:
        if self._path == "/v1/messages":
            return self._insert(event) if event.startswith(_MESSAGE_ENDS) else event
        if self._path == "/v1/responses":
            if event.startswith(_RESPONSE_ENDS):
                head, data = event.split(_DATA, 1)
                if (shown := self._take()) is None:
                    return event
                content = json.loads(data)
                content["response"][FIELD] = shown
                return head + _DATA + json.dumps(content, ensure_ascii=False).encode()
            return event
        if not event.startswith(_DATA + b"{"):
            return event
        content = json.loads(event[len(_DATA) :])
        choices = content.get("choices")
        if self._usage_chunk:
            return self._insert(event) if choices == [] and content.get("usage") else event
        self._num_finished += sum(1 for item in choices or () if item.get("finish_reason"))
        last = bool(choices) and self._num_finished == len(self._collector.choices)
        return self._insert(event) if last else event

    def _insert(self, text: bytes) -> bytes:
        """Add the field at the end of a JSON object."""
        end = text.rstrip()
        if not end.endswith(b"}") or end.endswith(b"{}"):
            return text
        shown = self._take()
        if shown is None:
            return text
        return end[:-1] + f',"{FIELD}":{json.dumps(shown)}}}'.encode()

    def _take(self) -> dict[str, Any] | None:
        """The field's value, None where it is left out; counts as told from here on."""
        choices = sorted(self._collector.choices, key=self._order)
        if not all(choice.report for choice in choices):
            return None
        shown = show_all(choices)
        if shown is not None:
            report(choices)
        return shown

    def _order(self, choice: Choice) -> tuple[int, int]:
        # These number their prompts at the end of the id that the engine gets.
        mark = _NUMBERED.get(self._path)
        if self._path == "/invocations" and choice.request_id.startswith("cmpl-"):
            mark = "-"
        number = choice.request_id.rpartition(mark)[2] if mark else "0"
        return int(number), choice.index


def _mode(start: Message) -> str:
    headers = {key.lower(): value for key, value in start["headers"]}
    content_type = headers.get(b"content-type", b"")
    if start["status"] != 200 or b"content-encoding" in headers:
        return "pass"
    if content_type.startswith(b"application/json"):
        return "json"
    return "stream" if content_type.startswith(b"text/event-stream") else "pass"
