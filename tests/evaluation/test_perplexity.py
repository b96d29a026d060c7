"""The harness: keeping everything is dense, counts are right, and pruned variants stay close to
what they promise.
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import random_documents, tiny_model, tiny_tokenizer

from vllm_toptheta.calibration.calibrate import CalibrationOptions, calibrate
from vllm_toptheta.calibration.corpus import Corpus
from vllm_toptheta.evaluation.perplexity import evaluate_perplexity
from vllm_toptheta.evaluation.results import write_json
from vllm_toptheta.thresholds import KEEP_ALL, ThresholdTable

TEXT = "".join(chr(32 + (i * i + 7 * i) % 90) for i in range(6000))


@pytest.fixture(scope="module")
def table() -> ThresholdTable:
    options = CalibrationOptions(num_tokens=2048, length=512)
    return calibrate(
        tiny_model(), tiny_tokenizer(), Corpus("", [TEXT], [1]), options, name="tiny/llama"
    )


def keeping_all(table: ThresholdTable) -> ThresholdTable:
    return dataclasses.replace(
        table, theta=torch.full_like(table.theta, KEEP_ALL), slope=torch.zeros_like(table.slope)
    )


def test_keeping_everything_is_dense(table: ThresholdTable) -> None:
    documents = random_documents(2, 200)
    dense, kept = evaluate_perplexity(
        tiny_model(), documents, [16], [("all", keeping_all(table))], with_top_k=False
    )
    assert kept.perplexity == pytest.approx(dense.perplexity, rel=1e-5)
    assert kept.kept_fraction == kept.v_row_fraction == 1
    assert math.isnan(kept.long_v_row_fraction)
    assert dense.num_tokens == 2 * 199


def test_dense_is_the_models_own_perplexity() -> None:
    model = tiny_model()
    (document,) = random_documents(1, 200)
    with torch.inference_mode():
        expected = model(document[None], labels=document[None]).loss
    (dense,) = evaluate_perplexity(model, [document], [], [])
    assert math.log(dense.perplexity) == pytest.approx(float(expected), rel=1e-5)


def test_variants_and_counts(table: ThresholdTable, tmp_path: Path) -> None:
    documents = [torch.tensor(tiny_tokenizer()(TEXT[:1200]).input_ids)]
    reported: list[object] = []
    results = evaluate_perplexity(
        tiny_model(),
        documents,
        [16, 32],
        [("a", table)],
        group_sizes=[16, None],
        report=reported.append,
    )
    assert results == reported
    assert [(result.variant, result.k, result.compensation_group) for result in results] == [
        ("dense", 0, 0),
        ("top_k", 16, 0),
        ("a", 16, 16),
        ("a", 16, 0),
        ("top_k", 32, 0),
        ("a", 32, 16),
        ("a", 32, 0),
    ]
    top_k = results[1]
    rows = torch.arange(1, 1201)
    assert top_k.kept_fraction == pytest.approx(
        float(rows.clamp(max=16).sum() / rows.sum()), rel=1e-3
    )
    assert top_k.achieved_over_target == pytest.approx(1, rel=1e-3)
    for result in results[1:]:
        assert 0 < result.kept_fraction < result.v_row_fraction < 1
        assert 0 < result.long_v_row_fraction < result.v_row_fraction
    assert results[2].achieved_over_target == pytest.approx(1, abs=0.25)
    write_json(tmp_path / "results.json", results)
    written = json.loads((tmp_path / "results.json").read_text())
    assert [row["perplexity"] for row in written] == [result.perplexity for result in results]
    assert written[0]["achieved_over_target"] is None


def test_short_rows_are_dense_below_min_kv_len(table: ThresholdTable) -> None:
    documents = random_documents(1, 200)
    dense, kept = evaluate_perplexity(
        tiny_model(), documents, [16], [("a", table)], min_kv_len=200, with_top_k=False
    )
    assert kept.perplexity == pytest.approx(dense.perplexity, rel=1e-5)


def test_unknown_k_fails_before_any_work(table: ThresholdTable) -> None:
    with pytest.raises(ValueError, match="outside the table's range"):
        evaluate_perplexity(tiny_model(), random_documents(1, 200), [9999], [("a", table)])
