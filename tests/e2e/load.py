"""A load of mixed requests, and the independent recount it is held against."""

import asyncio
import json
import pydoc_data.topics
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

LAYERS, HEADS, KV_HEADS = 30, 9, 3
GROUP = HEADS // KV_HEADS
SHOWN = ("rows", "keys_scored", "keys_kept", "v_rows_scored", "v_rows_read", "rows_lifted")
_COUNTED = (*SHOWN, "dense")
_RECOUNTED = (*_COUNTED, "mass")
TEXT = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


@dataclass
class Sent:
    """One request of the load.

    Attributes:
        kind: what was special about it.
        response_id: as the client saw it; None where it saw nothing.
        shown: the object in the response; None for aborted requests.
        usage: completion tokens of the response; None where it did not say.
    """

    kind: str
    response_id: str | None
    shown: dict[str, Any] | None
    completion_tokens: int | None = None


def prompt(number: int) -> str:
    """Some 130 to 200 tokens that no other request starts with: the last 64 are never pruned."""
    start = 700 * number % (len(TEXT) - 800)
    return f"Text {number}: {TEXT[start : start + 500 + 37 * number % 120]}"


class Load:
    """Sends the requests."""

    def __init__(self, client: AsyncOpenAI, model: str) -> None:
        self._client = client
        self._model = model
        self._kinds: list[Callable[[str, int], Coroutine[Any, Any, Sent]]] = [
            self._whole,
            self._stream,
            self._stream_with_usage,
            self._own_k,
            self._own_min_prob,
            self._off,
            self._stop_string,
            self._aborted_stream,
            self._several,
            self._chat_stream,
            self._two_prompts,
            self._aborted_whole,
            self._responses,
        ]

    async def send(self, number: int) -> list[Sent]:
        """Send requests of all kinds at once."""
        jobs = [self._kinds[i % len(self._kinds)](prompt(i), 6 + i * 5 % 11) for i in range(number)]
        return await asyncio.gather(*jobs)

    async def _complete(self, text: Any, tokens: int, **options: Any) -> Any:
        body = {"ignore_eos": True, **options.pop("extra_body", {})}
        options = {"temperature": 0, **options}
        return await self._client.completions.create(
            model=self._model,
            prompt=text,
            max_tokens=tokens,
            extra_body=body,
            **options,
        )

    async def _whole(self, text: str, tokens: int, kind: str = "whole", **options: Any) -> Sent:
        answer = await self._complete(text, tokens, **options)
        return Sent(kind, answer.id, answer.toptheta, answer.usage.completion_tokens)

    async def _read_stream(self, kind: str, stream: Any, tokens: int | None) -> Sent:
        seen = []
        async for chunk in stream:
            identifier = chunk.id
            if getattr(chunk, "toptheta", None):
                seen.append((chunk.toptheta, bool(chunk.choices)))
        assert len(seen) == 1, f"{kind}: the object came {len(seen)} times"
        assert seen[0][1] == (kind != "stream with usage"), kind
        return Sent(kind, identifier, seen[0][0], tokens)

    async def _stream(self, text: str, tokens: int) -> Sent:
        stream = await self._complete(text, tokens, stream=True)
        return await self._read_stream("stream", stream, tokens)

    async def _stream_with_usage(self, text: str, tokens: int) -> Sent:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        stream = await self._complete(text, tokens, **options)
        return await self._read_stream("stream with usage", stream, tokens)

    async def _own_k(self, text: str, tokens: int) -> Sent:
        k = 20 + tokens / 4
        xargs = {"toptheta_k": k, "toptheta_layers": True}
        sent = await self._whole(text, tokens, kind="own k", extra_body={"vllm_xargs": xargs})
        assert sent.shown is not None
        assert sent.shown["k"] == k
        assert sent.shown["min_prob"] is None
        assert sent.shown["target_ratio"] is not None
        return sent

    async def _own_min_prob(self, text: str, tokens: int) -> Sent:
        xargs = {"toptheta_min_prob": 0.08, "toptheta_min_mass": 0.8, "toptheta_layers": True}
        sent = await self._whole(
            text, tokens, kind="own min_prob", extra_body={"vllm_xargs": xargs}
        )
        assert sent.shown is not None
        settings = [sent.shown[name] for name in ("k", "min_prob", "min_mass", "target_ratio")]
        assert settings == [None, 0.08, 0.8, None]
        return sent

    async def _off(self, text: str, tokens: int) -> Sent:
        return await self._whole(
            text, tokens, kind="off", extra_body={"vllm_xargs": {"toptheta": "off"}}
        )

    async def _stop_string(self, text: str, tokens: int) -> Sent:
        return await self._whole(text, 48, kind="stop", stop=[" ", "\n"])

    async def _aborted_stream(self, text: str, tokens: int) -> Sent:
        stream = await self._complete(text, 400, stream=True)
        response_id, count = None, 0
        async for chunk in stream:
            response_id, count = chunk.id, count + 1
            if count == 3:
                await stream.close()
                break
        return Sent("aborted stream", response_id, None)

    async def _aborted_whole(self, text: str, tokens: int) -> Sent:
        try:
            await asyncio.wait_for(self._complete(text, 400), timeout=2 + tokens / 10)
        except TimeoutError:
            return Sent("aborted", None, None)
        raise AssertionError("the request was to be aborted")

    async def _several(self, text: str, tokens: int) -> Sent:
        return await self._whole(text, tokens, kind="n", n=2, temperature=1)

    async def _two_prompts(self, text: str, tokens: int) -> Sent:
        return await self._whole([text, text[7:480]], tokens, kind="prompts")

    async def _chat_stream(self, text: str, tokens: int) -> Sent:
        stream = await self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": text}],
            max_tokens=tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True, "vllm_xargs": {"toptheta_min_prob": 0.03}},
        )
        return await self._read_stream("chat", stream, tokens)

    async def _responses(self, text: str, tokens: int) -> Sent:
        answer = await self._client.responses.create(
            model=self._model, input=text, max_output_tokens=tokens, temperature=0
        )
        return Sent("responses", answer.id, answer.toptheta, answer.usage.output_tokens)


def counts(shown: dict[str, Any]) -> dict[str, int]:
    """The numbers that the kernel's tensors can confirm; see also `kept_mass`."""
    result = {name: shown[name] for name in SHOWN}
    result["dense"] = sum(v for reason, v in shown["dense_rows"].items() if reason != "prefill")
    return result


class Recount:
    """What the decode kernel returned, from the file of the test plug-in.

    Attributes:
        steps: per request of the engine, the running totals after each of its steps; with "mass",
            the sum of the kept shares.
    """

    def __init__(self, path: Path) -> None:
        self.steps: dict[str, list[dict[str, Any]]] = defaultdict(list)
        calls: dict[str, int] = defaultdict(int)
        for line in path.read_text().splitlines():
            for name, seen, kept, mass, lifts, dense in json.loads(line):
                if calls[name] % LAYERS == 0:
                    last = self.steps[name][-1] if calls[name] else {}
                    self.steps[name].append({key: last.get(key, 0) for key in _RECOUNTED})
                calls[name] += 1
                total = self.steps[name][-1]
                total["rows"] += HEADS
                total["keys_scored"] += seen * HEADS
                total["keys_kept"] += sum(kept) * GROUP
                total["v_rows_scored"] += seen * KV_HEADS
                total["v_rows_read"] += sum(kept)
                total["rows_lifted"] += GROUP * sum(number > 0 for number in lifts)
                total["dense"] += dense * HEADS
                total["mass"] += sum(mass)
        assert all(number % LAYERS == 0 for number in calls.values())

    def requests_of(self, response_id: str) -> list[list[dict[str, Any]]]:
        """Steps of the engine's requests that belong to a response."""
        return [steps for name, steps in self.steps.items() if response_id in name]

    def total(self) -> dict[str, int]:
        """Everything the kernel did."""
        return add_up(steps[-1] for steps in self.steps.values())


def add_up(parts: Any) -> dict[str, int]:
    """The sum of counts by name."""
    total: dict[str, int] = dict.fromkeys(_COUNTED, 0)
    for part in parts:
        for name in total:
            total[name] += part[name]
    return total


def choices_of(shown: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a response's sequences."""
    choices: list[dict[str, Any]] = shown.get("choices", [shown])
    return choices
