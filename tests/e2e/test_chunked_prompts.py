"""What prompt rows keep does not depend on how the engine cuts a prompt, or on what of it the
prefix cache holds."""

import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import generate, toptheta
from transformers import AutoTokenizer

LAYERS, HEADS, LENGTH, BLOCK = 30, 9, 1500, 128
PREFIX = 5 * BLOCK
ROUNDING = 1e-3
"""GEMMs of another height may round differently, and so move a score over its threshold."""


@pytest.fixture(scope="module")
def answers(smollm2: Path) -> list[list[dict[str, Any]]]:
    """A prefix and the whole prompt: at once, in two odd chunks, and in many from the cache."""
    text = pydoc_data.topics.topics["operator-summary"] + pydoc_data.topics.topics["exceptions"]
    ids = AutoTokenizer.from_pretrained(smollm2)(text + pydoc_data.topics.topics["class"])
    prompt = ids.input_ids[:LENGTH]
    assert len(prompt) == LENGTH
    # One sequence at a time, so that the second prompt finds the first one's blocks.
    common = {
        **toptheta(phases="prefill", k=64, min_kv_len=128),
        "max_model_len": 2048,
        "max_num_seqs": 1,
        "block_size": BLOCK,
    }
    cuts = [(2048, False), (999, False), (256, True)]
    engines = [
        {**common, "max_num_batched_tokens": chunk, "enable_prefix_caching": caching}
        for chunk, caching in cuts
    ]
    return generate(smollm2, [prompt[:PREFIX], prompt], 8, engines)


def prompt_counts(answer: dict[str, Any]) -> dict[str, Any]:
    counts: dict[str, Any] = answer["summary"]["toptheta"]["prefill"]
    return counts


def test_the_same_tokens_follow(answers: list[list[dict[str, Any]]]) -> None:
    whole, *cut = [[answer["ids"] for answer in engine] for engine in answers]
    assert cut == [whole, whole]


def test_an_odd_chunk_keeps_what_the_whole_prompt_keeps(
    answers: list[list[dict[str, Any]]],
) -> None:
    for whole, cut in zip(answers[0], answers[1], strict=True):
        expected, counts = prompt_counts(whole), prompt_counts(cut)
        assert counts["rows"] == expected["rows"]
        assert counts["keys_scored"] == expected["keys_scored"]
        assert 0 < counts["keys_kept"] < 0.5 * counts["keys_scored"]
        for name in ("keys_kept", "v_tiles_read"):
            assert counts[name] == pytest.approx(expected[name], rel=ROUNDING)


def test_rows_behind_a_cached_prefix_keep_what_they_keep_without(
    answers: list[list[dict[str, Any]]],
) -> None:
    (prefix, whole), (_, cached) = (map(prompt_counts, engine) for engine in answers[::2])
    assert cached["rows"] == (LENGTH - PREFIX) * LAYERS * HEADS
    for name in ("keys_kept", "v_tiles_read"):
        assert cached[name] == pytest.approx(whole[name] - prefix[name], rel=ROUNDING)
