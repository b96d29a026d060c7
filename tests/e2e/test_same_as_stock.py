"""With thresholds that keep every key the real server answers as stock vLLM does, also under
preemption, chunked prefill and prefix-cache hits."""

import pydoc_data.topics
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from e2e.asking import complete, model_of, summary
from openai import OpenAI

LAYERS, HEADS, KV_HEADS = 30, 9, 3
TOPICS = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
# About 120 tokens each, so that every request outgrows its first block while decoding; two long
# ones are chunked.
PROMPTS = [text[:520] for text in TOPICS if len(text) > 600][:12] + [
    text[:2400] for text in TOPICS if len(text) > 3000
][:2]


def metric(client: OpenAI, name: str) -> float:
    url = str(client.base_url).removesuffix("/v1/") + "/metrics"
    with urllib.request.urlopen(url) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def expected(stock: OpenAI) -> list[str]:
    return [complete(stock, prompt).choices[0].text for prompt in PROMPTS]


def test_answers_one_at_a_time(expected: list[str], keep_all: OpenAI) -> None:
    answers = [complete(keep_all, prompt) for prompt in PROMPTS]
    assert [answer.choices[0].text for answer in answers] == expected
    for answer in answers:
        counts = summary(answer)
        # The first token comes from the prefill.
        rows = (answer.usage.completion_tokens - 1) * LAYERS * HEADS
        assert counts["rows"] == rows
        assert counts["keys_kept"] == counts["keys_scored"]
        assert (
            counts["v_rows_read"]
            == counts["v_rows_scored"]
            == counts["keys_scored"] // (HEADS // KV_HEADS)
        )
        assert counts["dense_rows"]["short"] == 0, (
            "the Top-theta path is under test, not the dense one"
        )


def test_answers_under_preemption_chunked_prefill_and_mixed_batches(
    expected: list[str], keep_all: OpenAI
) -> None:
    before = metric(keep_all, "vllm:num_preemptions_total")
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: complete(keep_all, prompt), PROMPTS))
    assert [answer.choices[0].text for answer in answers] == expected
    assert metric(keep_all, "vllm:num_preemptions_total") > before, "nothing was preempted"


def test_answers_from_the_prefix_cache(expected: list[str], keep_all: OpenAI) -> None:
    complete(keep_all, PROMPTS[-1])
    before = metric(keep_all, "vllm:prefix_cache_hits_total")
    assert complete(keep_all, PROMPTS[-1]).choices[0].text == expected[-1]
    assert metric(keep_all, "vllm:prefix_cache_hits_total") > before, "nothing was shared"


def test_chat_answers(stock: OpenAI, keep_all: OpenAI) -> None:
    def chat(client: OpenAI) -> Any:
        return client.chat.completions.create(
            model=model_of(client),
            messages=[{"role": "user", "content": "Name three rivers of Europe."}],
            max_tokens=24,
            temperature=0,
        )

    answer = chat(keep_all)
    assert answer.choices[0].message.content == chat(stock).choices[0].message.content
    assert summary(answer)["rows"] == (answer.usage.completion_tokens - 1) * LAYERS * HEADS
