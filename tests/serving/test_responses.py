"""The field in responses: where it goes, once, and nothing else changes."""

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

from vllm_toptheta.requests import Target, Targets  # noqa: E402
from vllm_toptheta.serving.responses import ResponseWriter  # noqa: E402
from vllm_toptheta.telemetry.counters import zeros  # noqa: E402
from vllm_toptheta.telemetry.delivery import Choice, Collector  # noqa: E402

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"


def choices(*names: tuple[str, int, int]) -> Collector:
    made = []
    for request_id, index, rows in names:
        counts = zeros()
        counts[0] = rows
        targets = Targets(Target(0.001), None)
        made.append(Choice(request_id, index, "default", targets, counts=counts))
    return Collector(made)


def send(
    path: str,
    collector: Collector,
    *bodies: bytes,
    content_type: bytes = b"text/event-stream; charset=utf-8",
    usage_chunk: bool = False,
    status: int = 200,
    headers: tuple[tuple[bytes, bytes], ...] = (),
) -> tuple[list[bytes], dict[bytes, bytes]]:
    """What arrives when vLLM sends some bodies."""
    sent: list[Any] = []

    async def go() -> None:
        async def take(message: Any) -> None:
            sent.append(message)

        writer = ResponseWriter(take, path, collector, usage_chunk=usage_chunk)
        length = str(sum(map(len, bodies))).encode()
        all_headers = [(b"content-type", content_type), (b"content-length", length), *headers]
        await writer({"type": "http.response.start", "status": status, "headers": all_headers})
        for number, body in enumerate(bodies):
            more = number + 1 < len(bodies)
            await writer({"type": "http.response.body", "body": body, "more_body": more})

    asyncio.run(go())
    return [message["body"] for message in sent[1:]], dict(sent[0]["headers"])


def chunk(index: int = 0, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": index, "text": 'a "finish_reason":"stop" b', "finish_reason": finish}
    content = {"id": "x", "choices": [choice], **more}
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


USAGE = b'data: {"id":"x","choices":[],"usage":{"total_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"


def shown(bodies: list[bytes]) -> list[dict[str, Any] | None]:
    """The field of every event."""
    events = [event for body in bodies for event in body.split(b"\n\n") if event]
    return [
        None if event.endswith(b"[DONE]") else json.loads(event[6:]).get("toptheta")
        for event in events
    ]


def test_a_body_gets_the_field_and_its_new_length() -> None:
    body = b'{"id": "x", "choices": [], "usage": {"total_tokens": 3}}'
    bodies, headers = send(
        CHAT, choices(("x", 0, 7)), body[:10], body[10:], content_type=b"application/json"
    )
    (text,) = bodies
    assert text.startswith(body[:-1]), "nothing else changes"
    assert json.loads(text)["toptheta"]["rows"] == 7
    assert int(headers[b"content-length"]) == len(text)


@pytest.mark.parametrize("more", [{"status": 400}, {"headers": ((b"content-encoding", b"gzip"),)}])
def test_errors_and_compressed_bodies_pass(more: dict[str, Any]) -> None:
    body = b'{"error": {}}'
    bodies, _ = send(CHAT, choices(("x", 0, 7)), body, content_type=b"application/json", **more)
    assert bodies == [body]


def test_a_body_without_counts_passes() -> None:
    body = b'{"status": "queued"}'
    bodies, _ = send(RESPONSES, Collector(), body, content_type=b"application/json")
    assert bodies == [body]


@pytest.mark.parametrize(
    ("path", "content_type", "stream"),
    [
        (CHAT, b"application/json", (b'{"id": "x", "choices": []}\n',)),
        (COMPLETIONS, b"text/event-stream", (chunk(), chunk(finish="stop"), DONE)),
        (
            RESPONSES,
            b"text/event-stream",
            (b'event: response.completed\ndata: {"a": "\\u00e9"}\n\n',),
        ),
        ("/v1/messages", b"text/event-stream", (b'event: message_delta\ndata: {"a":1}\n\n',)),
    ],
)
def test_a_response_without_the_field_is_what_vllm_wrote(
    monkeypatch: pytest.MonkeyPatch, path: str, content_type: bytes, stream: tuple[bytes, ...]
) -> None:
    collector = choices(("x-0", 0, 7))
    for choice in collector.choices:
        choice.report = False
    told: list[Any] = []
    monkeypatch.setattr("vllm_toptheta.serving.responses.report", told.append)
    bodies, headers = send(path, collector, *stream, content_type=content_type)
    assert tuple(bodies) == stream
    assert int(headers[b"content-length"]) == sum(map(len, stream))
    assert told == [], "nothing was told to the client"


def test_the_last_chunk_of_a_stream_carries_it() -> None:
    stream = [chunk(), chunk(), chunk(finish="length"), DONE]
    bodies, _ = send(COMPLETIONS, choices(("x-0", 0, 7)), *stream)
    assert bodies[:2] == stream[:2]
    assert bodies[3] == DONE
    assert [bool(item) for item in shown(bodies)] == [False, False, True, False]


def test_the_usage_chunk_carries_it_where_asked_for() -> None:
    stream = [chunk(usage={"total_tokens": 1}), chunk(finish="stop"), USAGE, DONE]
    bodies, _ = send(COMPLETIONS, choices(("x-0", 0, 7)), *stream, usage_chunk=True)
    assert [bool(item) for item in shown(bodies)] == [False, False, True, False]


def test_it_waits_for_the_last_of_several_choices() -> None:
    stream = [chunk(1, "stop"), chunk(0), chunk(0, "length") + DONE]
    bodies, _ = send(CHAT, choices(("x", 0, 7), ("x", 1, 5)), *stream)
    found = shown(bodies)
    assert [bool(item) for item in found] == [False, False, True, False]
    assert found[2] is not None
    assert [choice["rows"] for choice in found[2]["choices"]] == [7, 5]


def test_choices_of_completions_stand_by_prompt_then_index() -> None:
    arrived = [("x-1", 1, 4), ("x-10", 0, 9), ("x-0", 0, 1), ("x-1", 0, 3)]
    bodies, _ = send(COMPLETIONS, choices(*arrived), b"{}", b"", content_type=b"text/plain")
    assert bodies == [b"{}", b""]
    body = b'{"id": "x"}'
    (text,), _ = send(COMPLETIONS, choices(*arrived), body, content_type=b"application/json")
    listed = json.loads(text)["toptheta"]["choices"]
    assert [(choice["index"], choice["rows"]) for choice in listed] == [
        (0, 1),
        (1, 3),
        (2, 4),
        (3, 9),
    ]


def test_the_last_event_of_a_response_carries_it_inside_of_the_response() -> None:
    event = b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"x"}}'
    other = b'event: response.created\ndata: {"type":"response.created","response":{"id":"x"}}\n\n'
    bodies, _ = send(RESPONSES, choices(("x", 0, 7)), other, event + b"\n\n")
    assert bodies[0] == other
    head, data = bodies[1].split(b"data: ")
    assert head == b"event: response.completed\n"
    assert bodies[1].endswith(b"\n\n")
    assert json.loads(data)["response"]["toptheta"]["rows"] == 7


def test_a_failure_leaves_the_response_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Choice, "show", lambda self: 1 / 0)
    stream = [chunk(), chunk(finish="length"), DONE]
    bodies, _ = send(COMPLETIONS, choices(("x-0", 0, 7)), *stream)
    assert bodies == stream
    body = b'{"id": "x"}'
    bodies, _ = send(CHAT, choices(("x", 0, 7)), body, content_type=b"application/json")
    assert bodies == [body]


def test_the_last_delta_of_a_message_carries_it() -> None:
    start = b'event: message_start\ndata: {"type":"message_start","message":{"usage":{}}}\n\n'
    delta = b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":3}}\n\n'
    stop = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    bodies, _ = send("/v1/messages", choices(("x", 0, 7)), start, delta + stop)
    assert bodies[0] == start
    edited, rest = bodies[1].split(b"\n\n", 1)
    assert rest == stop
    head, data = edited.split(b"data: ")
    assert head == b"event: message_delta\n"
    assert json.loads(data)["toptheta"]["rows"] == 7


@pytest.mark.parametrize(
    ("path", "ids"),
    [
        ("/v1/chat/completions/batch", ("chatcmpl-x_10", "chatcmpl-x_2")),
        ("/invocations", ("cmpl-x-10", "cmpl-x-2")),
    ],
)
def test_prompts_of_one_request_stand_in_their_order(path: str, ids: tuple[str, str]) -> None:
    arrived = choices((ids[0], 0, 10), (ids[1], 0, 2))
    (text,), _ = send(path, arrived, b'{"id": "x"}', content_type=b"application/json")
    assert [choice["rows"] for choice in json.loads(text)["toptheta"]["choices"]] == [2, 10]


def test_a_response_without_headers_passes() -> None:
    sent: list[Any] = []

    async def go() -> None:
        async def take(message: Any) -> None:
            sent.append(message)

        writer = ResponseWriter(take, CHAT, choices(("x", 0, 7)), usage_chunk=False)
        await writer({"type": "http.response.start", "status": 200})
        await writer({"type": "http.response.body", "body": b"{}"})

    asyncio.run(go())
    assert sent[1]["body"] == b"{}"
