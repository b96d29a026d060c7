"""What every decode row of a batch is to do: row lengths and request options in, thresholds and
reasons to run dense out.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.request_options import RequestOptions
from vllm_toptheta.telemetry.carrier import batch_request_ids
from vllm_toptheta.telemetry.step_log import STEP_LOG
from vllm_toptheta.thresholds import LevelThresholds

REASONS = ("dense_short", "dense_window", "dense_layer", "dense_off")

_MAX_LEVELS = 64
"""Levels kept ready. Clients choose k freely, so without a bound they could fill the memory."""


def row_options(cam: Any) -> dict[int, RequestOptions]:
    """Options that are not the default ones, by batch row.

    Args:
        cam: vLLM's `CommonAttentionMetadata` of the batch that is being prepared.
    """
    runner = STEP_LOG.runner
    if runner is None or not STEP_LOG.options:
        return {}
    request_ids = batch_request_ids(runner, getattr(cam, "req_idx", None))
    by_id = STEP_LOG.options
    return {row: by_id[name] for row, name in enumerate(request_ids) if name in by_id}


def rest_of_batch(
    cam: Any, options: Mapping[int, RequestOptions], num_rows: int
) -> tuple[Any, dict[int, RequestOptions]]:
    """The requests after the first ones, as a batch of their own.

    Args:
        cam: vLLM's `CommonAttentionMetadata` of the whole batch.
        options: from `row_options`.
        num_rows: requests to leave out; there are more in the batch.

    Returns:
        Metadata and options of the others.
    """
    tokens = int(cam.query_start_loc_cpu[num_rows])
    rest = cam.replace(
        query_start_loc=cam.query_start_loc[num_rows:] - tokens,
        query_start_loc_cpu=cam.query_start_loc_cpu[num_rows:] - tokens,
        seq_lens=cam.seq_lens[num_rows:],
        num_reqs=cam.num_reqs - num_rows,
        num_actual_tokens=cam.num_actual_tokens - tokens,
        block_table_tensor=cam.block_table_tensor[num_rows:],
        slot_mapping=cam.slot_mapping[tokens:],
    )
    return rest, {row - num_rows: asked for row, asked in options.items() if row >= num_rows}


@dataclass
class RowPlan:
    """What decode rows are to do in every layer of one builder.

    Attributes:
        visible: [num_layers, num_decodes] int64, keys a row may see.
        theta: [num_layers, num_decodes, num_heads] float32, units of q.k * sm_scale.
        target: [num_layers, num_decodes] int64, keys a row is to keep, all heads together.
        reasons: {name in REASONS: [num_layers, num_decodes] bool}; at most one holds.
    """

    visible: torch.Tensor
    theta: torch.Tensor
    target: torch.Tensor
    reasons: dict[str, torch.Tensor]

    def put(self, where: Any, part: "RowPlan") -> None:
        """Write another plan over some layers or rows of this one."""
        self.visible[where], self.theta[where] = part.visible, part.theta
        self.target[where] = part.target
        for name, values in part.reasons.items():
            self.reasons[name][where] = values


@dataclass(frozen=True)
class _LayerGroup:
    """Layers of one builder with the same window.

    Attributes:
        window: keys a row sees at most, or None.
        layers: their indices in the model.
        slots: [num] their positions in the builder's tensors.
        dense: [num, 1] bool, excluded by an option.
    """

    window: int | None
    layers: list[int]
    slots: torch.Tensor
    dense: torch.Tensor


@dataclass(frozen=True)
class _Level:
    """One group at one k.

    Attributes:
        thresholds: of the group's layers and this rank's heads.
        layer_k: [num, 1] mean keys a row keeps.
        limit: [num, 1] rows that see at most this many keys run dense.
        head_k: [num, 1, num_heads] int64, keys a head is to keep.
    """

    thresholds: LevelThresholds
    layer_k: torch.Tensor
    limit: torch.Tensor
    head_k: torch.Tensor


class Dial:
    """Thresholds of one builder's layers, for any k that requests ask for.

    Attributes:
        layers: index of the builder's layers into an axis of all layers; a slice where they
            follow each other.
    """

    def __init__(
        self,
        plan: Plan,
        layers: list[int],
        windows: list[int | None],
        first_head: int,
        num_heads: int,
    ) -> None:
        """Prepare the configured k.

        Args:
            plan: options and thresholds of the engine.
            layers: the builder's layers, in the order of its tensors.
            windows: keys a row sees at most, for each of them.
            first_head: first query head of this rank.
            num_heads: query heads of this rank.
        """
        in_a_row = layers == list(range(layers[0], layers[0] + len(layers)))
        self.layers = slice(layers[0], layers[-1] + 1) if in_a_row else layers
        self._plan = plan
        self._num_layers = len(layers)
        self._heads = (first_head, num_heads)
        by_window: dict[int | None, list[int]] = defaultdict(list)
        for slot, window in enumerate(windows):
            by_window[window].append(slot)
        self._groups = [
            self._group(window, slots, [layers[slot] for slot in slots])
            for window, slots in by_window.items()
        ]
        self._levels: OrderedDict[float | None, list[_Level]] = OrderedDict()
        self._at(None)

    def plan(
        self,
        seq_lens: torch.Tensor,
        options: Mapping[int, RequestOptions],
        default_k: float | None = None,
        query_lens: torch.Tensor | None = None,
    ) -> RowPlan:
        """Look up what the rows of a batch are to do.

        Args:
            seq_lens: [num_rows] int32, keys of each row.
            options: by request, where they are not the default ones; others are ignored.
            default_k: mean keys a row keeps where its request does not say; None for the
                configured k.
            query_lens: [num_requests] int64, rows of each request; None for one each.

        Returns:
            A plan that is the caller's own.
        """
        if not options:
            return self._lookup(default_k, seq_lens)
        asked_of = [
            options.get(i) for i in range(len(seq_lens if query_lens is None else query_lens))
        ]
        ks = [default_k if asked is None or asked.k is None else asked.k for asked in asked_of]
        groups = {k: group for group, k in enumerate(dict.fromkeys(ks))}
        off = torch.tensor([asked is not None and asked.off for asked in asked_of])
        group_of = torch.tensor([groups[k] for k in ks])
        if query_lens is not None:
            off = off.repeat_interleave(query_lens)
            group_of = group_of.repeat_interleave(query_lens)
        if len(groups) == 1:
            plan = self._lookup(ks[0], seq_lens)
        else:
            plan = self._empty(len(seq_lens))
            for k, group in groups.items():
                rows = _as_slice((group_of == group).nonzero().squeeze(1))
                plan.put((slice(None), rows), self._lookup(k, seq_lens[rows]))
        if off.any():
            for name in REASONS:
                plan.reasons[name][:, off] = name == "dense_off"
        return plan

    def _group(self, window: int | None, slots: list[int], layers: list[int]) -> _LayerGroup:
        dense = torch.tensor([[self._plan.layer_is_dense(index)] for index in layers])
        return _LayerGroup(window, layers, torch.tensor(slots), dense)

    def _at(self, k: float | None) -> list[_Level]:
        """The levels of all groups at a k, from the least recently used cache."""
        if k not in self._levels:
            self._levels[k] = [self._level(group, k) for group in self._groups]
            if len(self._levels) > _MAX_LEVELS:
                self._levels.popitem(last=False)
        self._levels.move_to_end(k)
        return self._levels[k]

    def _level(self, group: _LayerGroup, k: float | None) -> _Level:
        layer_k = torch.tensor([[self._plan.layer_k(index, k)] for index in group.layers])
        thresholds = self._plan.thresholds(group.layers, *self._heads, k)
        return _Level(
            thresholds,
            layer_k,
            layer_k.clamp(min=self._plan.config.min_kv_len),
            thresholds.head_k.round().to(torch.int64)[:, None],
        )

    def _empty(self, num_decodes: int) -> RowPlan:
        shape = (self._num_layers, num_decodes)
        return RowPlan(
            visible=torch.empty(shape, dtype=torch.int64),
            theta=torch.empty((*shape, self._heads[1])),
            target=torch.empty(shape, dtype=torch.int64),
            reasons={name: torch.zeros(shape, dtype=torch.bool) for name in REASONS},
        )

    def _lookup(self, k: float | None, seq_lens: torch.Tensor) -> RowPlan:
        """The plan of rows that all ask for the same k."""
        levels = self._at(k)
        parts = [
            _plan(group, level, seq_lens) for group, level in zip(self._groups, levels, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        plan = self._empty(len(seq_lens))
        for group, part in zip(self._groups, parts, strict=True):
            plan.put(group.slots, part)
        return plan


def _as_slice(rows: torch.Tensor) -> torch.Tensor | slice:
    """Rising row numbers as a slice where they follow each other: writing to it is cheaper."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _plan(group: _LayerGroup, level: _Level, seq_lens: torch.Tensor) -> RowPlan:
    """The plan of one group's layers."""
    window = group.window
    lens = seq_lens if window is None else seq_lens.clamp(max=window)
    visible = lens.to(torch.int64)
    windowed = ~group.dense & (window is not None and level.layer_k >= window)
    short = ~group.dense & ~windowed & (lens <= level.limit)
    return RowPlan(
        visible=visible.expand_as(short).contiguous(),
        theta=level.thresholds.lookup(lens),
        target=torch.minimum(level.head_k, visible[:, None]).sum(2),
        reasons={
            "dense_short": short,
            "dense_window": windowed.expand_as(short).contiguous(),
            # A copy also where there is one row: callers may write into their plan.
            "dense_layer": group.dense.expand_as(short).clone(),
            "dense_off": torch.zeros_like(short),
        },
    )
