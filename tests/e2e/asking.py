"""Asking a real server: prompts in, typed answers of the `openai` client out."""

from typing import Any

from openai import OpenAI


def model_of(client: OpenAI) -> str:
    """The served model's name."""
    return client.models.list().data[0].id


def complete(client: OpenAI, prompt: str, max_tokens: int = 24, **kwargs: Any) -> Any:
    """A greedy completion of exactly `max_tokens` tokens."""
    return client.completions.create(
        model=model_of(client),
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
        **kwargs,
    )


def summary(answer: Any) -> dict[str, Any]:
    """What the answer says about pruning."""
    result: dict[str, Any] = answer.toptheta
    return result
