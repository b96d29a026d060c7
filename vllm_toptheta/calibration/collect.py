"""A model and documents in, score statistics out: one pass, memory constant in the number of
tokens.

For every layer, head and bucket of row lengths a histogram over the score holds how many keys a row
has there and how much probability mass they carry. That answers every k: theta(k) is where the keys
above it number k on average.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vllm_toptheta.calibration.attention import (
    AttentionCall,
    dense_attention,
    pruned_attention,
    replaced_attention,
)
from vllm_toptheta.kernels.reference import attention_weights, select_top_k

NUM_BINS = 512
BUCKETS_PER_OCTAVE = 4
SHORTEST_ROW = 16
_ROWS_PER_BUCKET = 32
"""Rows a document contributes to a bucket: neighbouring rows resemble one another, so more add
little.
"""
_RANGE_ROWS = 64
_RANGE_MARGIN = 0.25


@dataclass
class ScoreStatistics:
    """Accumulated histograms of one model.

    Bin 0 is the lowest; scores below or above the range count in the end bins.

    Attributes:
        edges: [num_buckets + 1] row lengths, bucket b holds edges[b] < length <= edges[b + 1].
        low: [num_layers, num_heads] float64, lower end of bin 0, units of q.k * sm_scale.
        width: [num_layers, num_heads] float64, width of a bin.
        count: [num_layers, num_heads, num_buckets, num_bins] float64, keys.
        mass: the same shape, their probability.
        rows: [num_buckets] float64, rows sampled, of every layer alike.
        row_tokens: [num_buckets] float64, sum of their lengths.
        clipped: keys above the range; those lie in the top bin, whose theta is not to be trusted.
        windows: per layer, keys a row sees at most; None for all.
        num_tokens: tokens seen.
    """

    edges: Tensor
    low: Tensor
    width: Tensor
    count: Tensor
    mass: Tensor
    rows: Tensor
    row_tokens: Tensor
    clipped: float
    windows: list[int | None]
    num_tokens: int

    @classmethod
    def empty(cls, num_layers: int, num_heads: int, length: int) -> "ScoreStatistics":
        """Statistics of nothing, for documents of up to `length` tokens.

        Raises:
            ValueError: the documents are too short for two buckets.
        """
        num_buckets = math.ceil(math.log2(length / SHORTEST_ROW) * BUCKETS_PER_OCTAVE)
        if num_buckets < 2:
            raise ValueError(
                f"length {length} is too short, expected at least {2 * SHORTEST_ROW} tokens "
                "a document"
            )
        octaves = torch.arange(-num_buckets, 1, dtype=torch.float64) / BUCKETS_PER_OCTAVE
        shape = (num_layers, num_heads, num_buckets, NUM_BINS)
        return cls(
            edges=(length * octaves.exp2()).floor().long(),
            low=torch.zeros(num_layers, num_heads, dtype=torch.float64),
            width=torch.zeros(num_layers, num_heads, dtype=torch.float64),
            count=torch.zeros(shape, dtype=torch.float64),
            mass=torch.zeros(shape, dtype=torch.float64),
            rows=torch.zeros(num_buckets, dtype=torch.float64),
            row_tokens=torch.zeros(num_buckets, dtype=torch.float64),
            clipped=0.0,
            windows=[None] * num_layers,
            num_tokens=0,
        )

    @property
    def num_buckets(self) -> int:
        return self.edges.numel() - 1

    @property
    def clipped_fraction(self) -> float:
        """Fraction of the sampled keys that scored above the histogram's range."""
        return self.clipped / max(1.0, float(self.count.sum()))


@dataclass
class Collector:
    """Feeds a model's attention to `ScoreStatistics`, document by document.

    Attributes:
        model: a causal language model in eval mode.
        statistics: what has been collected so far.
        tac_k: let every layer output its compensated top tac_k, as inference will (top-k at
            calibration); 0 leaves the model dense.
        group_size: tokens per compensation group of that output.
        seed: of the choice of rows.
    """

    model: PreTrainedModel
    statistics: ScoreStatistics
    tac_k: int
    group_size: int
    seed: int = 0
    _generator: torch.Generator = field(init=False)
    _sample: list[Tensor] = field(init=False, default_factory=list)
    _seen_layers: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def run(
        self, documents: Iterable[Tensor], report: Callable[[int], object] | None = None
    ) -> None:
        """Add documents to the statistics.

        Args:
            documents: token ids, [length] int64 each, none longer than the statistics' longest
                bucket.
            report: told the number of tokens after each document.

        Raises:
            ValueError: the model has layers that do not attend, or an attention that cannot be
                calibrated.
        """
        for document in documents:
            self._sample = self._choose_rows(document.numel())
            self._seen_layers.clear()
            with replaced_attention(self.model, self._attend), torch.inference_mode():
                # Without the language model's head: nobody reads the logits.
                self.model.base_model(document[None].to(self.model.device), use_cache=False)
            if missing := set(range(len(self.statistics.windows))) - self._seen_layers:
                raise ValueError(
                    f"layers {sorted(missing)} did not attend; models with such layers are "
                    "unsupported"
                )
            for bucket, rows in enumerate(self._sample):
                self.statistics.rows[bucket] += rows.numel()
                self.statistics.row_tokens[bucket] += (rows + 1).sum()
            self.statistics.num_tokens += document.numel()
            if report is not None:
                report(document.numel())

    def _choose_rows(self, num_rows: int) -> list[Tensor]:
        """Positions of the rows that feed each bucket: evenly spread, with a random offset."""
        sample = []
        for low, high in zip(
            self.statistics.edges[:-1].tolist(), self.statistics.edges[1:].tolist(), strict=True
        ):
            high = min(high, num_rows)
            wanted = min(_ROWS_PER_BUCKET, max(0, high - low))
            jitter = torch.rand(wanted, generator=self._generator, dtype=torch.float64)
            sample.append(
                low + ((torch.arange(wanted) + jitter) * ((high - low) / max(1, wanted))).long()
            )
        return sample

    def _attend(self, call: AttentionCall) -> Tensor:
        self._seen_layers.add(call.layer)
        self.statistics.windows[call.layer] = call.window
        if not self.statistics.width[call.layer].any():
            self._set_range(call)
        for bucket, rows in enumerate(self._sample):
            if rows.numel():
                self._add(call, bucket, rows.to(call.query.device))
        if not self.tac_k:
            return dense_attention(call)
        return pruned_attention(
            call,
            lambda scores, _: select_top_k(scores, self.tac_k),
            group_size=self.group_size,
        )

    def _set_range(self, call: AttentionCall) -> None:
        """Fix the histogram's range by some rows of the first document, with a margin."""
        rows = torch.linspace(0, call.num_rows - 1, min(_RANGE_ROWS, call.num_rows)).long()
        rows = torch.unique_consecutive(rows)
        scores = call.scores(rows.to(call.query.device)).double().flatten(1)
        visible = scores > -math.inf
        low = scores.masked_fill(~visible, math.inf).amin(-1)
        high = scores.amax(-1)
        margin = (high - low).clamp(min=1e-3) * _RANGE_MARGIN
        self.statistics.low[call.layer] = (low - margin).cpu()
        self.statistics.width[call.layer] = ((high - low + 2 * margin) / NUM_BINS).cpu()

    def _add(self, call: AttentionCall, bucket: int, rows: Tensor) -> None:
        first_key = 0 if call.window is None else max(0, int(rows[0]) + 1 - call.window)
        scores = call.scores(rows, first_key).float()
        weights = attention_weights(
            scores,
            torch.ones((), dtype=torch.bool, device=scores.device),
            group_size=None,
            sinks=call.sinks,
        )
        low = self.statistics.low[call.layer].to(scores)
        width = self.statistics.width[call.layer].to(scores)
        bins = (scores - low[:, None, None]) / width[:, None, None]
        self.statistics.clipped += float((bins >= NUM_BINS).sum())
        # Bin NUM_BINS takes the hidden keys and is dropped.
        bins = bins.clamp(0, NUM_BINS - 1).long().masked_fill_(scores == -math.inf, NUM_BINS)
        bins += torch.arange(call.num_heads, device=bins.device)[:, None, None] * (NUM_BINS + 1)
        size = call.num_heads * (NUM_BINS + 1)
        for total, added in (
            (self.statistics.count, torch.bincount(bins.flatten(), minlength=size)),
            (
                self.statistics.mass,
                torch.bincount(bins.flatten(), weights.flatten(), minlength=size),
            ),
        ):
            total[call.layer, :, bucket] += added.view(call.num_heads, -1)[:, :-1].cpu()
