"""The decode protocol on a tiny model: dense agrees with itself, rules differ in the last rows
only, and more pruning is further from dense."""

from pathlib import Path

import pytest
import torch
from tiny_models import random_documents, tiny_model

from vllm_toptheta.evaluation.fidelity import (
    compare_rules,
    evaluate_fidelity,
    predictions,
    read_prompt,
)
from vllm_toptheta.evaluation.rules import Dense, Paper, SketchedTopTheta, TopK, TopTheta


@pytest.mark.parametrize("length", [300, 100])
@pytest.mark.parametrize("name", ["llama", "mistral-windowed", "gpt-oss-sinks"])
def test_a_cached_prompt_gives_the_models_own_predictions(name: str, length: int) -> None:
    model = tiny_model(name)
    (ids,) = random_documents(1, length)
    with torch.inference_mode():
        expected = model(ids[None], use_cache=False).logits[0, -20:-1].log_softmax(-1)
    cache = read_prompt(model, ids[:-20], [])
    for _ in range(2):  # the cache is left as it was
        got = predictions(model, ids[-20:], cache, Dense())
        assert torch.allclose(got, expected, atol=2e-2)


def test_more_pruning_is_further_from_dense() -> None:
    rules = [TopTheta(p, None, 0.0, None) for p in (1e-9, 0.01, 0.2)]
    results = evaluate_fidelity(tiny_model(), random_documents(2, 400), 30, [Dense(), *rules])
    dense, everything, some, few = results
    assert dense.kl == pytest.approx(0, abs=1e-6)
    assert everything.kl == pytest.approx(0, abs=1e-5)
    assert everything.top1 == dense.top1 == 1
    assert everything.perplexity_ratio == pytest.approx(1, abs=1e-4)
    assert 1e-4 < some.kl < few.kl
    assert everything.v_row_fraction == 1 > some.v_row_fraction > few.v_row_fraction
    assert 1 > some.kept_mass > few.kept_mass > 0
    assert {result.num_rows for result in results} == {58}


def test_the_sketch_of_k_is_as_near_to_dense_as_its_bounds_say() -> None:
    rules = [kind(0.01, None, 0.0, None) for kind in (TopTheta, SketchedTopTheta)]
    exact, sketched = evaluate_fidelity(tiny_model(), random_documents(2, 400), 30, rules)
    assert sketched.variant == exact.variant + ":k-sketch"
    assert exact.log_z_error is None
    assert sketched.log_z_error is not None
    assert 0 < sketched.log_z_error < 0.05
    assert sketched.kl == pytest.approx(exact.kl, rel=0.2)
    assert sketched.kept_fraction == pytest.approx(exact.kept_fraction, rel=0.02)


def test_the_papers_rule_calibrates_itself_on_the_prompt() -> None:
    (result,) = evaluate_fidelity(tiny_model(), random_documents(1, 400), 30, [Paper(20)])
    (top_k,) = evaluate_fidelity(tiny_model(), random_documents(1, 400), 30, [TopK(20)])
    # Keys of the group that a row sees in part come on top: up to 63 of some 385.
    assert top_k.kept_fraction == pytest.approx(20 / 385, rel=0.05)
    assert 15 / 385 < result.kept_fraction < 100 / 385


def ask(**changes: object) -> None:
    given = {
        "length": 256,
        "rows": 16,
        "num_documents": 1,
        "min_probs": [0.001],
        "ks": [],
        "min_mass": None,
        "table": "none",
        "without_table": False,
        "k_sketch": False,
        "rivals": [],
        "min_kv_len": 0,
        "dtype": "float32",
        "device": "cpu",
        "report": print,
    }
    compare_rules("no/such-model", [Path("missing")], **{**given, **changes})  # type: ignore[arg-type]


def test_what_makes_no_sense_is_refused_before_a_model_is_read() -> None:
    with pytest.raises(ValueError, match="--rows is 256, expected 2 to 255"):
        ask(rows=256)
    with pytest.raises(ValueError, match="--k needs a table of no/such-model: toptheta calibrate"):
        ask(ks=[64])
    with pytest.raises(ValueError, match="expected NAME:SETTING"):
        ask(rivals=["top_p:1"])
