"""The GPU backend on the CPU: what captured graphs rely on."""

import math
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")
pytest.importorskip("triton")

import gpu_engine  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from asked import resolve  # noqa: E402
from gpu_engine import (  # noqa: E402
    HEADS,
    KV_HEADS,
    LAYER,
    NAMES,
    Batch,
    Launches,
    configure,
    make_builder,
    make_groups,
    make_layer,
    named_totals,
    run_layer,
    stub_stock_kernels,
)
from triton_interpreter import needs_interpreter  # noqa: E402
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata  # noqa: E402

from vllm_toptheta.backend.gpu import TopThetaGPUBackend, TopThetaGPUSketchBackend  # noqa: E402
from vllm_toptheta.hooks import model_runner  # noqa: E402
from vllm_toptheta.kernels.columns import (  # noqa: E402
    COLUMNS,  # noqa: E402
    DENSE_LAYER,
    DENSE_SHORT,
)
from vllm_toptheta.kernels.triton import decode  # noqa: E402
from vllm_toptheta.requests import RequestOptions  # noqa: E402

pytestmark = needs_interpreter

KERNELS = [name for name in vars(decode) if name.endswith("_kernel")]


@pytest.mark.parametrize("sketch", [False, True])
def test_a_replayed_graph_sees_the_next_step(monkeypatch: pytest.MonkeyPatch, sketch: bool) -> None:
    """Between capture and replay only the contents of tensors may change, never an argument of a
    launch.
    """
    if sketch:
        monkeypatch.setattr(gpu_engine, "BLOCK", 64)
    builder, impls = make_builder(monkeypatch, k_sketch=sketch)
    backend = TopThetaGPUSketchBackend if sketch else TopThetaGPUBackend
    batch = Batch([70, 33, 1, 1], [1, 1, 1, 1], backend=backend)
    common, output = batch.common(), torch.empty_like(batch.case.query)

    def launched(metadata: Any) -> dict[str, list[Any]]:
        launches = {name: Launches() for name in KERNELS}
        for name, launch in launches.items():
            monkeypatch.setattr(decode, name, launch)
        impls[0].forward(LAYER, batch.case.query, None, None, batch.kv_cache, metadata, output)
        return {name: launch.calls for name, launch in launches.items()}

    captured = launched(builder.build_for_cudagraph_capture(common))
    assert common.seq_lens.tolist() == [1] * 4
    once = dict.fromkeys(KERNELS, 1) | {"_centres_kernel": int(sketch)}
    assert {name: len(calls) for name, calls in captured.items()} == once
    common.seq_lens.copy_(torch.tensor([5, 64, 0, 0]))
    common.is_prefilling = torch.tensor([True, False, False, False])
    asked = resolve(builder.plan, {1: RequestOptions(min_prob=0.2)})
    monkeypatch.setattr(model_runner, "row_options", lambda cam: asked)
    assert launched(builder.build(0, common)) == captured
    held = builder.tensors.held
    assert held.dense[0, :4].tolist() == [DENSE_LAYER, 0, DENSE_SHORT, DENSE_SHORT]
    assert held.log_min_prob[0, 1].tolist() == pytest.approx([math.log(0.2)] * KV_HEADS)


def padded(batch: Batch, num_tokens: int) -> torch.Tensor:
    """The query of a batch, with tokens of no request at its end."""
    query = batch.case.query
    return torch.cat([query, query.new_zeros(num_tokens - len(query), *query.shape[1:])])


def test_padding_of_a_captured_batch_yields_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(monkeypatch)
    batch = Batch([70, 33, 0, 0], [1, 1, 0, 0])
    common = batch.common()
    common.num_actual_tokens = 4
    metadata = builder.build(0, common)
    output = run_layer(impls[0], batch, metadata, padded(batch, 4))
    assert (output[2:] == 0).all()
    assert not stock
    counts = builder.counts(common, metadata, [])
    assert named_totals(counts)[2:4] == [dict.fromkeys(COLUMNS, 0)] * 2


@pytest.mark.parametrize("phases", ["decode", "both"])
def test_graphs_of_longer_queries_are_refused(monkeypatch: pytest.MonkeyPatch, phases: str) -> None:
    builder, _ = make_builder(monkeypatch, phases=phases)
    with pytest.raises(RuntimeError, match="FULL_DECODE_ONLY"):
        builder.build_for_cudagraph_capture(Batch([70, 33], [1, 3]).common())


def test_a_padded_batch_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the V2 runner hands over for a captured graph: lengths and slots of real requests only,
    and padding without tokens.
    """
    stub_stock_kernels(monkeypatch)
    config = configure()
    layers = [make_layer(config, name) for name in NAMES]
    groups, cache = make_groups(monkeypatch, config)
    batch = Batch([70, 33, 15, 0], [1, 1, 1, 0])
    common = batch.common()
    metadata = build_attn_metadata(
        attn_groups=[groups],
        num_reqs=4,
        num_tokens=4,
        query_start_loc_gpu=common.query_start_loc,
        query_start_loc_cpu=common.query_start_loc_cpu,
        max_query_len=1,
        seq_lens=torch.cat([common.seq_lens, torch.full((2,), 99, dtype=torch.int32)]),
        max_seq_len=70,
        block_tables=[common.block_table_tensor],
        slot_mappings=torch.full((1, 4), -1),
        kv_cache_config=cache,
        is_prefilling=torch.tensor([False, True, False]),
        req_idx=np.array([2, 0, 1]),
    )
    rows = metadata[NAMES[0]].rows
    assert rows.num_single == 4
    assert rows.tensors.dense[0, :4].tolist() == [0, DENSE_LAYER, DENSE_SHORT, DENSE_SHORT]
    query = padded(batch, 4)
    output = run_layer(layers[0].impl, batch, metadata[NAMES[0]], query)
    assert rows.tensors.num_kept[0, 1].tolist() == [33] * KV_HEADS
    assert (output[3] == 0).all()


def test_weights_that_are_loaded_again_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks are the only weights that the layer uses; a copy in another dtype would go stale."""
    stub_stock_kernels(monkeypatch)
    config = configure()
    sinks = torch.zeros(HEADS, dtype=torch.bfloat16)
    layers = [make_layer(config, name, sinks=sinks) for name in NAMES]
    (group,), _ = make_groups(monkeypatch, config)
    batch = Batch([70, 33], [1, 1])
    metadata = group.get_metadata_builder().build(0, batch.common())
    layers[0].process_weights_after_loading(torch.bfloat16)
    before = run_layer(layers[0].impl, batch, metadata, batch.case.query)
    sinks.fill_(20)
    after = run_layer(layers[0].impl, batch, metadata, batch.case.query)
    assert after.abs().max() < 0.1 * before.abs().max()
