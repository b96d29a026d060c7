"""Layers' attention over documents in, statistics out: memory constant in the number of tokens.

Two things are gathered from sampled rows. Histograms of log p say how many keys a row keeps at
every threshold; probabilities need no range, so that no text and no model can leave it. Normal
equations say how the mass that a row loses at `min_prob` is best given back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_toptheta.calibration.attention import AttentionCall, row_chunks
from vllm_toptheta.kernels.layout import NUM_WEIGHTS, group_size_of
from vllm_toptheta.kernels.reference import (
    Selection,
    compensated_output,
    select,
    weighted_values,
    whole_groups,
)

LOWEST_LOG_PROB = -20
BINS_PER_UNIT = 16
NUM_BINS = -LOWEST_LOG_PROB * BINS_PER_UNIT
SHORTEST_ROW = 128
GROUP_SIZE = group_size_of(64)
"""Of the compensation: that of every block size but the smallest."""
ROWS_PER_BUCKET = 64
"""Rows a document contributes to a bucket: neighbouring rows resemble one another, so more add
little."""
_FIT_BUCKETS = 2
"""Longest buckets whose rows the weights are fitted on; servers leave short rows dense."""


@dataclass
class AttentionStatistics:
    """Accumulated statistics of one model.

    Attributes:
        edges: [num_buckets] longest row of each bucket: octaves up to the documents' length. A
            bucket holds the last quarter of rows up to there.
        count: [num_layers, num_kv_heads, num_buckets, NUM_BINS + 1] float64, keys by the largest
            log p that a head of the group gives them: bin i starts at LOWEST_LOG_PROB + i /
            BINS_PER_UNIT. The last bin holds the keys that are always kept; those below the first
            are left out.
        rows: [num_buckets] float64, rows sampled, of every layer alike.
        row_tokens: [num_buckets] float64, sum of their lengths.
        gram: [num_layers, num_heads, NUM_WEIGHTS, NUM_WEIGHTS] float64, products of the terms of
            the compensation.
        moment: [num_layers, num_heads, NUM_WEIGHTS] float64, their products with the dense output.
        dense: [num_layers, num_heads] float64, the dense output's product with itself.
        kept_mass: [num_layers, num_heads] float64, sum of kept shares at min_prob.
        fit_rows: rows behind gram, moment, dense and kept_mass.
        windows: per layer, keys a row sees at most; None for all.
        num_tokens: tokens seen.
    """

    edges: Tensor
    count: Tensor
    rows: Tensor
    row_tokens: Tensor
    gram: Tensor
    moment: Tensor
    dense: Tensor
    kept_mass: Tensor
    fit_rows: int
    windows: list[int | None]
    num_tokens: int

    @classmethod
    def empty(
        cls, num_layers: int, num_heads: int, num_kv_heads: int, length: int
    ) -> "AttentionStatistics":
        """Statistics of nothing, for documents of up to `length` tokens.

        Raises:
            ValueError: the documents are too short for two buckets.
        """
        cls.check_length(length)
        num_buckets = math.floor(math.log2(length / SHORTEST_ROW)) + 1

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        return cls(
            edges=length // 2 ** torch.arange(num_buckets - 1, -1, -1),
            count=zeros(num_layers, num_kv_heads, num_buckets, NUM_BINS + 1),
            rows=zeros(num_buckets),
            row_tokens=zeros(num_buckets),
            gram=zeros(num_layers, num_heads, NUM_WEIGHTS, NUM_WEIGHTS),
            moment=zeros(num_layers, num_heads, NUM_WEIGHTS),
            dense=zeros(num_layers, num_heads),
            kept_mass=zeros(num_layers, num_heads),
            fit_rows=0,
            windows=[None] * num_layers,
            num_tokens=0,
        )

    @staticmethod
    def check_length(length: int) -> None:
        """Raise ValueError where documents are too short for two buckets."""
        if length < 2 * SHORTEST_ROW:
            raise ValueError(
                f"length {length} is too short, expected at least {2 * SHORTEST_ROW} tokens "
                "a document"
            )

    @property
    def num_buckets(self) -> int:
        return self.edges.numel()


class Share(NamedTuple):
    """What one tensor-parallel rank of one pipeline stage has collected.

    Attributes:
        rank: of its heads.
        layers: those that attend in this stage.
        statistics: of all layers, the others' empty, and of the rank's heads.
    """

    rank: int
    layers: list[int]
    statistics: AttentionStatistics


def merge(shares: Sequence[Share], num_heads: int, num_kv_heads: int) -> AttentionStatistics:
    """The statistics of a model out of those of its workers.

    Args:
        shares: one of every worker, at least one.
        num_heads, num_kv_heads: of the whole model.
    """
    first = shares[0].statistics
    total = AttentionStatistics.empty(
        len(first.windows), num_heads, num_kv_heads, int(first.edges[-1])
    )
    total.rows, total.row_tokens = first.rows, first.row_tokens
    total.fit_rows, total.num_tokens = first.fit_rows, first.num_tokens
    for rank, layers, part in shares:
        _, heads, _ = part.moment.shape
        kv_heads = part.count.shape[1]
        start, kv_start = rank * heads, rank * heads * num_kv_heads // num_heads
        for name in ("gram", "moment", "dense", "kept_mass"):
            getattr(total, name)[:, start : start + heads] += getattr(part, name)
        # Where ranks share a kv head, each counts by its own query heads: the mean is what they
        # keep when they serve.
        sharing = max(1, num_heads // heads * kv_heads // num_kv_heads)
        total.count[:, kv_start : kv_start + kv_heads] += part.count / sharing
        for layer in layers:
            total.windows[layer] = part.windows[layer]
    return total


@dataclass
class Collector:
    """Feeds layers' attention to `AttentionStatistics`, document by document.

    Attributes:
        statistics: what has been collected so far.
        min_prob: attention probability below which keys are dropped where the weights are fitted.
        seed: of the choice of rows.
    """

    statistics: AttentionStatistics
    min_prob: float
    seed: int = 0
    _generator: torch.Generator = field(init=False)
    _sample: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def start_document(self, length: int) -> None:
        """Choose the rows to look at of a document, whose layers follow.

        Args:
            length: its tokens, no more than the statistics' longest bucket.
        """
        statistics = self.statistics
        self._sample = self._choose_rows(length)
        for bucket, rows in enumerate(self._sample):
            statistics.rows[bucket] += rows.numel()
            statistics.row_tokens[bucket] += (rows + 1).sum()
        statistics.fit_rows += sum(rows.numel() for rows in self._sample[-_FIT_BUCKETS:])
        statistics.num_tokens += length

    def add(self, call: AttentionCall) -> None:
        """Add one layer of the document, float32."""
        self.statistics.windows[call.layer] = call.window
        for bucket, rows in enumerate(self._sample):
            fitted = bucket >= self.statistics.num_buckets - _FIT_BUCKETS
            for chunk, first_key in row_chunks(call, rows.to(call.query.device)):
                chosen = self._select(call, chunk, first_key)
                self._count(call.layer, bucket, chosen)
                if fitted:
                    value = call.value[first_key : int(chunk[-1]) + 1].float()
                    self._add_products(call.layer, chosen, value)

    def _choose_rows(self, num_rows: int) -> list[Tensor]:
        """Positions of the rows that feed each bucket: evenly spread, with a random offset."""
        sample = []
        for edge in self.statistics.edges.tolist():
            low, high = edge - edge // 4, min(edge, num_rows)
            wanted = min(ROWS_PER_BUCKET, max(0, high - low))
            jitter = torch.rand(wanted, generator=self._generator, dtype=torch.float64)
            step = (high - low) / max(1, wanted)
            sample.append(low + ((torch.arange(wanted) + jitter) * step).long())
        return sample

    def _select(self, call: AttentionCall, rows: Tensor, first_key: int) -> Selection:
        num_kv_heads = call.key.shape[1]
        threshold = torch.full((num_kv_heads, len(rows)), math.log(self.min_prob))
        scores = call.scores(rows, first_key).float()
        return select(scores, threshold.to(scores), 0.0, group_size=GROUP_SIZE, sinks=call.sinks)

    def _count(self, layer: int, bucket: int, chosen: Selection) -> None:
        num_kv_heads = chosen.kept.shape[0]
        probs = chosen.probs.unflatten(0, (num_kv_heads, -1))
        best = probs == probs.amax(-1, keepdim=True)
        whole = whole_groups(chosen.visible, GROUP_SIZE).repeat_interleave(GROUP_SIZE, -1)
        always = (best.any(1) | ~whole[:, : probs.shape[-1]]) & chosen.visible
        wanted = probs.amax(1).log()
        # Bin 0 takes what counts nowhere; the hidden keys, whose logarithm is -inf, too.
        bins = ((wanted - LOWEST_LOG_PROB) * BINS_PER_UNIT).floor().clamp(-1, NUM_BINS - 1).long()
        bins = bins.masked_fill_(always, NUM_BINS) + 1
        bins += torch.arange(num_kv_heads, device=bins.device)[:, None, None] * (NUM_BINS + 2)
        added = torch.bincount(bins.flatten(), minlength=num_kv_heads * (NUM_BINS + 2))
        self.statistics.count[layer, :, bucket] += added.view(num_kv_heads, -1)[:, 1:].cpu()

    def _add_products(self, layer: int, chosen: Selection, value: Tensor) -> None:
        num_heads = chosen.probs.shape[0]
        terms = torch.stack(
            [
                compensated_output(chosen, value, one.expand(num_heads, -1), group_size=GROUP_SIZE)
                for one in torch.eye(NUM_WEIGHTS, device=value.device)
            ],
            dim=-1,
        )  # [num_rows, num_heads, head_dim, NUM_WEIGHTS]
        dense = weighted_values(chosen.probs, value).transpose(0, 1).flatten(1).double()
        flat = terms.transpose(0, 1).flatten(1, 2).double()
        statistics = self.statistics
        statistics.gram[layer] += (flat.transpose(1, 2) @ flat).cpu()
        statistics.moment[layer] += (dense[:, None] @ flat)[:, 0].cpu()
        statistics.dense[layer] += dense.square().sum(-1).cpu()
        statistics.kept_mass[layer] += chosen.kept_mass.sum(-1).double().cpu()
