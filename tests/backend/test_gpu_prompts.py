"""The GPU backend on the CPU: prompts that are pruned."""

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")
pytest.importorskip("triton")

import torch  # noqa: E402
from gpu_engine import (  # noqa: E402
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    THETA,
    WINDOW,
    Batch,
    make_builder,
    named_totals,
    recorded_build,
    run_layer,
    stub_stock_kernels,
)
from prefill_cases import v_tiles  # noqa: E402
from triton_interpreter import needs_interpreter  # noqa: E402

from vllm_toptheta.backend import gpu  # noqa: E402
from vllm_toptheta.backend.dial import Dial  # noqa: E402
from vllm_toptheta.backend.prompts import plan_prompts  # noqa: E402
from vllm_toptheta.kernels.reference import (  # noqa: E402
    attention_scores,
    attention_weights,
    select_by_theta,
    weighted_values,
)
from vllm_toptheta.request_options import RequestOptions  # noqa: E402
from vllm_toptheta.telemetry.counters import FIELDS  # noqa: E402

pytestmark = needs_interpreter


PROMPTS = {"lens": [70, 65, 90, 60], "queries": [1, 1, 30, 9]}
PREFILLING = [False, True, True, True]


def expected_prompt(
    batch: Batch, layer: int, seq: int, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, num_kept and v_tiles_read of a request's rows in float64."""
    case, window = batch.case, WINDOW if layer == 1 else None
    ends = torch.arange(case.lens[seq] - len(query), case.lens[seq]) + 1
    scores = attention_scores(
        query.double(), case.keys[seq], ends, sm_scale=case.sm_scale, window=window
    )
    dense = (ends.clamp(max=window or 10**6) <= 20) | (layer == 2)
    theta = torch.full((HEADS, len(query)), THETA, dtype=torch.float64)
    kept = select_by_theta(scores, theta.masked_fill(dense, -torch.inf))
    weights = attention_weights(scores, kept, group_size=16)
    out = weighted_values(weights, case.values[seq])
    return out, kept.sum(-1).T.int(), v_tiles(kept, KV_HEADS)


@pytest.mark.parametrize("phases", ["prefill", "both"])
def test_prompts_are_pruned_where_the_phases_say_so(
    monkeypatch: pytest.MonkeyPatch, phases: str
) -> None:
    stock = stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(monkeypatch, phases=phases)
    batch = Batch(PROMPTS["lens"], PROMPTS["queries"], PREFILLING)
    metadata, counts = recorded_build(builder, batch.common())
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(41, HEADS, HEAD_DIM, generator=generator).mul(2).bfloat16()
    starts, sums = [0, 1, 2, 32, 41], torch.zeros(4, 2, dtype=torch.int64)
    for layer, impl in enumerate(impls):
        output = run_layer(impl, batch, metadata, query)
        for seq in range(4):
            rows = slice(starts[seq], starts[seq + 1])
            out, num_kept, tiles = expected_prompt(batch, layer, seq, query[rows])
            if seq == 0 and phases == "prefill":
                num_kept = torch.full((1, HEADS), WINDOW if layer == 1 else 70)
            else:
                torch.testing.assert_close(output[rows].double(), out, rtol=0, atol=0.03)
            sums[seq] += torch.stack([num_kept.sum(), tiles.sum()])
            if seq >= 2:
                ours = slice(rows.start - 2, rows.stop - 2)
                assert torch.equal(metadata.prompts.num_kept[layer, ours], num_kept)
                assert torch.equal(metadata.prompts.v_tiles_read[layer, ours], tiles)
    assert not stock, "vLLM's kernel ran"
    totals = named_totals(counts)
    generated = totals[0]
    assert generated["rows"] == 3 * HEADS
    assert generated["keys_kept"] == sums[0, 0]
    assert generated["dense_layer"] == (3 if phases == "prefill" else 1) * HEADS
    assert generated["dense_off"] == generated["dense_prefill"] == generated["prefill_rows"] == 0
    for seq, tokens in ((1, 1), (2, 30), (3, 9)):
        assert totals[seq]["rows"] == 0
        assert totals[seq]["prefill_rows"] == 3 * HEADS * tokens
        assert totals[seq]["prefill_keys_kept"] == sums[seq, 0]
    # Single tokens take the decode kernel, which counts V rows.
    assert totals[1]["prefill_v_tiles"] == totals[1]["prefill_v_tiles_read"] == 0
    assert totals[1]["prefill_keys_scored"] == (65 + 40 + 65) * HEADS
    for name in FIELDS:
        assert sum(row[name] for row in totals[:4]) == sum(row[name] for row in totals[4:])


def test_prompts_are_planned_and_counted_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stub_stock_kernels(monkeypatch)
    builder, _ = make_builder(monkeypatch, phases="both", prefill_k=32, layers={"2": {"k": 128}})
    table = builder.plan.table
    table.theta[0], table.theta[1] = -4.0, -8.0
    table.slope.fill_(0.5)
    builder.tensors._allocate_layers([0, 1, 2], [None, WINDOW, None])
    batch = Batch([90, 60, 50], [30, 9, 2])
    asked = {1: RequestOptions(k=512), 2: RequestOptions(pruning=False)}
    monkeypatch.setattr(gpu, "row_options", lambda cam: asked)
    metadata, counts = recorded_build(builder, batch.common())
    ours, common = metadata.prompts, batch.common()
    theirs = plan_prompts(
        Dial(builder.plan, [0, 1, 2], [None, WINDOW, None], 0, HEADS),
        builder.plan.config.prefill_k,
        common.block_table_tensor,
        common.query_start_loc_cpu,
        common.seq_lens,
        asked,
        HEADS,
        KV_HEADS,
    )
    assert torch.equal(ours.dense.bool(), theirs.dense)
    assert theirs.dense.any()
    assert not theirs.dense.all()
    pruned = ~theirs.dense
    torch.testing.assert_close(ours.theta[pruned], theirs.theta[pruned], rtol=1e-5, atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    for name, most in (("num_kept", 60), ("v_tiles_read", 3)):
        tensor = getattr(ours, name)
        tensor.copy_(torch.randint(1, most, tensor.shape, generator=generator))
        getattr(theirs, name).copy_(tensor)
    expected = theirs.counts()
    for seq, row in enumerate(named_totals(counts)[:3]):
        found = {name: row[name] for name in expected}
        assert found == {name: int(values[:, seq].sum()) for name, values in expected.items()}
