"""A server of vLLM's interface whose model always knows the answer, or is told what to say."""

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from vllm_toptheta.evaluation.tasks.server import FORCED_TOKENS, Server

Say = Callable[[dict[str, Any], str], str]
"""The answer to a request, from its body and its prompt's text."""


class Stub:
    """One token per character.

    Attributes:
        requests: bodies of completions, in order.
        say: the model.
        pruned: whether responses carry the object "toptheta".
        forces: whether the forcing of tokens works.
        min_kv_len: rows up to it are dense.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.requests: list[dict[str, Any]] = []
        self.say: Say = lambda body, prompt: "?"
        self.pruned, self.forces, self.min_kv_len = True, True, 16
        client = httpx.Client

        def stubbed(**kwargs: Any) -> httpx.Client:
            return client(transport=httpx.MockTransport(self._answer), **kwargs)

        monkeypatch.setattr("vllm_toptheta.evaluation.tasks.server.httpx.Client", stubbed)
        self.server = Server("http://stub/v1")

    def _answer(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content or "{}")
        path = request.url.path
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "stub"}]})
        if path == "/tokenize":
            text = body.get("prompt")
            if text is None:
                text = f"{'rules ' * 100}<user>{body['messages'][0]['content']}<assistant>"
            bos = [1] if body.get("add_special_tokens") else []
            return httpx.Response(200, json={"tokens": bos + [ord(c) for c in text]})
        if path == "/detokenize":
            return httpx.Response(200, json={"prompt": "".join(map(chr, body["tokens"]))})
        return self._complete(body)

    def _complete(self, body: dict[str, Any]) -> httpx.Response:
        self.requests.append(body)
        xargs = body.get("vllm_xargs", {})
        forced = "".join(map(chr, xargs.get(FORCED_TOKENS, []))) if self.forces else ""
        prompt = "".join(map(chr, body["prompt"]))
        probing = body["max_tokens"] == 1
        said = "?" if probing else self.say(body, prompt + forced)
        assert len(body.get("stop", [])) <= 4  # vLLM's most
        stops = [said.find(stop) for stop in body.get("stop", []) if stop in said]
        assert body.get("min_tokens", 0) == len(xargs.get(FORCED_TOKENS, []))
        said = said[: min(stops, default=None)]
        text = forced + said[: body["max_tokens"] - len(forced)]
        ids = {"token_ids": [ord(c) for c in text]} if body.get("return_token_ids") else {}
        answer: dict[str, Any] = {
            "choices": [{"text": text, **ids}],
            "usage": {"completion_tokens": len(text)},
        }
        if self.pruned:
            answer["toptheta"] = self._counts(len(body["prompt"]), len(text), xargs)
        return httpx.Response(200, json=answer)

    def _counts(self, prompt: int, tokens: int, xargs: dict[str, Any]) -> dict[str, Any]:
        off = xargs.get("toptheta") == "off"
        rows = 6 * (tokens - 1)
        short = 0 if off or prompt > self.min_kv_len else rows
        scored = prompt * rows
        return {
            "k": None,
            "min_prob": None if off else xargs.get("toptheta_min_prob", 0.001),
            "min_mass": xargs.get("toptheta_min_mass", 0.0),
            "rows": rows,
            "v_rows_scored": scored,
            "v_rows_read": scored if off or short else scored // 4,
            "kept_mass": 0.5,
            "dense_rows": {"short": short, "off": rows if off else 0, "prefill": 1000},
        }


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    return Stub(monkeypatch)
