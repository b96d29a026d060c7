"""Statistics in, the tensors of a table out. Pure.

Counts per threshold are cumulated histograms. The weights of the compensation are least squares
against the dense output, drawn a little towards what most heads come to.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_toptheta.calibration.collect import (
    BINS_PER_UNIT,
    LOWEST_LOG_PROB,
    NUM_BINS,
    AttentionStatistics,
)

_STORED_BINS_PER_UNIT = 4
_PRIOR = (0.9, 0.1, 0.9, 0.0, 0.0)
"""Weights of a head about which the rows say nothing."""
_RIDGE = 1e-4


@dataclass(frozen=True)
class Fitted:
    """The tensors of a `ThresholdTable`; see there for shapes and units."""

    lengths: Tensor
    log_probs: Tensor
    kept: Tensor
    weights: Tensor
    offsets: Tensor


def fit(statistics: AttentionStatistics) -> Fitted:
    """Turn statistics into a table's tensors; offsets are 0.

    Layers that do not attend count as the mean of the others, so that means over all layers are
    those of the layers that do.

    Raises:
        ValueError: there are no statistics, or of fewer than two row lengths.
    """
    filled = statistics.rows > 0
    if int(filled.sum()) < 2:
        raise ValueError("there are no statistics to fit; the corpus gave no documents")
    rows = statistics.rows[filled]
    from_top = statistics.count[:, :, filled].flip(-1).cumsum(-1).flip(-1) / rows[:, None]
    stored = torch.arange(0, NUM_BINS + 1, BINS_PER_UNIT // _STORED_BINS_PER_UNIT)
    kept = from_top[..., stored]
    attends = kept.amax((1, 2, 3)) > 0
    kept[~attends] = kept[attends].mean(0)
    weights = fit_weights(statistics.gram, statistics.moment)
    return Fitted(
        lengths=(statistics.row_tokens[filled] / rows).float(),
        log_probs=(LOWEST_LOG_PROB + stored / BINS_PER_UNIT).float(),
        kept=kept.float(),
        weights=weights.float(),
        offsets=torch.zeros(statistics.count.shape[:2]),
    )


def fit_weights(gram: Tensor, moment: Tensor, *, constrained: bool = True) -> Tensor:
    """Weights of the compensation's terms whose sum comes closest to the dense output.

    Args:
        gram: [..., NUM_WEIGHTS, NUM_WEIGHTS] float64, products of the terms.
        moment: [..., NUM_WEIGHTS] float64, their products with the dense output.
        constrained: let the first two weights sum to 1, so that a row that loses nothing gets its
            dense output.

    Returns:
        [..., NUM_WEIGHTS] float64.
    """
    size = gram.shape[-1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    # A term that is zero everywhere takes its weight from the prior.
    scale = diagonal.clamp(min=1e-12 * diagonal.amax(-1, keepdim=True) + 1e-30)
    prior = torch.tensor(_PRIOR, dtype=gram.dtype)
    matrix = gram + _RIDGE * torch.diag_embed(scale)
    right = moment + _RIDGE * scale * prior
    # In units of each term's size, so that rare terms do not drown in rounding.
    unit = scale.sqrt()
    matrix, right = matrix / (unit[..., None] * unit[..., None, :]), right / unit
    if constrained:
        row = torch.zeros_like(unit)
        row[..., :2] = 1 / unit[..., :2]
        row = row / row.amax(-1, keepdim=True)
        total = 1 / (1 / unit[..., :2]).amax(-1)
        matrix = torch.cat([matrix, row[..., None, :]], dim=-2)
        column = torch.nn.functional.pad(row, (0, 1))
        matrix = torch.cat([matrix, column[..., None]], dim=-1)
        right = torch.cat([right, total[..., None]], dim=-1)
    solution: Tensor = torch.linalg.solve(matrix, right)
    return solution[..., :size] / unit
