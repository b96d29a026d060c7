"""The real server with the shipped thresholds: answers, summaries, concurrency, aborts,
prefix-cache hits."""

import pydoc_data.topics
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from e2e.asking import complete, summary
from openai import OpenAI

LAYERS, HEADS = 30, 9
TEXT = pydoc_data.topics.topics["operator-summary"] + pydoc_data.topics.topics["exceptions"]
TEXT += pydoc_data.topics.topics["naming"] + pydoc_data.topics.topics["class"]


def check(answer: Any) -> None:
    """The counts of one answer agree with its length."""
    counts, usage = summary(answer), answer.usage
    rows = (usage.completion_tokens - 1) * LAYERS * HEADS
    assert counts["rows"] == rows
    visible = range(usage.prompt_tokens + 1, usage.prompt_tokens + usage.completion_tokens)
    assert counts["keys_scored"] == sum(visible) * LAYERS * HEADS
    short = sum(n <= 256 for n in visible) * LAYERS * HEADS
    assert counts["dense_rows"]["short"] == short
    if short == rows:
        assert counts["keys_kept"] == counts["keys_scored"]
    else:
        assert 0 < counts["keys_kept"] < counts["keys_scored"]
        assert 0 < counts["v_rows_read"] < counts["v_rows_scored"]


def test_long_rows_are_pruned_to_about_k_and_short_ones_run_dense(pruning: OpenAI) -> None:
    long = complete(pruning, TEXT[:6000])
    check(long)
    counts = summary(long)
    assert 0.5 < counts["keys_kept"] / counts["rows"] / 64 < 1.5
    check(complete(pruning, TEXT[:300]))


def test_concurrent_requests_of_different_lengths_each_get_their_own_counts(
    pruning: OpenAI,
) -> None:
    lengths = [200, 900, 1500, 3000, 4500, 6000]
    with ThreadPoolExecutor(len(lengths)) as pool:
        answers = list(pool.map(lambda n: complete(pruning, TEXT[:n], max_tokens=24), lengths))
    for answer in answers:
        check(answer)


def test_an_abort_leaves_the_server_whole(pruning: OpenAI) -> None:
    stream = complete(pruning, TEXT[:6000], max_tokens=512, stream=True)
    for _, _chunk in zip(range(3), stream, strict=False):
        pass
    stream.close()
    check(complete(pruning, TEXT[:3000]))


def test_a_prefix_cache_hit_gives_the_same_answer(pruning: OpenAI) -> None:
    first, second = complete(pruning, TEXT[:4000]), complete(pruning, TEXT[:4000])
    assert second.choices[0].text == first.choices[0].text
    check(second)


def test_chat(pruning: OpenAI) -> None:
    answer = pruning.chat.completions.create(
        model=pruning.models.list().data[0].id,
        messages=[{"role": "user", "content": TEXT[:4000] + "\n\nWhat is this text about?"}],
        max_tokens=16,
        temperature=0,
    )
    check(answer)
    assert answer.choices[0].message.content
