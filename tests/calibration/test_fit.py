"""Statistics to a table's tensors: counts per threshold, and weights that are least squares under
their constraint.
"""

import pytest
import torch
from tiny_models import collect, random_documents, tiny_model

from vllm_toptheta.calibration.collect import AttentionStatistics
from vllm_toptheta.calibration.fit import fit, fit_weights

NUM_WEIGHTS = 5


def collected(min_prob: float = 0.004) -> AttentionStatistics:
    statistics = AttentionStatistics.empty(2, 4, 2, 512)
    collect(tiny_model(), random_documents(2, 512), statistics, min_prob)
    return statistics


def random_problem(rows: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms [rows, NUM_WEIGHTS] as unequal in size as real ones, and a dense output [rows]."""
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(rows, NUM_WEIGHTS, generator=generator, dtype=torch.float64)
    terms[:, 1] += terms[:, 0]
    terms[:, 2:] *= torch.tensor([0.3, 0.1, 0.05])
    noise = torch.randn(rows, generator=generator, dtype=torch.float64)
    truth = torch.tensor([0.8, 0.4, 0.6, 0.3, -0.2], dtype=torch.float64)
    return terms, terms @ truth + 0.2 * noise


def test_unconstrained_weights_are_least_squares() -> None:
    terms, dense = random_problem()
    expected = torch.linalg.lstsq(terms, dense[:, None]).solution[:, 0]
    got = fit_weights(terms.T @ terms, dense @ terms, constrained=False)
    # The ridge draws by a ten-thousandth.
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)


def test_constrained_weights_are_least_squares_with_one_weight_less() -> None:
    terms, dense = random_problem()
    kept, renormalised = terms[:, 0], terms[:, 1]
    free = torch.cat([(kept - renormalised)[:, None], terms[:, 2:]], dim=-1)
    solution = torch.linalg.lstsq(free, (dense - renormalised)[:, None]).solution[:, 0]
    got = fit_weights(terms.T @ terms, dense @ terms)
    assert float(got[:2].sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(got[[0, 2, 3, 4]], solution, rtol=0, atol=1e-3)


def residual(
    gram: torch.Tensor, moment: torch.Tensor, dense: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Squared distance to the dense output as a share of its square."""
    fitted = (weights[..., None, :] @ gram @ weights[..., None])[..., 0, 0]
    return (dense - 2 * (weights * moment).sum(-1) + fitted) / dense


@pytest.mark.parametrize("constrained", [False, True])
def test_a_real_models_weights_beat_their_neighbours(constrained: bool) -> None:
    statistics = collected()
    products = (statistics.gram, statistics.moment, statistics.dense)
    weights = fit_weights(*products[:2], constrained=constrained)
    best = residual(*products, weights)
    assert float(best.max()) < 0.1
    moves = torch.eye(NUM_WEIGHTS, dtype=torch.float64) * 0.2
    if constrained:
        moves[0, 1], moves[1, 0] = -0.2, -0.2
    for move in (*moves, *-moves):
        assert (residual(*products, weights + move) > best - 1e-6).all()


def test_a_head_that_loses_nothing_gets_the_prior() -> None:
    gram = torch.zeros(NUM_WEIGHTS, NUM_WEIGHTS, dtype=torch.float64)
    gram[:2, :2] = 7.0
    moment = torch.tensor([7.0, 7, 0, 0, 0], dtype=torch.float64)
    expected = torch.tensor([0.9, 0.1, 0.9, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(fit_weights(gram, moment), expected)
    torch.testing.assert_close(fit_weights(gram * 0, moment * 0), expected)


def test_counts_per_threshold_are_cumulated_and_divided_by_rows() -> None:
    statistics = collected()
    fitted = fit(statistics)
    assert fitted.lengths.tolist() == pytest.approx([112.5, 224.5, 448.5], abs=1.5)
    assert (float(fitted.log_probs[0]), float(fitted.log_probs[-1])) == (-20, 0)
    for index, log_prob in ((80, 0.0), (56, -6.0), (3, -19.25)):
        assert float(fitted.log_probs[index]) == log_prob
        first = round((log_prob + 20) * 16)
        expected = statistics.count[..., first:].sum(-1) / statistics.rows
        torch.testing.assert_close(fitted.kept[..., index], expected.float())
    assert not fitted.offsets.any()


def test_no_statistics() -> None:
    with pytest.raises(ValueError, match="no statistics"):
        fit(AttentionStatistics.empty(2, 4, 2, 512))


def test_a_layer_that_does_not_attend_counts_as_the_mean_of_the_others() -> None:
    alone = fit(collected())
    statistics = collected()
    mixed = AttentionStatistics.empty(3, 4, 2, 512)
    for name in ("count", "gram", "moment", "dense", "kept_mass"):
        getattr(mixed, name)[[0, 2]] = getattr(statistics, name)
    mixed.rows, mixed.row_tokens = statistics.rows, statistics.row_tokens
    fitted = fit(mixed)
    torch.testing.assert_close(fitted.kept.mean(0), alone.kept.mean(0))
    torch.testing.assert_close(fitted.weights[[0, 2]], alone.weights)
    torch.testing.assert_close(
        fitted.weights[1], torch.tensor([0.9, 0.1, 0.9, 0.0, 0.0]).expand(4, -1)
    )
