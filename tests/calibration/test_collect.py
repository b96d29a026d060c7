"""Statistics against brute force: every sampled row's keys are counted once, where they belong, and
the products are those of the terms.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import CONFIGS, collect, random_documents, tiny_model
from transformers import PreTrainedModel

from vllm_toptheta.calibration.attention import (
    AttentionCall,
    dense_attention,
    row_chunks,
)
from vllm_toptheta.calibration.collect import (
    BINS_PER_UNIT,
    GROUP_SIZE,
    LOWEST_LOG_PROB,
    AttentionStatistics,
    Collector,
    Share,
    merge,
)
from vllm_toptheta.evaluation.model import replaced_attention
from vllm_toptheta.kernels.reference import compensated_output, select, softmax

LENGTH = 600
MIN_PROB = 0.004
WINDOW = 200


def wide_model(name: str) -> PreTrainedModel:
    """A tiny model whose windows hold whole groups of tokens."""
    config = copy.deepcopy(CONFIGS[name])
    if getattr(config, "sliding_window", None):
        config.sliding_window = WINDOW
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, name, config)
        return tiny_model(name)


def empty(name: str) -> AttentionStatistics:
    config = CONFIGS[name]
    return AttentionStatistics.empty(
        config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, LENGTH
    )


def collected(name: str, documents: int = 1) -> tuple[AttentionStatistics, list[torch.Tensor]]:
    """Statistics, and the rows sampled from the last document."""
    texts = random_documents(documents, LENGTH)
    collector = collect(wide_model(name), texts, empty(name), MIN_PROB)
    return collector.statistics, collector._sample


def calls(name: str) -> list[AttentionCall]:
    """What the layers of a model are asked on the document of `collect`."""
    seen: list[AttentionCall] = []

    def attention(call: AttentionCall) -> torch.Tensor:
        seen.append(call)
        return dense_attention(call)

    model = wide_model(name)
    with replaced_attention(model, attention), torch.inference_mode():
        model.base_model(random_documents(1, LENGTH)[0][None], use_cache=False)
    return seen


def kept_above(statistics: AttentionStatistics, log_prob: float) -> torch.Tensor:
    """[num_layers, num_kv_heads, num_buckets] keys."""
    first = round((log_prob - LOWEST_LOG_PROB) * BINS_PER_UNIT)
    return statistics.count[..., first:].sum(-1)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_counts_are_those_of_the_rule(name: str) -> None:
    statistics, sample = collected(name)
    assert [rows.numel() for rows in sample] == [37, 64, 64]
    for call in calls(name):
        num_kv_heads = call.key.shape[1]
        for bucket, rows in enumerate(sample):
            scores = call.scores(rows)
            for log_prob in (-19.9375, -6.0, -3.5, -1.0, 0.0):
                threshold = torch.full((num_kv_heads, len(rows)), log_prob)
                if log_prob == 0:
                    threshold += 1  # even a probability of 1 is kept for its rank alone
                kept = select(scores, threshold, 0.0, group_size=GROUP_SIZE, sinks=call.sinks).kept
                expected = kept.sum((1, 2)).double()
                got = kept_above(statistics, log_prob)[call.layer, :, bucket]
                # A key within rounding of a bin's edge may fall on either side.
                torch.testing.assert_close(got, expected, rtol=2e-3, atol=1.0)


def test_rows_and_their_lengths() -> None:
    statistics, sample = collected("llama", documents=3)
    assert statistics.rows.tolist() == [111, 192, 192]
    assert statistics.fit_rows == 384
    assert statistics.num_tokens == 3 * LENGTH
    assert statistics.edges.tolist() == [150, 300, 600]
    for rows, edge in zip(sample, (150, 300, 600), strict=True):
        assert edge - edge // 4 <= int(rows.min())
        assert int(rows.max()) < edge
    mean = statistics.row_tokens / statistics.rows
    assert torch.allclose(mean / statistics.edges, torch.tensor(0.875).double(), atol=0.01)


@pytest.mark.parametrize("name", ["llama", "gemma3-mixed-windows", "gpt-oss-sinks"])
@torch.inference_mode()
def test_products_are_those_of_the_terms(name: str) -> None:
    statistics, sample = collected(name)
    weights = torch.tensor([0.7, 0.2, -0.5, 0.4, 0.3])
    rows = torch.cat(sample[-2:])
    for call in calls(name):
        scores = call.scores(rows).float()
        threshold = torch.full((call.key.shape[1], len(rows)), math.log(MIN_PROB))
        chosen = select(scores, threshold, 0.0, group_size=GROUP_SIZE, sinks=call.sinks)
        assert 0.02 < float(chosen.kept_mass.amin()) < 0.98
        dense = torch.einsum(
            "hrn,nhd->rhd",
            softmax(scores, call.sinks),
            call.value.repeat_interleave(call.num_heads // call.key.shape[1], 1),
        )
        out = compensated_output(
            chosen, call.value, weights.expand(call.num_heads, -1), group_size=GROUP_SIZE
        )
        w, layer = weights.double(), call.layer

        def squares(x: torch.Tensor) -> torch.Tensor:
            return x.double().square().sum((0, 2))

        torch.testing.assert_close(w @ statistics.gram[layer] @ w, squares(out), rtol=1e-4, atol=0)
        torch.testing.assert_close(statistics.dense[layer], squares(dense), rtol=1e-4, atol=0)
        distance = squares(dense) - 2 * statistics.moment[layer] @ w + squares(out)
        torch.testing.assert_close(squares(dense - out), distance, rtol=1e-3, atol=1e-6)
        mass = chosen.kept_mass.sum(-1).double()
        torch.testing.assert_close(statistics.kept_mass[layer], mass, rtol=1e-4, atol=0)


@pytest.mark.parametrize("window", [None, 300])
def test_chunks_cover_the_rows_and_start_at_long_groups(window: int | None) -> None:
    query, key = torch.zeros(3000, 64, 1), torch.zeros(3000, 1, 1)
    call = AttentionCall(0, query, key, key, 1.0, window, None, None)
    rows = torch.arange(0, 3000, 3)
    chunks = list(row_chunks(call, rows))
    assert torch.equal(torch.cat([chunk for chunk, _ in chunks]), rows)
    assert len(chunks) > 4
    for chunk, first_key in chunks:
        assert first_key % 256 == 0
        assert first_key <= max(0, int(chunk[0]) + 1 - (window or 3000))


def test_documents_too_short() -> None:
    with pytest.raises(ValueError, match="length 200 is too short, expected at least 256"):
        AttentionStatistics.empty(2, 4, 2, 200)


@torch.inference_mode()
def ranks(name: str, number: int) -> list[Share]:
    """What tensor-parallel ranks collect; each has some heads."""
    shares = []
    for rank in range(number):
        seen = calls(name)
        heads = seen[0].num_heads // number
        kv_heads = max(1, seen[0].key.shape[1] // number)
        statistics = AttentionStatistics.empty(len(seen), heads, kv_heads, LENGTH)
        collector = Collector(statistics, MIN_PROB)
        collector.start_document(LENGTH)
        own = slice(rank * heads, (rank + 1) * heads)
        first = rank * heads * seen[0].key.shape[1] // seen[0].num_heads
        kv = slice(first, first + kv_heads)
        for call in seen:
            sinks = None if call.sinks is None else call.sinks[own]
            mine = {"query": call.query[:, own], "key": call.key[:, kv], "value": call.value[:, kv]}
            collector.add(replace(call, **mine, sinks=sinks))
        shares.append(Share(rank, [call.layer for call in seen], statistics))
    return shares


@pytest.mark.parametrize("name", ["llama", "gpt-oss-sinks"])
def test_ranks_together_are_one(name: str) -> None:
    whole, _ = collected(name)
    heads = whole.moment.shape[1]
    together = merge(ranks(name, 2), heads, whole.count.shape[1])
    assert together.windows == whole.windows
    assert (together.fit_rows, together.num_tokens) == (whole.fit_rows, whole.num_tokens)
    for field in ("edges", "rows", "row_tokens", "count"):
        torch.testing.assert_close(getattr(together, field), getattr(whole, field), rtol=0, atol=1)
    for field in ("gram", "moment", "dense", "kept_mass"):
        torch.testing.assert_close(
            getattr(together, field), getattr(whole, field), rtol=1e-4, atol=1e-4
        )


def test_ranks_that_share_a_kv_head_count_what_each_keeps() -> None:
    shares = ranks("llama-mqa", 2)
    together = merge(shares, 4, 1)
    parts = [share.statistics.count for share in shares]
    assert not torch.equal(*parts)
    torch.testing.assert_close(together.count, (parts[0] + parts[1]) / 2)


def test_stages_have_their_own_layers() -> None:
    (whole,) = ranks("llama", 1)
    stages = []
    for layer in range(2):
        part = copy.deepcopy(whole.statistics)
        for field in ("count", "gram", "moment", "dense", "kept_mass"):
            getattr(part, field)[1 - layer] = 0
        part.windows = [None, None]
        part.windows[layer] = layer + 1
        stages.append(Share(0, [layer], part))
    together = merge(stages, 4, 2)
    assert together.windows == [1, 2]
    assert torch.equal(together.count, whole.statistics.count)
    assert torch.equal(together.rows, whole.statistics.rows)
