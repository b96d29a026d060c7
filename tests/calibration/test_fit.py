"""Statistics to thresholds: the inversion meets its k on the rows it was fitted on, and budgets go
where they help.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, random_documents, tiny_model

from vllm_toptheta.calibration.collect import Collector, ScoreStatistics
from vllm_toptheta.calibration.fit import allocate, fit
from vllm_toptheta.thresholds import KEEP_ALL

LENGTH = 512
LEVELS = (8, 16, 32, 64)


def collect(name: str, documents: int = 3, tac_k: int = 0) -> ScoreStatistics:
    model = tiny_model(name)
    statistics = ScoreStatistics.empty(
        model.config.num_hidden_layers, model.config.num_attention_heads, LENGTH
    )
    Collector(model, statistics, tac_k=tac_k, group_size=16).run(
        random_documents(documents, LENGTH)
    )
    return statistics


def kept_per_row(statistics: ScoreStatistics, theta: torch.Tensor) -> torch.Tensor:
    """Keys above theta [..., num_buckets] by the histograms alone, whole bins only."""
    num_bins = statistics.count.shape[-1]
    centres = statistics.low[..., None] + statistics.width[..., None] * (
        torch.arange(num_bins) + 0.5
    )
    above = centres[:, :, None] >= theta[..., None]
    return (statistics.count * above).sum(-1) / statistics.rows


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("allocation", ["uniform", "lost_mass"])
def test_mean_kept_count_is_the_budget(name: str, allocation: str) -> None:
    statistics = collect(name)
    fitted = fit(statistics, allocation, LEVELS)
    assert torch.isfinite(fitted.theta).all()
    for level, theta in enumerate(fitted.theta.double()):
        kept = kept_per_row(statistics, theta)
        budget = fitted.head_k[level].double()[..., None].expand_as(kept)
        # A knot next to the first measured one is smoothed across a kink.
        measured = (theta > KEEP_ALL) & (fitted.lengths > 2 * budget)
        if measured.any():
            assert float((kept[measured] / budget[measured]).mean()) == pytest.approx(1, abs=0.1)


def test_statistics_count_every_sampled_key_once() -> None:
    statistics = collect("gpt-oss-sinks")
    for layer, window in enumerate(statistics.windows):
        per_row = statistics.count[layer].sum(-1) / statistics.rows
        lengths = statistics.row_tokens / statistics.rows
        if window is None:
            assert torch.allclose(per_row, lengths.expand_as(per_row))
        else:
            assert float(per_row.max()) <= window
        # A sink takes part of the probability.
        mass = statistics.mass[layer].sum(-1) / statistics.rows
        assert float(mass.max()) <= 1 + 1e-6
        assert float(mass.min()) < 0.999
    assert statistics.clipped_fraction < 1e-3


def test_mass_sums_to_one_without_sinks() -> None:
    statistics = collect("llama")
    assert torch.allclose(
        statistics.mass.sum(-1) / statistics.rows, torch.ones(()).double(), atol=1e-4
    )


def test_top_k_at_calibration_changes_only_what_deeper_layers_see() -> None:
    dense, pruned = collect("llama"), collect("llama", tac_k=8)
    assert torch.equal(dense.count[0], pruned.count[0])
    assert not torch.equal(dense.count[1], pruned.count[1])


def test_a_larger_k_never_raises_theta() -> None:
    theta = fit(collect("llama"), levels=LEVELS).theta
    assert (theta.diff(dim=0) <= 0).all()


def test_levels_do_not_cross_beyond_the_last_knot() -> None:
    fitted = fit(collect("llama"), levels=LEVELS)
    far = fitted.theta[..., -1] + 20 * fitted.slope
    assert (far.diff(dim=0) <= 0).all()


def test_kept_count_holds_beyond_the_calibrated_lengths() -> None:
    statistics = collect("llama")
    half = statistics.num_buckets - 4
    shorter = dataclasses.replace(
        statistics,
        edges=statistics.edges[: half + 1],
        count=statistics.count[:, :, :half],
        mass=statistics.mass[:, :, :half],
        rows=statistics.rows[:half],
        row_tokens=statistics.row_tokens[:half],
    )
    fitted = fit(shorter, "uniform", (16,))
    doubling = torch.tensor(float(LENGTH)).log2() - fitted.lengths[-1].log2()
    theta = fitted.theta[0, ..., -1] + doubling * fitted.slope[0]
    kept = kept_per_row(statistics, theta[..., None].expand(-1, -1, statistics.num_buckets))
    assert float(kept[..., -1].mean()) == pytest.approx(16, rel=0.5)


def test_behind_a_window_theta_does_not_move() -> None:
    statistics = collect("gemma3-mixed-windows")
    fitted = fit(statistics, "uniform", (8, 16))
    assert statistics.windows == [40, 40, None]
    assert (fitted.slope[:, :2] == 0).all()
    assert (fitted.slope[:, 2] != 0).any()


def test_window_below_the_budget_keeps_everything() -> None:
    fitted = fit(collect("gemma3-mixed-windows"), "uniform", (64,))
    assert (fitted.theta[:, :2] == KEEP_ALL).all()
    assert (fitted.theta[:, 2, :, -1] > KEEP_ALL).all()


def test_documents_too_short_for_any_level() -> None:
    with pytest.raises(ValueError, match="no k fits documents"):
        fit(collect("llama", 1), levels=(400,))


def test_no_statistics() -> None:
    with pytest.raises(ValueError, match="no statistics"):
        fit(ScoreStatistics.empty(2, 2, LENGTH))


def test_allocation_prefers_the_head_that_loses_more() -> None:
    budgets = torch.tensor([2.0, 4, 8, 16, 32]).double()
    flat, steep = (
        torch.tensor([0.01, 0.008, 0.006, 0.004, 0.002]),
        torch.tensor([0.9, 0.6, 0.4, 0.2, 0.1]),
    )
    head_k = allocate(
        budgets, torch.stack([flat, steep])[None].double(), torch.tensor([10.0]).double()
    )
    assert head_k.mean() == pytest.approx(10)
    assert head_k[0, 0, 1] > head_k[0, 0, 0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(0, 1), min_size=5, max_size=5), min_size=1, max_size=6))
def test_allocation_meets_the_mean_and_grows(curves: list[list[float]]) -> None:
    budgets = torch.tensor([2.0, 4, 8, 16, 32]).double()
    losses = torch.tensor(curves).double().sort(-1, descending=True).values[None]
    levels = torch.tensor([3.0, 7, 20, 31]).double()
    head_k = allocate(budgets, losses, levels)
    assert torch.allclose(head_k.mean((1, 2)), levels)
    assert (head_k.diff(dim=0) >= -1e-9).all()
