"""Score statistics in, thresholds out; pure arithmetic.

A level's k is divided among heads so that the least probability mass is lost: every head's loss as
a function of its budget is known, and one Lagrange multiplier over the convex hulls of those curves
solves it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vllm_toptheta.calibration.collect import ScoreStatistics
from vllm_toptheta.thresholds import KEEP_ALL

LEVELS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_LONGEST_SHARE = 0.5
"""A head's budget stays below this share of the longest row, so that the last knot always has a
measured theta.
"""
_BUDGETS_PER_OCTAVE = 4
_SMALLEST_BUDGET = 2.0
_SLOPE_OCTAVES = 2.0
_SLOPE_MIN_RATIO = 2.0
"""Knots of rows shorter than this many budgets say nothing about long rows: theta dives there."""
_SLOPE_SHARE = 0.5
"""Theta flattens as rows grow: half the trend predicts counts at 2 to 4 times the length best."""
_ALLOCATION_OCTAVES = 2.0


@dataclass(frozen=True)
class FittedThresholds:
    """The tensors of a `ThresholdTable`; see there for shapes and units."""

    levels: Tensor
    lengths: Tensor
    theta: Tensor
    slope: Tensor
    head_k: Tensor
    lost_mass: Tensor


@dataclass(frozen=True)
class _Curves:
    """Kept keys and mass as functions of the threshold, from the highest bin's upper edge down.

    Attributes:
        count: [num_layers, num_heads, num_buckets, num_bins + 1], keys of a row above the edge,
            mean over rows.
        mass: the same shape, their probability.
        top: [num_layers, num_heads], the highest edge.
        width: [num_layers, num_heads], distance of edges.
        lengths: [num_buckets], mean row length.
    """

    count: Tensor
    mass: Tensor
    top: Tensor
    width: Tensor
    lengths: Tensor


def fit(
    statistics: ScoreStatistics,
    allocation: Literal["lost_mass", "uniform"] = "lost_mass",
    levels: tuple[int, ...] = LEVELS,
) -> FittedThresholds:
    """Turn statistics into thresholds.

    Args:
        statistics: what `collect` gathered.
        allocation: "lost_mass" divides a level's k among heads; "uniform" gives every head the
            level's k.
        levels: mean k's to fit; those that the documents were too short for are left out.

    Raises:
        ValueError: no level fits the documents' length, or there are no statistics.
    """
    curves = _curves(statistics)
    cap = _budget_caps(statistics, curves)
    usable = [level for level in levels if level <= float(cap.mean()) * 0.9]
    if not usable:
        raise ValueError(
            f"no k fits documents whose rows have at most {float(curves.lengths[-1]):.0f} tokens; "
            "give a larger --length"
        )
    if allocation == "lost_mass":
        head_k = allocate(*_loss_curves(curves, cap), torch.tensor(usable, dtype=torch.float64))
    else:
        head_k = (
            torch.tensor(usable, dtype=torch.float64)[:, None, None].expand(-1, *cap.shape).clone()
        )
    theta, lost = _invert(curves, head_k)
    theta = _smooth(theta)
    slope = _slopes(theta, head_k, curves.lengths, statistics.windows)
    # Noise, smoothing and interpolation must not make a larger budget keep less.
    theta = theta.cummin(0).values
    weight = _allocation_weights(curves)
    return FittedThresholds(
        levels=torch.tensor(usable, dtype=torch.float32),
        lengths=curves.lengths.float(),
        theta=theta.float(),
        slope=slope.float(),
        head_k=head_k.float(),
        lost_mass=(lost * weight).sum(-1).clamp(0, 1).float(),
    )


def allocate(budgets: Tensor, losses: Tensor, levels: Tensor) -> Tensor:
    """Divide mean budgets so that the sum of losses is least.

    Args:
        budgets: [num_budgets] ascending.
        losses: [num_layers, num_heads, num_budgets], loss of a head at a budget; repeat the last
            value where a head cannot use more.
        levels: [num_levels] mean budgets.

    Returns:
        [num_levels, num_layers, num_heads]; grows with the level, its mean is the level unless no
        head gains from more.
    """
    num_layers, num_heads, _ = losses.shape
    gains = _hull_gains(budgets, losses.flatten(0, 1))
    widths = budgets.diff().expand_as(gains)
    # Gains fall along a head's hull, so a stable sort fills each head's segments in order.
    order = gains.flatten().argsort(descending=True, stable=True)
    filled_before = widths.flatten()[order].cumsum(0) - widths.flatten()[order]
    result = []
    for level in levels.tolist():
        total = (level - float(budgets[0])) * num_layers * num_heads
        filled = torch.empty_like(filled_before)
        filled[order] = torch.minimum((total - filled_before).clamp(min=0), widths.flatten()[order])
        result.append(budgets[0] + filled.view_as(gains).sum(-1))
    return torch.stack(result).view(-1, num_layers, num_heads)


def _hull_gains(budgets: Tensor, losses: Tensor) -> Tensor:
    """Loss saved per key on every segment of a curve's lower convex hull, [num_curves, num_budgets
    - 1], falling.
    """
    budget = budgets.tolist()
    rows = []
    for loss in losses.tolist():
        hull = [0]
        for point in range(1, len(budget)):
            while len(hull) > 1:
                a, b = hull[-2], hull[-1]
                if (loss[b] - loss[a]) * (budget[point] - budget[b]) < (loss[point] - loss[b]) * (
                    budget[b] - budget[a]
                ):
                    break
                hull.pop()
            hull.append(point)
        gains: list[float] = []
        for a, b in zip(hull[:-1], hull[1:], strict=True):
            gains += [(loss[a] - loss[b]) / (budget[b] - budget[a])] * (b - a)
        rows.append(gains)
    return torch.tensor(rows, dtype=torch.float64)


def _curves(statistics: ScoreStatistics) -> _Curves:
    if not float(statistics.rows.sum()):
        raise ValueError("there are no statistics to fit; the corpus gave no documents")
    filled = statistics.rows > 0
    rows = statistics.rows[filled]

    def accumulated(histogram: Tensor) -> Tensor:
        from_top = (histogram[:, :, filled] / rows[:, None]).flip(-1).cumsum(-1)
        return torch.nn.functional.pad(from_top, (1, 0))

    count = accumulated(statistics.count)
    return _Curves(
        count=count,
        mass=accumulated(statistics.mass),
        top=statistics.low + statistics.width * statistics.count.shape[-1],
        width=statistics.width,
        lengths=statistics.row_tokens[filled] / rows,
    )


def _budget_caps(statistics: ScoreStatistics, curves: _Curves) -> Tensor:
    """[num_layers, num_heads], the largest budget a head can use."""
    longest = float(curves.lengths[-1])
    caps = [
        longest * _LONGEST_SHARE if window is None else min(window, longest * _LONGEST_SHARE)
        for window in statistics.windows
    ]
    return torch.tensor(caps, dtype=torch.float64)[:, None].expand_as(curves.top)


def _allocation_weights(curves: _Curves) -> Tensor:
    """[num_buckets], weights of the row lengths whose loss counts: the longest octaves."""
    weight = (curves.lengths >= curves.lengths[-1] / 2**_ALLOCATION_OCTAVES).double()
    return weight / weight.sum()


def _loss_curves(curves: _Curves, cap: Tensor) -> tuple[Tensor, Tensor]:
    """Budgets [num_budgets] and every head's lost mass there, [num_layers, num_heads,
    num_budgets].
    """
    steps = math.ceil(math.log2(float(cap.max()) / _SMALLEST_BUDGET) * _BUDGETS_PER_OCTAVE)
    budgets = _SMALLEST_BUDGET * (float(cap.max()) / _SMALLEST_BUDGET) ** (
        torch.arange(steps + 1, dtype=torch.float64) / steps
    )
    weight = _allocation_weights(curves)
    losses = torch.stack(
        [
            (_invert(curves, torch.minimum(budget, cap)[None])[1][0] * weight).sum(-1)
            for budget in budgets
        ],
        dim=-1,
    )
    return budgets, losses


def _invert(curves: _Curves, head_k: Tensor) -> tuple[Tensor, Tensor]:
    """Theta that keeps head_k keys of a row on average, and the mass lost below it.

    Args:
        curves: kept keys and mass per threshold.
        head_k: [num_levels, num_layers, num_heads].

    Returns:
        Two [num_levels, num_layers, num_heads, num_buckets]; KEEP_ALL and 0 where rows are no
        longer than head_k.
    """
    thetas, losses = [], []
    for budget in head_k:
        wanted = budget[..., None, None].expand(*curves.count.shape[:-1], 1).contiguous()
        upper = torch.searchsorted(curves.count, wanted).clamp(1, curves.count.shape[-1] - 1)
        below, above = curves.count.gather(-1, upper - 1), curves.count.gather(-1, upper)
        part = ((wanted - below) / (above - below).clamp(min=1e-12)).clamp(0, 1)
        mass = torch.lerp(
            curves.mass.gather(-1, upper - 1), curves.mass.gather(-1, upper), part
        ).squeeze(-1)
        theta = curves.top[..., None] - (upper - 1 + part).squeeze(-1) * curves.width[..., None]
        everything = curves.count[..., -1] <= budget[..., None]
        thetas.append(theta.masked_fill(everything, KEEP_ALL))
        losses.append((curves.mass[..., -1] - mass).clamp(min=0).masked_fill(everything, 0.0))
    return torch.stack(thetas), torch.stack(losses)


def _smooth(theta: Tensor) -> Tensor:
    """Average neighbouring knots 1:2:1 where all three are measured; the ends stay as they are."""
    smooth = theta.clone()
    if theta.shape[-1] >= 3:
        left, middle, right = theta[..., :-2], theta[..., 1:-1], theta[..., 2:]
        measured = (left > KEEP_ALL) & (middle > KEEP_ALL) & (right > KEEP_ALL)
        smooth[..., 1:-1] = torch.where(measured, (left + 2 * middle + right) / 4, middle)
    return smooth


def _slopes(theta: Tensor, head_k: Tensor, lengths: Tensor, windows: list[int | None]) -> Tensor:
    """Expected change of theta per doubling of the length past the last knot; 0 behind a window.

    A damped least-squares trend over the longest rows.

    Args:
        theta: [num_levels, num_layers, num_heads, num_buckets].
        head_k: [num_levels, num_layers, num_heads].
        lengths: [num_buckets].
        windows: per layer, None for none.

    Returns:
        [num_levels, num_layers, num_heads], not growing with the level.
    """
    position = lengths.log2()
    tail = (position >= position[-1] - _SLOPE_OCTAVES) & (theta > KEEP_ALL)
    tail = tail & (lengths >= _SLOPE_MIN_RATIO * head_k[..., None])
    weight = tail.double()
    total = weight.sum(-1, keepdim=True).clamp(min=1)
    deviation = (position - (weight * position).sum(-1, keepdim=True) / total) * weight
    measured = theta.masked_fill(~tail, 0.0)
    slope = (deviation * measured).sum(-1) / (deviation * deviation).sum(-1).clamp(min=1e-9)
    # Few knots say little about a trend.
    slope = slope.masked_fill(weight.sum(-1) < 3, 0.0) * _SLOPE_SHARE
    for layer, window in enumerate(windows):
        if window is not None and window < float(lengths[-1]):
            slope[:, layer] = 0.0
    # Levels must not cross beyond the last knot: the mean of the two nearest monotone bounds.
    falling = slope.cummin(0).values
    rising = slope.flip(0).cummax(0).values.flip(0)
    return (falling + rising) / 2
