"""An OpenAI-compatible server with vLLM's `/tokenize`: texts in, token ids and answers out."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import httpx

FORCED_TOKENS = "forced_tokens"
"""Entry of `vllm_xargs` that `evaluation/forced_tokens.py` reads."""
FORCING = "--logits-processors vllm_toptheta.evaluation.forced_tokens:ForcedTokens"
"""What a server must be started with for it."""
MARK = "@@@@"
"""Stands for a message in a chat template."""


@dataclass(frozen=True)
class Request:
    """How to generate.

    Attributes:
        max_tokens: most tokens after the forced ones.
        stop: texts that end the answer.
        forced: token ids to generate first, whatever the model thinks of them.
        forced_text: their text.
        temperature: 0 is greedy.
        seed: of the sampling.
        ignore_eos: always generate `max_tokens`, and tell their ids.
    """

    max_tokens: int
    stop: tuple[str, ...] = ()
    forced: tuple[int, ...] = ()
    forced_text: str = ""
    temperature: float = 0
    seed: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class Answer:
    """What a server generated.

    Attributes:
        text: without what was forced.
        tokens: generated, forced ones included.
        token_ids: of them; empty where the server does not tell.
        toptheta: what was pruned; None from other servers.
        seconds: from request to answer.
    """

    text: str
    tokens: int
    token_ids: list[int]
    toptheta: dict[str, Any] | None
    seconds: float


class Answerer(Protocol):
    """Who answers: a server, or a model in this process.

    Attributes:
        model: its name.
    """

    model: str

    def count(self, text: str, /) -> int:
        """Tokens of a text."""

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; `special` adds what the model wants first."""

    def chat_frame(self) -> tuple[str, str]:
        """What the model's chat template puts before and after a user's message."""

    def complete(self, prompt: Sequence[int], xargs: Mapping[str, Any], request: Request) -> Answer:
        """Generate after a prompt's token ids; `xargs` say what is pruned.

        Raises:
            ValueError: it is refused; says what to do.
        """


class Server:
    """A running server.

    Attributes:
        model: name of the model it serves.
    """

    def __init__(self, url: str, model: str | None = None, timeout: float = 3600) -> None:
        """Connect.

        Args:
            url: base URL, with or without /v1.
            model: name of the model; the first that the server lists by default.
            timeout: seconds a request may take.

        Raises:
            ValueError: nobody answers, or no such model is served.
        """
        self._root = url.rstrip("/").removesuffix("/v1")
        self._client = httpx.Client(timeout=timeout)
        served = [entry["id"] for entry in self._ask("GET", "/v1/models")["data"]]
        if model is not None and model not in served:
            raise ValueError(f"{url} does not serve {model!r}; give --model {' or '.join(served)}")
        self.model = model or served[0]
        self.count = lru_cache(maxsize=4096)(lambda text: len(self.tokenize(text)))

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text; `special` adds what the model wants first."""
        found: list[int] = self._ask(
            "POST",
            "/tokenize",
            {"model": self.model, "prompt": text, "add_special_tokens": special},
        )["tokens"]
        return found

    def chat_frame(self) -> tuple[str, str]:
        """What the model's chat template puts before and after a user's message."""
        messages = [{"role": "user", "content": MARK}]
        ids = self._ask(
            "POST",
            "/tokenize",
            {"model": self.model, "messages": messages, "add_generation_prompt": True},
        )["tokens"]
        text = self._ask("POST", "/detokenize", {"model": self.model, "tokens": ids})["prompt"]
        before, _, after = text.partition(MARK)
        return before, after

    def complete(self, prompt: Sequence[int], xargs: Mapping[str, Any], request: Request) -> Answer:
        """Generate.

        Args:
            prompt: token ids.
            xargs: `vllm_xargs` of the request.
            request: how.

        Raises:
            ValueError: the server refuses, or does not force tokens.
        """
        forced = list(request.forced)
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": len(forced) + request.max_tokens,
            "temperature": request.temperature,
        }
        xargs = {**xargs, **({FORCED_TOKENS: forced} if forced else {})}
        # Servers other than vLLM see none of its own fields unless they are needed.
        optional = {
            "vllm_xargs": xargs,
            "stop": list(request.stop),
            "min_tokens": len(forced),  # until then nothing stops: a question may contain stops
            "seed": request.seed,
            "ignore_eos": request.ignore_eos,
            "return_token_ids": request.ignore_eos,
        }
        body |= {name: value for name, value in optional.items() if value}
        started = time.monotonic()
        answer = self._ask("POST", "/v1/completions", body)
        choice = answer["choices"][0]
        text = choice["text"]
        if not text.startswith(request.forced_text):
            raise ValueError(
                f"the server generated {text[:40]!r}, not the question "
                f"{request.forced_text[:40]!r}: --question-rows decoded needs a vLLM server "
                f"started with {FORCING}"
            )
        return Answer(
            text=text[len(request.forced_text) :],
            tokens=answer["usage"]["completion_tokens"],
            token_ids=choice.get("token_ids") or [],
            toptheta=answer.get("toptheta"),
            seconds=time.monotonic() - started,
        )

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            answer = self._client.request(method, self._root + path, json=body)
        except httpx.HTTPError as error:
            raise ValueError(
                f"no answer from {self._root}{path} ({error}); is the server running?"
            ) from error
        if answer.is_error:
            raise ValueError(f"{self._root}{path} says {answer.status_code}: {answer.text[:400]}")
        return answer.json()
