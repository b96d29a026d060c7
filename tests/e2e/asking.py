"""Asking a real server: prompts in, typed answers of the `openai` client out."""

from typing import Any

from openai import OpenAI


def model_of(client: OpenAI) -> str:
    """The served model's name."""
    return client.models.list().data[0].id


def complete(
    client: OpenAI,
    prompt: str | list[int],
    max_tokens: int = 24,
    xargs: dict[str, Any] | None = None,
    model: str | None = None,
    **kwargs: Any,
) -> Any:
    """A greedy completion of exactly `max_tokens` tokens; `xargs` are the options."""
    return client.completions.create(
        model=model or model_of(client),
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "vllm_xargs": xargs},
        **kwargs,
    )


def summary(answer: Any) -> dict[str, Any]:
    """What the answer says about pruning."""
    result: dict[str, Any] = answer.toptheta
    return result
