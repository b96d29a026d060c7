"""The GPU backend on the CPU: how a batch is split, and what its single-token rows are to do."""

import math
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")
pytest.importorskip("triton")

import torch  # noqa: E402
from asked import resolve  # noqa: E402
from gpu_engine import (  # noqa: E402
    BLOCK,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    MAX_ROWS,
    MIN_MASS,
    MIN_PROB,
    Batch,
    configure,
    make_builder,
    make_groups,
    make_layer,
    named_totals,
    recorded_build,
    run_layer,
    stub_stock_kernels,
    table,
)
from triton_interpreter import needs_interpreter  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport  # noqa: E402

from vllm_toptheta.backend import gpu  # noqa: E402
from vllm_toptheta.backend.gpu import TopThetaGPUBareBackend  # noqa: E402
from vllm_toptheta.backend.gpu_batch import single_token_rows  # noqa: E402
from vllm_toptheta.hooks import model_runner  # noqa: E402
from vllm_toptheta.kernels.columns import DENSE_LAYER, DENSE_NONE  # noqa: E402
from vllm_toptheta.kernels.layout import RENORMALISE  # noqa: E402
from vllm_toptheta.requests import RequestOptions  # noqa: E402

pytestmark = needs_interpreter


def test_mixed_batches_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(monkeypatch)
    batch = Batch([70, 33, 15, 40], [1, 1, 1, 5])
    metadata = builder.build(0, batch.common())
    for layer, impl in enumerate(impls):
        output = run_layer(impl, batch, metadata, batch.case.query)
        result = batch.check(layer, output, metadata.rows)
        assert (output[3:] == 7).all()
        if layer == 0:
            assert result.num_kept[0].max() < 40, "nothing was pruned"
            assert result.lifts[:3].any(), "no floor was reached"
    rest = stock[0]["metadata"]
    assert torch.equal(stock[0]["query"], batch.case.query[3:])
    assert rest.num_actual_tokens == 5
    assert rest.query_start_loc.tolist() == [0, 5]
    assert rest.seq_lens.tolist() == [40]
    assert torch.equal(rest.block_table, batch.case.block_table[3:])


def test_rows_behind_those_that_verify_drafts_are_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The V2 runner's order: verified drafts, generated tokens, prompts."""
    stock = stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(monkeypatch)
    queries = [4, 2, 1, 1, 5]
    batch = Batch([60, 30, 70, 90, 40], queries, [False, False, False, True, True])
    asked = {
        1: RequestOptions(pruning=False),
        2: RequestOptions(min_prob=0.2),
        4: RequestOptions(pruning=False),
    }
    monkeypatch.setattr(model_runner, "row_options", lambda cam: resolve(builder.plan, asked))
    metadata, counts = recorded_build(builder, batch.common())
    rows = metadata.rows.tensors
    assert rows.log_min_prob[0, 0].tolist() == pytest.approx([math.log(0.2)] * KV_HEADS)
    assert rows.dense[0, :2].tolist() == [DENSE_NONE, DENSE_LAYER]
    batch.case.log_min_prob[6] = math.log(0.2)
    for layer, impl in enumerate(impls):
        output = run_layer(impl, batch, metadata, batch.case.query)
        batch.check(layer, output, metadata.rows, excluded=(7,))
        assert (output[:6] == 7).all()
        assert (output[8:] == 7).all()
    before, behind = stock[:2]
    assert torch.equal(before["query"], batch.case.query[:6])
    assert before["metadata"].query_start_loc.tolist() == [0, 4, 6]
    assert before["metadata"].seq_lens.tolist() == [60, 30]
    assert torch.equal(behind["query"], batch.case.query[8:])
    assert behind["metadata"].query_start_loc.tolist() == [0, 5]
    assert torch.equal(behind["metadata"].block_table, batch.case.block_table[4:])
    totals = named_totals(counts)
    generated = totals.pop(2)
    assert generated["rows"] == 3 * HEADS
    kept = sum(int(rows.num_kept[layer, 0].sum()) for layer in range(3))
    assert generated["keys_kept"] == kept * HEADS // KV_HEADS
    tokens = [queries[row] for row in (0, 1, 3, 4)]
    assert [row["dense_prefill"] for row in totals[:4]] == [3 * HEADS * n for n in tokens]
    assert not any(row["rows"] for row in totals[:4])


@pytest.mark.parametrize(
    ("queries", "single"),
    [
        ([1, 1, 1], (0, 3)),
        ([1, 1, 0, 0], (0, 4)),
        ([4, 1, 1, 9], (1, 3)),
        ([1, 4, 1, 1], (2, 4)),
        ([4, 4], (0, 0)),
        ([4, 1, 0, 0], (1, 2)),
        ([4, 0, 0], (0, 0)),
    ],
)
def test_the_longest_run_of_single_tokens(queries: list[int], single: tuple[int, int]) -> None:
    starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0)
    assert single_token_rows(starts) == slice(*single)


def test_a_single_prompt_token_runs_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(monkeypatch)
    batch = Batch([70, 70], [1, 1], [False, True])
    metadata = builder.build(0, batch.common())
    output = run_layer(impls[0], batch, metadata, batch.case.query)
    batch.check(0, output, metadata.rows, excluded=(1,))
    # The next step has no prompt row: the mark is gone.
    batch = Batch([70, 70], [1, 1])
    metadata = builder.build(0, batch.common())
    batch.check(0, run_layer(impls[0], batch, metadata, batch.case.query), metadata.rows)


def test_requests_choose_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(monkeypatch, layers={"1": {"min_prob": 0.01}})
    batch = Batch([70] * 4, [1] * 4)
    asked = {
        1: RequestOptions(min_prob=0.2, min_mass=0.0, layers=True),
        2: RequestOptions(pruning=False),
        3: RequestOptions(min_mass=0.95),
    }
    monkeypatch.setattr(model_runner, "row_options", lambda cam: resolve(builder.plan, asked))
    metadata, counts = recorded_build(builder, batch.common())
    rows = metadata.rows
    wanted = torch.tensor([MIN_PROB, 0.2, 1, MIN_PROB]).log()
    assert torch.equal(rows.tensors.log_min_prob[0, :4, 0], wanted)
    # The operator's override of a layer stands.
    assert (rows.tensors.log_min_prob[1, :4] == math.log(0.01)).all()
    assert rows.min_mass.tolist() == pytest.approx([MIN_MASS, 0, 0, 0.95])
    run_layer(impls[0], batch, metadata, batch.case.query)
    kept = rows.tensors.num_kept[0, :4].float().mean(1)
    assert kept[1] < kept[0] < kept[3] < kept[2] == 70
    totals = named_totals(counts)
    assert [row["dense_off"] for row in totals[:4]] == [0, 0, 3 * HEADS, 0]
    assert [row["rows_lifted"] > 0 for row in totals[:4]] == [True, False, False, True]
    assert counts.detail == [1]
    detail = totals[4 + 3 :]
    assert len(detail) == 3
    assert sum(row["rows"] for row in detail) == totals[1]["rows"] == 3 * HEADS
    monkeypatch.setattr(model_runner, "row_options", lambda cam: {})
    builder.build(0, batch.common())
    assert (builder.tensors.held.log_min_prob[0, :4] == math.log(MIN_PROB)).all()
    assert not builder.tensors.held.dense[0].any()


def test_a_k_is_counted_as_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(
        monkeypatch, thresholds=table(), k=16, layers={"1": {"min_prob": 0.01}}
    )
    batch = Batch([70, 70, 70], [1, 1, 1])
    asked = {1: RequestOptions(k=32), 2: RequestOptions(min_prob=0.02)}
    monkeypatch.setattr(model_runner, "row_options", lambda cam: resolve(builder.plan, asked))
    metadata, counts = recorded_build(builder, batch.common())
    for impl in impls:
        run_layer(impl, batch, metadata, batch.case.query)
    totals = named_totals(counts)
    assert [row["keys_target"] for row in totals[:3]] == [2 * 16 * HEADS, 2 * 32 * HEADS, 0]
    assert totals[2]["keys_dense"] == totals[2]["keys_kept"]
    of_layer_1 = builder.tensors.held.num_kept[1, 0].sum() * HEADS // 2
    assert totals[0]["keys_dense"] == of_layer_1


def test_weights_are_those_of_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_stock_kernels(monkeypatch)
    outputs = {}
    for compensation in (True, False):
        builder, impls = make_builder(monkeypatch, compensation=compensation)
        batch = Batch([70], [1])
        metadata = builder.build(0, batch.common())
        batch.case.weights = builder.tensors.weights[0]
        outputs[compensation] = run_layer(impls[0], batch, metadata, batch.case.query)
        batch.check(0, outputs[compensation], metadata.rows)
    assert not torch.equal(outputs[True], outputs[False])


def test_without_compensation_pages_are_stocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing behind K and V, which is the next page, is read or written."""
    stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(monkeypatch, compensation=False)
    spec = builder.kv_cache_spec
    assert spec == replace(spec, page_size_padded=None)
    assert spec.page_size_bytes == 2 * BLOCK * KV_HEADS * HEAD_DIM * 2
    batch = Batch([70, 40], [1, 1], backend=TopThetaGPUBareBackend)
    batch.case.weights = torch.tensor(RENORMALISE).expand(HEADS, -1)
    before = batch.kv_cache.view(torch.int16).clone()
    metadata = builder.build(0, batch.common())
    for layer, impl in enumerate(impls):
        output = run_layer(impl, batch, metadata, batch.case.query)
        result = batch.check(layer, output, metadata.rows)
        assert layer == 2 or (result.num_kept[0] < 40).any()
    assert torch.equal(batch.kv_cache.view(torch.int16), before)


def test_pages_without_room_are_refused_where_means_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = configure()
    make_layer(config, backend=TopThetaGPUBareBackend)
    with pytest.raises(ValueError, match="with V means they need"):
        make_groups(monkeypatch, config)


def test_splits_and_scratch_cover_every_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_num_units", lambda device: 132)
    builder, _ = make_builder(monkeypatch)
    tensors = builder.tensors
    assert tensors.max_rows == tensors.scratch.num_rows == MAX_ROWS
    parts = [n * tensors.num_splits(n) for n in range(1, MAX_ROWS + 1)]
    assert tensors.num_splits(1) > 64
    assert max(parts) == tensors.scratch.num_parts
    assert tensors.scratch.max_len >= builder.vllm_config.model_config.max_model_len
    assert (
        builder.get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    assert builder.reorder_batch_threshold == 1
    assert builder.supports_draft_decode_metadata_update is False
