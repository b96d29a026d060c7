"""What prompt rows keep does not depend on how the engine cuts a prompt, or on what of it the
prefix cache holds."""

import pydoc_data.topics
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import generate, toptheta
from transformers import AutoTokenizer

LAYERS, HEADS, LENGTH, BLOCK = 30, 9, 1200, 128
CACHED = 4 * BLOCK
CHUNK, MIN_PROB = 251, 0.004
ROUNDING = 1e-3
"""GEMMs of another height may round differently, and so move a score over its threshold."""


@pytest.fixture(scope="module")
def answers(smollm2: Path) -> list[list[dict[str, Any]]]:
    """A prompt's first blocks, all of it, and another prompt: each at once without a prefix cache,
    and in odd chunks with one."""
    text = pydoc_data.topics.topics["operator-summary"] + pydoc_data.topics.topics["exceptions"]
    ids = AutoTokenizer.from_pretrained(smollm2)(text + pydoc_data.topics.topics["class"])
    prompt, other = ids.input_ids[:LENGTH], ids.input_ids[300 : 300 + LENGTH]
    assert len(prompt) == len(other) == LENGTH
    common = {
        **toptheta(phases="prefill", prefill_min_prob=MIN_PROB, min_kv_len=128, thresholds="none"),
        "max_model_len": 2048,
        # So that the second prompt finds the first one's blocks.
        "max_num_seqs": 1,
        "block_size": BLOCK,
    }
    engines = [
        {**common, "max_num_batched_tokens": chunk, "enable_prefix_caching": caching}
        for chunk, caching in ((2048, False), (CHUNK, True))
    ]
    return generate(smollm2, [prompt[:CACHED], prompt, other], 8, engines)


def prompt_counts(answer: dict[str, Any]) -> dict[str, Any]:
    counts: dict[str, Any] = answer["summary"]["toptheta"]["prefill"]
    return counts


def test_a_min_prob_is_shown_where_it_was_used(answers: list[list[dict[str, Any]]]) -> None:
    for answer in (answer for engine in answers for answer in engine):
        shown = answer["summary"]["toptheta"]
        assert (shown["min_prob"], shown["prefill"]["min_prob"]) == (None, MIN_PROB)
        assert shown["dense_rows"]["layer"] == shown["rows"] > 0
        assert shown["kept_fraction"] == shown["kept_mass"] == 1
        assert shown["target_ratio"] is None


def test_the_same_tokens_follow(answers: list[list[dict[str, Any]]]) -> None:
    whole, cut = ([answer["ids"] for answer in engine] for engine in answers)
    assert cut == whole


@pytest.mark.parametrize("prompt", [0, 2])
def test_odd_chunks_keep_what_the_whole_prompt_keeps(
    answers: list[list[dict[str, Any]]], prompt: int
) -> None:
    whole, cut = (prompt_counts(engine[prompt]) for engine in answers)
    assert cut["rows"] == whole["rows"]
    assert cut["keys_scored"] == whole["keys_scored"]
    assert 0 < whole["keys_kept"] < 0.5 * whole["keys_scored"]
    assert 0 < whole["kept_mass"] < 1
    for name in ("keys_kept", "v_tiles_read", "kept_mass"):
        assert cut[name] == pytest.approx(whole[name], rel=ROUNDING)


def test_rows_behind_a_cached_prefix_keep_what_they_keep_without(
    answers: list[list[dict[str, Any]]],
) -> None:
    (prefix, whole, _), (_, behind, _) = (map(prompt_counts, engine) for engine in answers)
    assert behind["rows"] == (LENGTH - CACHED) * LAYERS * HEADS
    for name in ("keys_kept", "v_tiles_read"):
        assert behind[name] == pytest.approx(whole[name] - prefix[name], rel=ROUNDING)
