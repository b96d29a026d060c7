"""The GPU backend on the CPU: prompts that are pruned."""

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")
pytest.importorskip("triton")

import torch  # noqa: E402
from gpu_engine import (  # noqa: E402
    HEADS,
    KV_HEADS,
    WINDOW,
    Batch,
    make_builder,
    named_totals,
    recorded_build,
    run_layer,
    stub_stock_kernels,
)
from triton_interpreter import needs_interpreter  # noqa: E402

from vllm_toptheta.kernels.columns import COLUMNS, MASS_UNIT  # noqa: E402

pytestmark = needs_interpreter

GROUP = HEADS // KV_HEADS


def test_prompts_before_single_tokens_are_pruned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The V2 runner puts requests that verify drafts first."""
    stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(monkeypatch, phases="both")
    batch = Batch([90, 70, 65, 60], [3, 1, 1, 9], [False, False, True, True])
    metadata, counts = recorded_build(builder, batch.common())
    assert [part.tokens for part in metadata.rows.prompts] == [slice(0, 3), slice(5, 14)]
    lists = torch.zeros(14)
    for layer, impl in enumerate(impls):
        output = run_layer(impl, batch, metadata, batch.case.query)
        lists += batch.check(layer, output, metadata.rows).num_kept.sum(1)
    totals = named_totals(counts)
    assert totals[1]["rows"] == 3 * HEADS
    assert totals[1]["keys_kept"] == lists[3] * GROUP
    for seq, tokens in ((0, slice(0, 3)), (2, slice(4, 5)), (3, slice(5, 14))):
        assert totals[seq]["prefill_keys_kept"] == lists[tokens].sum() * GROUP


@pytest.mark.parametrize("phases", ["prefill", "both"])
def test_prompts_are_pruned_where_the_phases_say_so(
    monkeypatch: pytest.MonkeyPatch, phases: str
) -> None:
    stock = stub_stock_kernels(monkeypatch)
    builder, impls = make_builder(monkeypatch, phases=phases)
    batch = Batch([70, 65, 90, 60], [1, 1, 30, 9], [False, True, True, True])
    metadata, counts = recorded_build(builder, batch.common())
    excluded = (0,) if phases == "prefill" else ()
    starts = [0, 1, 2, 32, 41]
    lists, tiles, mass = (torch.zeros(4) for _ in range(3))
    for layer, impl in enumerate(impls):
        output = run_layer(impl, batch, metadata, batch.case.query)
        result = batch.check(layer, output, metadata.rows, excluded=excluded)
        for seq in range(4):
            rows = slice(starts[seq], starts[seq + 1])
            lists[seq] += result.num_kept[rows].sum()
            tiles[seq] += result.v_tiles_read[rows].sum()
            mass[seq] += result.kept_mass[rows].sum()
        if layer == 0:
            assert result.num_kept[2:].float().mean() < 40, "nothing was pruned"
    assert not stock, "vLLM's kernel ran"
    totals = named_totals(counts)
    generated = totals[0]
    assert generated["rows"] == 3 * HEADS
    assert generated["keys_kept"] == lists[0] * GROUP
    assert generated["dense_layer"] == (3 if phases == "prefill" else 1) * HEADS
    assert generated["dense_off"] == generated["dense_prefill"] == generated["prefill_rows"] == 0
    for seq, tokens in ((1, 1), (2, 30), (3, 9)):
        assert totals[seq]["rows"] == totals[seq]["rows_lifted"] == 0
        assert totals[seq]["prefill_rows"] == 3 * HEADS * tokens
        assert totals[seq]["prefill_keys_kept"] == lists[seq] * GROUP
        wanted = pytest.approx(float(mass[seq]) * MASS_UNIT, rel=1e-5)
        assert totals[seq]["prefill_kept_mass"] == wanted
        if tokens > 1:
            assert totals[seq]["prefill_v_tiles_read"] == tiles[seq]
    # Single tokens take the decode kernel, which reads rows instead of tiles.
    assert totals[1]["prefill_v_tiles"] == totals[1]["prefill_v_tiles_read"] == 0
    assert totals[1]["prefill_keys_scored"] == (65 + WINDOW + 65) * HEADS
    for name in COLUMNS:
        assert sum(row[name] for row in totals[:4]) == sum(row[name] for row in totals[4:])
