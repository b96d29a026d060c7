"""The real server with the shipped table: answers, summaries, concurrency, aborts,
prefix-cache hits."""

import pydoc_data.topics
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from e2e.asking import complete, summary
from openai import OpenAI

LAYERS, HEADS, KV_HEADS = 30, 9, 3
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
        assert counts["kept_mass"] == 1
    else:
        assert 0 < counts["keys_kept"] < counts["keys_scored"]
        assert 0 < counts["v_rows_read"] < counts["v_rows_scored"]
        assert counts["keys_kept"] == counts["v_rows_read"] * HEADS // KV_HEADS
        assert 0 < counts["kept_mass"] < 1


def test_long_rows_are_pruned_to_about_k_and_short_ones_run_dense(pruning: OpenAI) -> None:
    long = complete(pruning, TEXT[:6000])
    check(long)
    counts = summary(long)
    assert (counts["k"], counts["min_prob"]) == (64, None)
    assert 0.5 < counts["target_ratio"] < 1.5
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


def test_requests_choose_how_much_of_a_row_is_kept(pruning: OpenAI) -> None:
    settings: list[dict[str, Any]] = [
        {"toptheta_min_prob": 0.05, "toptheta_min_mass": 0},
        {"toptheta_min_prob": 0.002, "toptheta_min_mass": 0},
        {"toptheta_min_prob": 0.05, "toptheta_min_mass": 0.95},
        {"toptheta_k": 256},
        {"toptheta": "off"},
    ]

    def ask(xargs: dict[str, Any]) -> dict[str, Any]:
        body = {"ignore_eos": True, "vllm_xargs": xargs, "allowed_token_ids": [253]}
        answer = pruning.completions.create(
            model=pruning.models.list().data[0].id,
            prompt=TEXT[:6000],
            max_tokens=8,
            extra_body=body,
        )
        check(answer) if xargs != {"toptheta": "off"} else None
        return summary(answer)

    with ThreadPoolExecutor(len(settings)) as pool:
        few, more, floor, many, all_ = pool.map(ask, settings)
    assert few["keys_kept"] < more["keys_kept"] < many["keys_kept"] < all_["keys_kept"]
    assert few["kept_mass"] < more["kept_mass"] < all_["kept_mass"] == 1
    assert few["rows_lifted"] == more["rows_lifted"] == all_["rows_lifted"] == 0
    assert few["keys_kept"] < floor["keys_kept"]
    assert 0.95 < floor["kept_mass"] < 1
    assert 0 < floor["rows_lifted"] < floor["rows"]
    shown = [[one[name] for name in ("k", "min_prob", "min_mass")] for one in (floor, many, all_)]
    assert shown == [[None, 0.05, 0.95], [256, None, 0], [None, None, None]]


@pytest.mark.parametrize("kind", ["digits", "one word"])
def test_of_unusual_text_the_floor_keeps_what_a_row_needs(pruning: OpenAI, kind: str) -> None:
    # What keys share is far from the texts of a calibration: few are kept of the one, most of the
    # other, at the same k.
    digits = "".join(map(str, random.Random(0).choices(range(10), k=1500)))
    prompt = digits if kind == "digits" else "word " * 600
    by_k = summary(complete(pruning, prompt, xargs={"toptheta_k": 64}))
    xargs = {"toptheta_min_prob": 0.05, "toptheta_min_mass": 0.95}
    floored = summary(complete(pruning, prompt, xargs=xargs))
    assert 0 < by_k["kept_mass"] < 1
    assert 0.95 <= floored["kept_mass"] < 1
    assert floored["rows_lifted"] > 0
    assert floored["dense_rows"]["short"] == 0
