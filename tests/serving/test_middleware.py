"""The middleware around a small ASGI application: what it refuses, what it passes on."""

import asyncio
import json
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

from vllm_toptheta.config import TopThetaConfig  # noqa: E402
from vllm_toptheta.request_options import RequestPolicy, Target, Targets  # noqa: E402
from vllm_toptheta.serving import served as served_module  # noqa: E402
from vllm_toptheta.serving.middleware import TopThetaMiddleware  # noqa: E402
from vllm_toptheta.serving.served import Served  # noqa: E402
from vllm_toptheta.telemetry.delivery import CURRENT  # noqa: E402


class App:
    """Answers with what it was given."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.collectors: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
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
    served = Served("m", config, policy, model, None, None, Namespace(**args))
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


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
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

    middleware = TopThetaMiddleware.__new__(TopThetaMiddleware)
    middleware.app = inner
    for kind in ("lifespan", "websocket"):
        asyncio.run(middleware({"type": kind}, None, None))  # type: ignore[arg-type]
    assert seen == ["lifespan", "websocket"]
