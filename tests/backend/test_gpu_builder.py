"""The GPU backend on the CPU: how a batch is split, and what its single-token rows are to do."""

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")
pytest.importorskip("triton")

import torch  # noqa: E402
from gpu_engine import (  # noqa: E402
    HEAD_DIM,
    HEADS,
    MAX_ROWS,
    Batch,
    make_builder,
    named_totals,
    recorded_build,
    run_layer,
    stub_stock_kernels,
)
from triton_interpreter import needs_interpreter  # noqa: E402
from vllm.v1.attention.backend import AttentionCGSupport  # noqa: E402

from vllm_toptheta.backend import (
    gpu,  # noqa: E402
)
from vllm_toptheta.request_options import RequestOptions  # noqa: E402

pytestmark = needs_interpreter


def test_mixed_batches_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(monkeypatch)
    batch = Batch([70, 33, 15, 40], [1, 1, 1, 5])
    metadata = builder.build(0, batch.common())
    query = torch.cat([batch.case.query[:3], torch.randn(5, HEADS, HEAD_DIM).bfloat16()])
    for layer, impl in enumerate(impls):
        output = run_layer(impl, batch, metadata, query)
        out, num_kept, v_rows_read, _ = batch.expected(layer).expected()
        torch.testing.assert_close(output[:3].double(), out[:3], rtol=0, atol=0.03)
        assert torch.equal(builder.tensors.num_kept[layer, :3], num_kept[:3])
        assert torch.equal(builder.tensors.v_rows_read[layer, :3], v_rows_read[:3])
        assert (output[3:] == 7).all()
    assert builder.tensors.num_kept[0, 0].max() < 30, "nothing was pruned"
    rest = stock[0]["metadata"]
    assert torch.equal(stock[0]["query"], query[3:])
    assert rest.num_actual_tokens == 5
    assert rest.query_start_loc.tolist() == [0, 5]
    assert rest.seq_lens.tolist() == [40]
    assert torch.equal(rest.block_table, batch.case.block_table[3:])


def test_a_single_prompt_token_runs_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(monkeypatch)
    batch = Batch([70, 70], [1, 1], [False, True])
    metadata = builder.build(0, batch.common())
    run_layer(impls[0], batch, metadata, batch.case.query)
    assert builder.tensors.num_kept[0, 1].tolist() == [70] * HEADS
    assert builder.tensors.num_kept[0, 0].max() < 70
    # The next step has no prompt row: the mark is gone.
    metadata = builder.build(0, Batch([70, 70], [1, 1]).common())
    run_layer(impls[0], batch, metadata, batch.case.query)
    assert builder.tensors.num_kept[0, 1].max() < 70


def test_requests_choose_their_k(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(monkeypatch, layers={"1": {"k": 128}})
    batch = Batch([70, 70, 70], [1, 1, 1])
    asked = {1: RequestOptions(k=128, layers=True), 2: RequestOptions(pruning=False)}
    monkeypatch.setattr(gpu, "row_options", lambda cam: asked)
    metadata, counts = recorded_build(builder, batch.common())
    assert builder.tensors.row_wishes[0, :3].tolist() == [16, 128, 16]
    assert builder.tensors.row_wishes[1, :3].tolist() == [0, 0.5, 0]
    run_layer(impls[0], batch, metadata, batch.case.query)
    assert builder.tensors.num_kept[0, 0].max() < 70
    assert builder.tensors.num_kept[0, 2].tolist() == [70] * HEADS, "switched off"
    totals = named_totals(counts)
    # Layer 1 fixes its own k of 128, which is more than these rows see.
    assert [row["dense_off"] for row in totals[:3]] == [0, 0, 3 * HEADS]
    assert totals[0]["keys_target"] == 2 * 16 * HEADS
    assert counts.detail == [1]
    detail = totals[6:]
    assert len(detail) == 3
    assert sum(row["rows"] for row in detail) == totals[1]["rows"] == 3 * HEADS
    monkeypatch.setattr(gpu, "row_options", lambda cam: {})
    builder.build(0, batch.common())
    assert builder.tensors.row_wishes[0, :3].tolist() == [16, 16, 16]
    assert not builder.tensors.row_wishes[2].any()


def test_level_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    builder, _ = make_builder(monkeypatch, layers={"1": {"k": 128}})
    assert builder.tensors.level_of(16) == 0
    assert builder.tensors.level_of(1024) == 1
    assert builder.tensors.level_of(128) == pytest.approx(0.5)
    assert builder.tensors.layers.k.tolist() == [0, 128, 0]
    assert builder.tensors.layers.level.tolist() == [0, 0.5, 0]


def test_splits_and_scratch_cover_every_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_device_limits", lambda device: ("", 132, 227 << 10))
    builder, _ = make_builder(monkeypatch)
    assert builder.tensors.max_rows == MAX_ROWS
    parts = [n * builder.tensors.num_splits(n) for n in range(1, MAX_ROWS + 1)]
    assert builder.tensors.num_splits(1) == 64
    assert max(parts) == builder.tensors.scratch.num_parts
    assert (
        builder.get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    assert builder.reorder_batch_threshold == 1
    assert builder.supports_draft_decode_metadata_update is False
