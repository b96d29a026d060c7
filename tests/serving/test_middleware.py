"""The middleware around a small ASGI application: what it refuses, what it passes on."""

import asyncio
import json
import tracemalloc
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

from vllm_toptheta.config import TopThetaConfig  # noqa: E402
from vllm_toptheta.requests import RequestPolicy, Target, Targets  # noqa: E402
from vllm_toptheta.serving import endpoints, middleware  # noqa: E402
from vllm_toptheta.serving import served as served_module  # noqa: E402
from vllm_toptheta.serving.middleware import _INCLUDE_USAGE, TopThetaMiddleware  # noqa: E402
from vllm_toptheta.serving.served import Served, is_authorised  # noqa: E402
from vllm_toptheta.telemetry.delivery import CURRENT  # noqa: E402


class App:
    """Answers with what it was given."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.messages: list[Any] = []
        self.collectors: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        parts: list[bytes] = []
        while True:
            message = await receive()
            self.messages.append(message)
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                break
        body = b"".join(parts)
        self.bodies.append(body)
        self.collectors.append(CURRENT.get())
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> App:
    serve(monkeypatch)
    return App()


def serve(monkeypatch: pytest.MonkeyPatch, **args: Any) -> None:
    # Telemetry is off here, so that no metric is registered in the test's process.
    config = TopThetaConfig(telemetry=False)
    ranges = {"min_prob": (1e-6, 0.1), "min_mass": (0.0, 0.95), "k": (16.0, 512.0)}
    policy = RequestPolicy(Targets(Target(0.001), None), ranges, allow_off=True)
    model: Any = None
    served = Served("m", config, policy, model, None, None, Namespace(**{"api_key": None, **args}))
    monkeypatch.setattr(served_module, "_served", {"x": served})


def call(inner: App, path: str, *parts: bytes, **more: Any) -> tuple[int, bytes]:
    """Status and body of an answer."""
    sent: list[Any] = []
    incoming = [
        {"type": "http.request", "body": part, "more_body": number + 1 < len(parts)}
        for number, part in enumerate(parts)
    ]

    async def go() -> None:
        async def receive() -> Any:
            return incoming.pop(0) if incoming else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": [], **more}
        await TopThetaMiddleware(inner)(scope, receive, send)

    asyncio.run(go())
    return sent[0]["status"], b"".join(message["body"] for message in sent[1:])


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", **fields}).encode()


def test_good_requests_arrive_unchanged_however_they_are_cut(app: App) -> None:
    sent = body(vllm_xargs={"toptheta_min_prob": 0.01})
    assert call(app, "/v1/completions", sent[:9], sent[9:]) == (200, sent)
    assert call(app, "/v1/chat/completions", b"not json, toptheta")[0] == 200
    assert call(app, "/v1/chat/completions", b'["toptheta"]')[0] == 200
    assert len(app.bodies) == 3


def test_a_large_body_is_held_once(app: App) -> None:
    size, part = 32 << 20, 64 << 10
    left = size // part
    held: list[bytes] = []

    async def receive() -> Any:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": b" " * part, "more_body": left > 0}

    async def go() -> None:
        read = await middleware._read(receive)
        held.append((await read.replay())["body"])

    tracemalloc.start()
    asyncio.run(go())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held == [b" " * size]
    assert type(held[0]) is bytes
    assert peak < 1.3 * size, "a second copy"


@pytest.mark.parametrize("cut", range(1, 80, 3))
def test_options_are_found_wherever_parts_are_cut(app: App, cut: int) -> None:
    sent = body(vllm_xargs={"toptheta_min_prob": 0.5}).replace(b"toptheta", b"t\\u006fptheta")
    parts = [sent[i : i + cut] for i in range(0, len(sent), cut)]
    assert call(app, "/v1/completions", *parts)[0] == 400


@pytest.mark.parametrize("cut", [1, 7, 40, 300, 5000])
def test_the_usage_chunk_is_found_wherever_parts_are_cut(cut: int) -> None:
    sent = body(prompt="a" * 600, stream_options={"include_usage": True}, user="b" * 600)
    parts = [sent[i : i + cut] for i in range(0, len(sent), cut)]

    async def receive() -> Any:
        return {"type": "http.request", "body": parts.pop(0), "more_body": len(parts) > 0}

    assert asyncio.run(middleware._read(receive)).usage


def test_a_client_that_leaves_in_the_middle_is_gone_for_the_server_too(app: App) -> None:
    incoming = [
        {"type": "http.request", "body": b'{"model"', "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def go() -> None:
        async def receive() -> Any:
            return incoming.pop(0)

        async def send(message: Any) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await TopThetaMiddleware(app)(scope, receive, send)

    asyncio.run(go())
    assert [message["type"] for message in app.messages] == ["http.request", "http.disconnect"]


XARGS = [path for path, place in endpoints.PLACES.items() if place == ("vllm_xargs",)]


@pytest.mark.parametrize("path", XARGS)
@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"vllm_xargs": {"toptheta_k": 1}}, "between 16 and 512"),
        ({"vllm_xargs": {"toptheta_min_prob": 0.2}}, "between 1e-06 and 0.1"),
        ({"vllm_xargs": {"toptheta_min_mass": 0.99}}, "between 0 and 0.95"),
        ({"vllm_xargs": {"toptheta_min_prob": 0.01, "toptheta_k": 64}}, "exclude each other"),
        ({"vllm_xargs": {"toptheta_j": 1}}, "unknown option"),
        ({"toptheta": "off"}, "inside of vllm_xargs"),
    ],
)
def test_wrong_options_never_reach_the_server(
    app: App, path: str, fields: dict[str, Any], word: str
) -> None:
    status, answer = call(app, path, body(**fields))
    assert status == 400
    assert app.bodies == []
    error = json.loads(answer)["error"]
    assert error["code"] == 400
    assert error["type"] == "BadRequestError"
    assert error["message"].startswith("toptheta: ")
    assert word in error["message"]


def test_a_root_path_is_taken_into_account(app: App) -> None:
    sent = body(vllm_xargs={"toptheta_min_prob": 0.5})
    assert call(app, "/api/v1/completions", sent, root_path="/api")[0] == 400
    assert call(app, "/other/v1/completions", sent)[0] == 200


def test_without_the_key_the_server_answers_itself(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, api_key=["secret"])
    sent = body(vllm_xargs={"toptheta_min_prob": 0.5})
    assert call(app, "/v1/completions", sent)[0] == 200
    with_key = [(b"authorization", b"Bearer secret")]
    assert call(app, "/v1/completions", sent, headers=with_key)[0] == 400


def test_the_page_says_how_to_turn_it_on(app: App) -> None:
    state = SimpleNamespace(state=SimpleNamespace(endpoint_plugins=[]))
    status, text = call(app, "/toptheta", b"", method="GET", app=state)
    assert status == 404
    assert b"VLLM_PLUGINS=toptheta" in text
    state.state.endpoint_plugins = [SimpleNamespace(name="toptheta")]
    assert call(app, "/toptheta", b"", method="GET", app=state)[0] == 200


def test_websockets_and_startup_pass() -> None:
    seen = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    ours = TopThetaMiddleware.__new__(TopThetaMiddleware)
    ours.app = inner
    for kind in ("lifespan", "websocket"):
        asyncio.run(ours({"type": kind}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan", "websocket"]


@pytest.mark.parametrize(
    ("path", "fields", "word"),
    [
        (
            "/inference/v1/generate",
            {"sampling_params": {"extra_args": {"toptheta_k": 1}}},
            "between 16 and 512",
        ),
        (
            "/inference/v1/generate",
            {"vllm_xargs": {"toptheta_k": 64}},
            "sampling_params.extra_args",
        ),
        ("/inference/v1/generate", {"sampling_params": {"toptheta_k": 64}}, "extra_args"),
        ("/v1/completions", {"sampling_params": {"extra_args": {"toptheta": 0}}}, "of vllm_xargs"),
        ("/cohere/v2/chat", {"vllm_xargs": {"toptheta_k": 64}}, "takes no options"),
        ("/generative_scoring", {"toptheta": "off"}, "takes no options"),
        ("/v1/systemone", {"vllm_xargs": {"toptheta": "off"}}, "takes no options"),
        (
            "/v1/completions",
            {"use_beam_search": True, "vllm_xargs": {"toptheta": "off"}},
            "beam search takes no options",
        ),
    ],
)
def test_options_that_nobody_would_read_are_refused(
    app: App, path: str, fields: dict[str, Any], word: str
) -> None:
    status, answer = call(app, path, body(**fields))
    assert (status, app.bodies) == (400, [])
    assert word in json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/inference/v1/generate", {"sampling_params": {"extra_args": {"toptheta_k": 64}}}),
        ("/inference/v1/generate", {"sampling_params": None, "prompt": "toptheta"}),
        ("/cohere/v2/chat", {"message": "What is toptheta?"}),
        ("/v1/completions", {"use_beam_search": True, "prompt": "toptheta"}),
        ("/v1/completions", {"vllm_xargs": ["toptheta"]}),
    ],
)
def test_other_bodies_pass(app: App, path: str, fields: dict[str, Any]) -> None:
    assert call(app, path, body(**fields))[0] == 200


@pytest.mark.parametrize(
    "beside", ['"x": NaN', '"prompt": "\\ud800"', '"vllm_xargs": {}', '"x": {"vllm_xargs": 1}']
)
def test_options_are_checked_beside_whatever_vllm_takes(app: App, beside: str) -> None:
    """Also what a strict parser of JSON refuses, or takes the first of."""
    text = f'{{{beside}, "vllm_xargs": {{"toptheta_min_prob": "x"}}}}'
    assert call(app, "/v1/completions", text.encode())[0] == 400


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["toptheta_k", "t\\u006fptheta_k", "\\u0074optheta\\u005Fk"])
def test_names_are_understood_however_json_spells_them(app: App, name: str, encoding: str) -> None:
    text = f'{{"vllm_xargs": {{"{name}": 1}}}}'
    assert call(app, "/v1/completions", text.encode(encoding))[0] == 400


def test_an_endpoint_without_keys_is_checked_without_one(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, api_key=["secret"])
    sent = body(vllm_xargs={"toptheta_min_prob": 0.5})
    assert call(app, "/invocations", sent)[0] == 400


def test_a_key_is_told_as_vllm_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.datastructures import Headers
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    keys = ["secret", "ä key"]
    serve(monkeypatch, api_key=keys)
    vllm = AuthenticationMiddleware(app=None, tokens=keys)
    for shown in ("Bearer secret", "bearer secret", "Bearer  secret", "Basic secret", "secret", ""):
        scope = {"headers": [(b"authorization", shown.encode())]}
        assert is_authorised(scope) == vllm.verify_token(Headers(scope=scope)), shown
    assert not is_authorised({"headers": []})
    assert is_authorised({"headers": [(b"authorization", b"Bearer secret")]})


@pytest.mark.parametrize("args", [None, Namespace()])
def test_without_a_known_key_nobody_is_let_in(
    app: App, monkeypatch: pytest.MonkeyPatch, args: Namespace | None
) -> None:
    served = replace(served_module.get_served(), args=args)
    monkeypatch.setattr(served_module, "_served", {"x": served})
    assert not is_authorised({"headers": []})
    assert not is_authorised({"headers": [(b"authorization", b"Bearer secret")]})
    # Further API servers know their command line from vLLM's application alone.
    server = SimpleNamespace(state=SimpleNamespace(args=Namespace(api_key=["secret"])))
    assert not is_authorised({"app": server, "headers": []})
    shown = [(b"authorization", b"Bearer secret")]
    assert is_authorised({"app": server, "headers": shown})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stream_options": {"include_usage": True}}, True),
        ({"stream_options": {"continuous_usage_stats": True, "include_usage": True}}, True),
        ({"include_usage": True}, False),
        ({"stream_options": {"include_usage": False}, "include_usage": True}, False),
        ({"metadata": {"include_usage": True}, "stream_options": {}}, False),
        ({"prompt": '"stream_options": {"include_usage": true}'}, False),
    ],
)
def test_the_usage_chunk_is_awaited_where_vllm_sends_one(
    fields: dict[str, Any], expected: bool
) -> None:
    assert bool(_INCLUDE_USAGE.search(body(**fields))) is expected
