"""Whatever arrives, the documented errors are all that comes of it: 2,000 cases of tables, options,
requests and bodies. One that takes forever ends at the suite's limit of a test."""

import asyncio
import json
import struct
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from threshold_fixtures import make_identity, make_metadata, make_table

from vllm_toptheta.config import TopThetaConfig
from vllm_toptheta.requests import RequestOptions, RequestPolicy, Resolved, Target, Targets
from vllm_toptheta.threshold_store import ThresholdStore

CASES = {"tables": 500, "options": 400, "requests": 300, "bodies": 800}
MAX_WORDS = 2000  # characters of a message that a client gets


def cases(name: str) -> Any:
    """Run a test on its share of the cases, the same ones every time."""
    return settings(
        max_examples=CASES[name],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def refusal_of(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call returns, or the message of its ValueError; any other error is a failure."""
    try:
        return call(), ""
    except ValueError as error:
        return None, str(error)


SERVER = Targets(Target(0.001, 0.5), Target(0.01))
RANGES = {"min_prob": (1e-6, 0.1), "min_mass": (0.0, 0.95), "k": (16.0, 512.0)}
POLICY = RequestPolicy(SERVER, RANGES, allow_off=True)

NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 0.5, 1e-4, 0.99, 64, 1e-320, 1e308, 10**400, 2**63, -0.0]),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.integers(),
    st.floats(),
)
TEXTS = st.one_of(
    st.sampled_from(["off", "on", "auto", "none", "decode", "both", "", "²", "\x00", "\ud800"]),
    st.text(max_size=8),
    st.integers(1, 200_000).map(lambda n: "x" * n),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)


def objects(names: Any, values: Any, max_size: int = 4) -> Any:
    return st.dictionaries(names, values, max_size=max_size)


def nest(depth: int) -> Any:
    made: Any = {}
    for _ in range(depth):
        made = [made]
    return made


ANY = st.one_of(
    LEAVES,
    st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | objects(TEXTS, v, 3), max_leaves=6),
    st.integers(1, 900).map(nest),
)


# Tables.

TENSORS = ("lengths", "log_probs", "kept", "weights", "offsets")
GOOD = {name: getattr(make_table(), name) for name in TENSORS}
GOOD_HEADER = make_metadata().model_dump(mode="json")
DTYPES = [torch.float32, torch.float16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn]
SHAPES = st.lists(st.integers(0, 4), max_size=4)
VALUES = st.sampled_from([float("nan"), float("inf"), 0.0, -1.0, 1.0, 3.4e38, -3.4e38, 1e-45])
FIELD_NAMES = st.sampled_from([*GOOD_HEADER, "more"])
IDENTITY_NAMES = st.sampled_from([*GOOD_HEADER["identity"], "more"])
MODEL_FIELDS = st.sampled_from(["layer_types", "sliding_window", "rope", "num_key_value_heads"])


@st.composite
def tensors(draw: Any) -> dict[str, torch.Tensor]:
    """Those of a good table, one of them wrong, missing or new."""
    made = {name: tensor.clone() for name, tensor in GOOD.items()}
    name = draw(st.sampled_from(TENSORS))
    kind = draw(st.sampled_from(["value", "values", "shape", "dtype", "missing", "more"]))
    if kind == "value":
        flat = made[name].view(-1)
        flat[draw(st.integers(0, flat.numel() - 1))] = draw(VALUES)
    elif kind == "values":
        made[name].fill_(draw(VALUES))
    elif kind == "shape":
        made[name] = torch.full(draw(SHAPES), draw(VALUES))
    elif kind == "dtype":
        made[name] = made[name].to(draw(st.sampled_from(DTYPES)))
    elif kind == "missing":
        del made[name]
    else:
        made[draw(st.text(max_size=5).filter(lambda text: text != "__metadata__"))] = torch.ones(1)
    return made


@st.composite
def headers(draw: Any) -> dict[str, str]:
    """That of a good table with a field or all of it replaced."""
    kind = draw(st.sampled_from(["good", "field", "identity", "model", "text", "deep", "none"]))
    header = json.loads(json.dumps(GOOD_HEADER))
    if kind == "field":
        header[draw(FIELD_NAMES)] = draw(ANY)
    elif kind == "identity":
        header["identity"][draw(IDENTITY_NAMES)] = draw(ANY)
    elif kind == "model":
        header["identity"]["fields"] = draw(objects(MODEL_FIELDS, ANY))
    elif kind == "text":
        return {"toptheta": draw(st.text())}
    elif kind == "deep":
        return {"toptheta": "[" * draw(st.integers(1, 100_000))}
    return (
        {"toptheta": json.dumps(header)}
        if kind != "none"
        else draw(objects(st.just("x"), st.just("y")))
    )


@st.composite
def files(draw: Any) -> bytes:
    """A table's file that somebody wrote wrongly, or that was damaged on its way."""
    if draw(st.booleans()):
        return bytes(save(draw(tensors()), metadata=draw(headers())))
    data = bytearray(save(GOOD, metadata={"toptheta": json.dumps(GOOD_HEADER)}))
    kind = draw(st.sampled_from(["bytes", "cut", "more", "length", "any"]))
    if kind == "bytes":
        for place in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
            data[place] = draw(st.integers(0, 255))
    elif kind == "cut":
        del data[draw(st.integers(0, len(data))) :]
    elif kind == "more":
        data += draw(st.binary(max_size=64))
    elif kind == "length":
        data[:8] = struct.pack("<Q", draw(st.integers(0, 2**64 - 1)))
    else:
        return draw(st.binary(max_size=200))
    return bytes(data)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ThresholdStore:
    """A user's table that is to be broken, and a good shipped one."""
    folder = tmp_path_factory.mktemp("store")
    made = ThresholdStore(shipped_dir=folder / "shipped", user_dir=folder / "user")
    make_table().save(folder / "shipped" / "org--model" / "good.safetensors")
    made.path_for(make_identity(), "broken").parent.mkdir(parents=True)
    return made


@cases("tables")
@given(data=files())
def test_a_table_is_right_or_a_value_error_and_others_are_found(
    store: ThresholdStore, data: bytes
) -> None:
    path = store.path_for(make_identity(), "broken")
    path.write_bytes(data)
    assert store.find("auto", make_identity()).path.exists()
    store.check()
    found, problem = refusal_of(lambda: store.find(str(path), make_identity()))
    if found is None:
        assert str(path) in problem
        return
    table = found.table
    assert 1 <= table.min_k < float("inf")
    assert table.max_k < float("inf")
    for k in (1.0, 64.0, table.min_k):
        curve, problem = refusal_of(lambda k=k: table.curve_at_k(k))
        if problem:
            continue
        looked_up = table.lookup(curve, torch.tensor([1, 500, 1 << 20]))
        assert (looked_up <= 0).all()


# Options of the server.

OPTIONS = st.sampled_from([*TopThetaConfig.model_fields, "prefill_k", "min_probs", "thresold"])
LAYERS = objects(
    st.sampled_from(["0", "7", "-1", "a", "²", "9" * 5000]), ANY | objects(OPTIONS, ANY)
)


@cases("options")
@given(
    given_options=st.one_of(
        objects(OPTIONS | TEXTS, ANY, 5),
        objects(OPTIONS, LEAVES | st.lists(NUMBERS, max_size=3) | LAYERS, 5),
        ANY,
    ),
    inside=st.booleans(),
)
def test_options_are_taken_or_a_value_error(given_options: Any, inside: bool) -> None:
    additional = {"toptheta": given_options} if inside else given_options
    config, problem = refusal_of(lambda: TopThetaConfig.from_additional_config(additional))
    if config is None:
        assert problem.startswith("toptheta: ")
        assert len(problem) < 10 * MAX_WORDS
        return
    assert 0 < config.min_prob < 1
    assert config.min_kv_len >= 0
    low, high = config.min_prob_range
    assert 0 < low <= high < 1


# Options of a request.

NAMES = st.sampled_from([str(field.alias) for field in RequestOptions.model_fields.values()])
NEAR = st.sampled_from(["toptheta_", "toptheta_kk", "toptheta_\ud800", "toptheta" + "y" * 10**5])
XARGS = objects(NAMES | NEAR | TEXTS, ANY, 4) | objects(NAMES, LEAVES, 3)


@cases("requests")
@given(xargs=XARGS | ANY)
def test_a_requests_options_are_allowed_or_a_value_error(xargs: Any) -> None:
    options, problem = refusal_of(lambda: POLICY.check(xargs))
    if options is None:
        assert len(problem) < MAX_WORDS
        return
    resolved = Resolved.of(options, SERVER)
    params = Namespace(extra_args=xargs if isinstance(xargs, dict) else None)
    resolved.write(params)
    assert Resolved.read(params) == resolved
    for name, number in options.asked.items():
        low, high = RANGES[name]
        assert low <= number <= high


# Bodies through the middleware.


def spell(name: str, escapes: int) -> str:
    """A name as JSON may spell it: some of its letters as escapes, one bit for each."""
    letters = (
        f"\\u{ord(c):04x}" if escapes >> i & 1 else json.dumps(c)[1:-1] for i, c in enumerate(name)
    )
    return '"' + "".join(letters) + '"'


@st.composite
def json_objects(draw: Any, depth: int = 0) -> str:
    """An object that names options or nearly so; names may be there twice."""
    items = []
    for _ in range(draw(st.integers(0, 4))):
        place = st.sampled_from(["vllm_xargs", "sampling_params", "extra_args", "use_beam_search"])
        name = draw(st.one_of(place, NAMES, NEAR, TEXTS)).encode("utf-8", "replace").decode()
        value = draw(json_objects(depth + 1)) if depth < 3 and draw(st.booleans()) else None
        items.append(f"{spell(name, draw(st.integers(0, 2**10)))}:{value or json.dumps(draw(ANY))}")
    return "{" + ",".join(items) + "}"


@st.composite
def bodies(draw: Any) -> bytes:
    """What a client may send: JSON in any encoding, nearly JSON, and no JSON at all."""
    kind = draw(st.sampled_from(["object", "object", "object", "value", "deep", "bytes"]))
    if kind == "deep":
        opened = draw(st.sampled_from(["[", '{"toptheta":', '{"vllm_xargs":']))
        return (opened * draw(st.integers(1, 50_000))).encode()
    if kind == "bytes":
        return draw(st.binary(max_size=40)) + draw(st.sampled_from([b"", b"toptheta", b"\\u0074"]))
    text = draw(json_objects()) if kind == "object" else json.dumps(draw(ANY))
    encoding = draw(
        st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
    )
    data = bytearray(text.encode(encoding))
    for place in draw(st.lists(st.integers(0, len(data)), max_size=2)):  # often none
        data[place : place + 1] = draw(st.binary(max_size=2))
    return bytes(data)


@st.composite
def sendings(draw: Any) -> list[dict[str, Any]]:
    """A body in parts, cut anywhere, empty ones among them; its client may leave before the end."""
    body = draw(bodies())
    cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=6)))
    if draw(st.integers(0, 9)) == 0:
        cuts = list(range(0, min(len(body), 2000), draw(st.integers(1, 7))))
    parts = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    sent: list[dict[str, Any]] = [
        {"type": "http.request", "body": part, "more_body": True} for part in parts
    ]
    if draw(st.integers(0, 9)) == 0:
        return [*sent, {"type": "http.disconnect"}]
    del sent[-1]["more_body"]
    if not sent[-1]["body"]:
        del sent[-1]["body"]
    return sent


def whole(messages: list[dict[str, Any]]) -> tuple[bytes, list[Any]]:
    """What a server makes of a body: its bytes, and how it ends. In how many pieces it comes is
    nobody's business."""
    last = messages[-1]
    return b"".join(m.get("body", b"") for m in messages), [
        last["type"],
        last.get("more_body", False),
    ]


@pytest.fixture
def middleware(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class, with a server that has the policy above; its telemetry is off."""
    pytest.importorskip("starlette", reason="needs an installed vLLM")
    from vllm_toptheta.serving import served as module
    from vllm_toptheta.serving.middleware import TopThetaMiddleware

    nothing: Any = None
    config = TopThetaConfig(telemetry=False)
    one = module.Served("m", config, POLICY, nothing, None, None, Namespace(api_key=None))
    monkeypatch.setattr(module, "_served", {"x": one})
    return TopThetaMiddleware


PATHS = st.sampled_from(
    [
        "/v1/completions",
        "/v1/chat/completions",
        "/inference/v1/generate",
        "/generative_scoring",
        "/x",
    ]
)


@cases("bodies")
@given(path=PATHS, sent=sendings())
def test_a_body_is_refused_in_few_words_or_arrives_as_it_was_sent(
    middleware: Any, path: str, sent: list[dict[str, Any]]
) -> None:
    from vllm_toptheta.serving.endpoints import PLACES, problem_of

    arrived: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    waiting = list(sent)

    async def receive() -> Any:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        answers.append(message)

    async def server(scope: Any, receive: Any, send: Any) -> None:
        while True:
            arrived.append(message := await receive())
            if not message.get("more_body"):
                return

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    asyncio.run(middleware(server)(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    # Looked at as a whole, not in parts.
    problem = problem_of(path, body, POLICY) if path in PLACES else None
    if problem is None:
        assert answers == []
        assert whole(arrived) == whole(sent)
        return
    assert arrived == []
    assert answers[0]["status"] == 400
    error = json.loads(answers[1]["body"])["error"]
    assert error["message"] == f"toptheta: {problem}"
    assert len(problem) < MAX_WORDS


def test_the_cases_are_as_many_as_the_documentation_says() -> None:
    text = (Path(__file__).parent.parent / "docs" / "security.md").read_text()
    assert f"{sum(CASES.values()):,} cases" in text
