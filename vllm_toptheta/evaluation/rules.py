"""What a row keeps, by Top-theta's rule and by those of its rivals, each as one class that attends
and counts: what `evaluate fidelity` compares.

Everything runs in float32 whatever the model's dtype, as kernels accumulate in it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from vllm_toptheta.calibration.attention import AttentionCall, row_chunks
from vllm_toptheta.kernels import reference
from vllm_toptheta.kernels.layout import PROMPT_WEIGHTS, RENORMALISE, UNCALIBRATED_WEIGHTS
from vllm_toptheta.kernels.reference import Selection
from vllm_toptheta.kernels.sketch import parts_of, sketch_of, sketched_scores
from vllm_toptheta.thresholds import ThresholdTable

GROUP_SIZE = 64
_QUEST_PAGE, _BLASST_TILE, _SINK_KEYS = 16, 64, 4


@dataclass
class Tally:
    """Counts over all layers, rows and heads.

    Attributes:
        rows: (row, query head) pairs.
        pruned: of these, those that kept fewer keys than they saw.
        lifted: of these, those whose threshold `min_mass` lowered.
        keys, kept: keys seen and kept by query heads.
        v_seen, v_read: V rows of kv heads, seen and kept by any head of the group.
        mass: sum of kept shares.
    """

    rows: int = 0
    pruned: int = 0
    lifted: int = 0
    keys: int = 0
    kept: int = 0
    v_seen: int = 0
    v_read: int = 0
    mass: float = 0.0

    def add(self, selection: Selection, num_kv_heads: int) -> None:
        """Count some rows; `selection.kept` may be per query head or per kv head."""
        kept, probs = selection.kept, selection.probs
        num_heads, num_rows = probs.shape[:2]
        repeat = num_heads // kept.shape[0]
        visible = selection.visible.sum(-1)
        per_head = kept.sum(-1)
        self.rows += num_heads * num_rows
        self.pruned += int((per_head < visible).sum()) * repeat
        self.lifted += int((selection.lifts > 0).sum()) * (num_heads // num_kv_heads)
        self.keys += int(visible.sum()) * num_heads
        self.kept += int(per_head.sum()) * repeat
        self.v_seen += int(visible.sum()) * num_kv_heads
        self.v_read += int(kept.unflatten(0, (num_kv_heads, -1)).any(1).sum())
        self.mass += float(selection.kept_mass.sum())


@dataclass
class Rule(ABC):
    """Attention of rows that keep some of their keys.

    Attributes:
        v_row_bytes: bytes of a V row that is read, over those of a bfloat16 one.
        tally: what has been counted.
    """

    v_row_bytes: ClassVar[float] = 1
    tally: Tally = field(default_factory=Tally, init=False)

    @property
    @abstractmethod
    def name(self) -> str:
        """How results call it."""

    @abstractmethod
    def select(self, call: AttentionCall, scores: Tensor, rows: Tensor) -> Selection:
        """What rows keep.

        Args:
            call: the layer.
            scores: [num_heads, n, num_keys] float32, -inf where hidden.
            rows: [n] positions.
        """

    def scores(self, call: AttentionCall, rows: Tensor, first_key: int) -> Tensor:
        """`call.scores`, as the rule computes them."""
        return call.scores(rows, first_key)

    def weights(self, call: AttentionCall) -> Tensor:
        """[num_heads, NUM_WEIGHTS] of the compensation; none: the kept keys are renormalised."""
        return torch.tensor(RENORMALISE).expand(call.num_heads, -1)

    def __call__(self, call: AttentionCall) -> Tensor:
        """Compute one layer, [num_rows, num_heads, head_dim]."""
        output = torch.empty_like(call.query)
        key, value, query = call.key.float(), call.value.float(), call.query.float()
        wide = AttentionCall(**{**vars(call), "query": query, "key": key, "value": value})
        for rows, first_key in row_chunks(wide, torch.arange(call.first_row, len(key))):
            selection = self.select(wide, self.scores(wide, rows, first_key), rows)
            self.tally.add(selection, key.shape[1])
            output[rows - call.first_row] = reference.compensated_output(
                selection,
                value[first_key : int(rows[-1]) + 1],
                self.weights(call),
                group_size=GROUP_SIZE,
            ).to(output)
        return output


def kept_by_head(call: AttentionCall, scores: Tensor, kept: Tensor) -> Selection:
    """A selection of lists per query head, [num_heads, n, num_keys] bool; the best key is kept."""
    visible = (scores > -math.inf)[0]
    kept = kept.scatter(-1, scores.argmax(-1, keepdim=True), True) & visible
    probs = reference.softmax(scores, call.sinks)
    share = (probs * kept).sum(-1) / probs.sum(-1)
    lifts = torch.zeros(call.key.shape[1], len(visible), dtype=torch.int64)
    return Selection(kept, probs, share, lifts, visible)


class Dense(Rule):
    """Every key."""

    @property
    def name(self) -> str:
        return "dense"

    def select(self, call: AttentionCall, scores: Tensor, rows: Tensor) -> Selection:
        return kept_by_head(call, scores, torch.ones_like(scores, dtype=torch.bool))


@dataclass
class TopTheta(Rule):
    """The product's rule for decode rows.

    Attributes:
        min_prob: attention probability below which a key is dropped; None where k rules.
        k: keys a row keeps per kv head on average, by the table; None where min_prob rules.
        min_mass: floor on the kept share of a head.
        table: weights, offsets and curves; None for the defaults.
        min_kv_len: rows of at most so many keys are dense.
    """

    min_prob: float | None
    k: float | None
    min_mass: float
    table: ThresholdTable | None
    min_kv_len: int = 0

    def __post_init__(self) -> None:
        self._curve = self.table.curve_at_k(self.k) if self.table and self.k else None

    @property
    def name(self) -> str:
        return "toptheta" if self.table else "toptheta:no-table"

    def weights(self, call: AttentionCall) -> Tensor:
        if self.table is None:
            return torch.tensor(UNCALIBRATED_WEIGHTS).expand(call.num_heads, -1)
        return self.table.weights[call.layer]

    def select(self, call: AttentionCall, scores: Tensor, rows: Tensor) -> Selection:
        num_kv_heads = call.key.shape[1]
        visible = rows + 1 if call.window is None else (rows + 1).clamp(max=call.window)
        if self._curve is not None and self.table is not None:
            threshold = self.table.lookup(self._curve, visible)
        else:
            threshold = torch.full((len(rows),), math.log(self.min_prob or 1))
        threshold = threshold.expand(num_kv_heads, -1)
        if self.table is not None:
            threshold = threshold + self.table.offsets[call.layer][:, None]
        threshold = threshold.masked_fill(visible <= self.min_kv_len, -math.inf)
        return reference.select(
            scores, threshold, self.min_mass, group_size=GROUP_SIZE, sinks=call.sinks
        )


@dataclass
class SketchedTopTheta(TopTheta):
    """The same where rows scan the sketch of K.

    Attributes:
        log_z_error: sum over rows and heads of how much the logarithm of the softmax denominator is
            off.
    """

    log_z_error: float = field(default=0.0, init=False)
    _sketch: tuple[AttentionCall, Tensor, Tensor] | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        return super().name + ":k-sketch"

    def scores(self, call: AttentionCall, rows: Tensor, first_key: int) -> Tensor:
        if self._sketch is None or self._sketch[0] is not call:
            keys = call.key[: len(call.key) // GROUP_SIZE * GROUP_SIZE].transpose(0, 1)
            sketch = sketch_of(keys.unflatten(1, (-1, GROUP_SIZE)))
            parts = parts_of(sketch).flatten(1, 2).transpose(0, 1).float()
            # Keys of the last group, which no row sees as a whole.
            parts = torch.nn.functional.pad(parts, (0, 0, 0, 0, 0, len(call.key) - len(parts)))
            self._sketch = (call, parts, sketch.bounds.transpose(0, 1))
        _, parts, bounds = self._sketch
        exact, end = super().scores(call, rows, first_key), int(rows[-1]) + 1
        scores = sketched_scores(
            call.query[rows - call.first_row],
            call.key[first_key:end],
            parts[first_key:end],
            bounds[first_key // GROUP_SIZE :],
            rows + 1 - first_key,
            group_size=GROUP_SIZE,
            sm_scale=call.sm_scale,
            window=call.window,
            soft_cap=call.soft_cap,
        )
        self.log_z_error += float((scores.logsumexp(-1) - exact.logsumexp(-1)).abs().sum())
        return scores


@dataclass
class TopK(Rule):
    """The k best keys of every row and query head, renormalised."""

    k: int

    @property
    def name(self) -> str:
        return f"top_k:{self.k}"

    def select(self, call: AttentionCall, scores: Tensor, rows: Tensor) -> Selection:
        return kept_by_head(call, scores, reference.select_top_k(scores, self.k))


@dataclass
class Nucleus(Rule):
    """The best keys that hold a share of the mass (Twilight, arXiv 2502.02770), renormalised."""

    share: float

    @property
    def name(self) -> str:
        return f"nucleus:{self.share:g}"

    def select(self, call: AttentionCall, scores: Tensor, rows: Tensor) -> Selection:
        ordered, index = reference.softmax(scores, call.sinks).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, before < self.share)
        return kept_by_head(call, scores, kept)


@dataclass
class Quest(Rule):
    """Pages of 16 keys with the best upper bounds, first and last page included, renormalised
    (arXiv 2406.10774)."""

    keys: int

    @property
    def name(self) -> str:
        return f"quest:{self.keys}"

    def select(self, call: AttentionCall, scores: Tensor, rows: Tensor) -> Selection:
        num_heads, num_rows, num_keys = scores.shape
        first = int(rows[-1]) + 1 - num_keys
        num_kv_heads = call.key.shape[1]
        key = call.key[first : first + num_keys].transpose(0, 1)
        pages = torch.nn.functional.pad(key, (0, 0, 0, -num_keys % _QUEST_PAGE))
        pages = pages.unflatten(1, (-1, _QUEST_PAGE))
        query = call.query[rows - call.first_row].transpose(0, 1).unflatten(0, (num_kv_heads, -1))
        bound = query.clamp(min=0) @ pages.amax(2).transpose(1, 2)[:, None]
        bound = bound + query.clamp(max=0) @ pages.amin(2).transpose(1, 2)[:, None]
        bound = bound.amax(1)  # one choice for the group
        visible = (scores > -math.inf)[0]
        padded = torch.nn.functional.pad(visible, (0, -num_keys % _QUEST_PAGE))
        of_page = padded.unflatten(-1, (-1, _QUEST_PAGE)).any(-1)
        bound = bound.masked_fill(~of_page, -math.inf)
        last = ((rows - first) // _QUEST_PAGE).view(1, -1, 1).expand(num_kv_heads, -1, 1)
        bound[..., 0] = math.inf
        bound.scatter_(-1, last, math.inf)
        chosen = reference.select_top_k(bound, max(1, self.keys // _QUEST_PAGE))
        kept = chosen.repeat_interleave(_QUEST_PAGE, -1)[..., :num_keys]
        kept = kept.repeat_interleave(num_heads // num_kv_heads, 0)
        return kept_by_head(call, scores, kept)


@dataclass
class Blasst(Rule):
    """Skip-softmax (arXiv 2512.12087): tiles of 64 keys whose maximum is below the running one by a
    factor are dropped, renormalised."""

    threshold: float

    @property
    def name(self) -> str:
        return f"blasst:{self.threshold:g}"

    def select(self, call: AttentionCall, scores: Tensor, rows: Tensor) -> Selection:
        pad = (0, -scores.shape[-1] % _BLASST_TILE)
        tiles = torch.nn.functional.pad(scores, pad, value=-math.inf)
        best = tiles.unflatten(-1, (-1, _BLASST_TILE)).amax(-1)
        kept = best >= best.cummax(-1).values + math.log(self.threshold)
        kept = kept.repeat_interleave(_BLASST_TILE, -1)[..., : scores.shape[-1]]
        return kept_by_head(call, scores, kept)


@dataclass
class Window(Rule):
    """The first four keys and the last ones (StreamingLLM, arXiv 2309.17453), renormalised."""

    keys: int

    @property
    def name(self) -> str:
        return f"window:{self.keys}"

    def select(self, call: AttentionCall, scores: Tensor, rows: Tensor) -> Selection:
        position = torch.arange(scores.shape[-1]) + int(rows[-1]) + 1 - scores.shape[-1]
        kept = (position < _SINK_KEYS) | (position > rows[:, None] - self.keys)
        return kept_by_head(call, scores, kept.expand_as(scores))


@dataclass
class Paper(Rule):
    """The paper's absolute thresholds: per layer and head the mean k-th best score of earlier rows
    of the same text, exact denominators, lost mass to the groups' means.

    Attributes:
        k: keys a row is to keep.
    """

    k: int
    _theta: dict[int, Tensor] = field(default_factory=dict, init=False)

    @property
    def name(self) -> str:
        return f"paper:{self.k}"

    def observe(self, call: AttentionCall) -> None:
        """Calibrate on a layer's rows."""
        rows = torch.arange(call.first_row, call.key.shape[0])
        best = call.scores(rows).float().topk(min(self.k, int(rows[0]) + 1), -1).values
        self._theta[call.layer] = best[..., -1].mean(-1)

    def weights(self, call: AttentionCall) -> Tensor:
        return torch.tensor(PROMPT_WEIGHTS).expand(call.num_heads, -1)

    def select(self, call: AttentionCall, scores: Tensor, rows: Tensor) -> Selection:
        chosen = kept_by_head(call, scores, scores >= self._theta[call.layer][:, None, None])
        # Groups that a row sees in part have no mean.
        whole = reference.whole_groups(chosen.visible, GROUP_SIZE).repeat_interleave(GROUP_SIZE, -1)
        kept = chosen.kept | (chosen.visible & ~whole[:, : scores.shape[-1]])
        share = (chosen.probs * kept).sum(-1) / chosen.probs.sum(-1)
        return chosen._replace(kept=kept, kept_mass=share)


@dataclass
class Fp8Cache(Dense):
    """Every key of a KV cache in float8 (vLLM's `--kv-cache-dtype fp8`, e4m3, one scale for all):
    half of the bytes, dense."""

    scale: float
    v_row_bytes: ClassVar[float] = 0.5

    @property
    def name(self) -> str:
        return f"fp8:{self.scale:g}"

    def __call__(self, call: AttentionCall) -> Tensor:
        def rounded(x: Tensor) -> Tensor:
            most = torch.finfo(torch.float8_e4m3fn).max
            scaled = (x.float() / self.scale).clamp(-most, most)
            return (scaled.to(torch.float8_e4m3fn).float() * self.scale).to(x)

        return super().__call__(replace(call, key=rounded(call.key), value=rounded(call.value)))


RIVALS = {
    "top_k": (TopK, int),
    "nucleus": (Nucleus, float),
    "quest": (Quest, int),
    "blasst": (Blasst, float),
    "window": (Window, int),
    "paper": (Paper, int),
    "fp8": (Fp8Cache, float),
}
DEFAULT_RIVALS = (
    "top_k:64",
    "top_k:128",
    "top_k:256",
    "nucleus:0.9",
    "quest:512",
    "blasst:0.001",
    "window:512",
    "paper:64",
    "fp8:1",
)


def rival(spec: str) -> Rule:
    """A rule by name and setting, such as "top_k:64".

    Raises:
        ValueError: there is no such rule, or its setting is not a number.
    """
    name, _, setting = spec.partition(":")
    try:
        kind, number = RIVALS[name]
        return kind(number(setting))
    except (KeyError, ValueError):
        raise ValueError(
            f"rival {spec!r}: expected NAME:SETTING with one of {', '.join(RIVALS)}; for example "
            f"{' '.join(DEFAULT_RIVALS)}"
        ) from None
