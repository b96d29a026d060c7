"""What every row of a batch is to do: row lengths and request options in, thresholds and reasons to
run dense out.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.requests import Resolved, Target

Phase = Literal["decode", "prefill"]
REASONS = ("dense_short", "dense_window", "dense_layer", "dense_off")

_NO_WINDOW = 1 << 40
_MAX_CURVES = 1024
"""Curves of k kept ready, a few numbers each. Clients choose k freely, so there is a bound."""


def rest_of_batch(
    cam: Any, options: Mapping[int, Resolved], num_rows: int
) -> tuple[Any, dict[int, Resolved]]:
    """The requests after the first ones, as a batch of their own.

    Args:
        cam: vLLM's `CommonAttentionMetadata` of the whole batch.
        options: by batch row, where they are not the default ones.
        num_rows: requests to leave out; there are more in the batch.

    Returns:
        Metadata and options of the others.
    """
    rest = part_of_batch(cam, num_rows, cam.num_reqs)
    return rest, {row - num_rows: asked for row, asked in options.items() if row >= num_rows}


def part_of_batch(cam: Any, first: int, end: int) -> Any:
    """Requests that follow each other, as a batch of their own.

    Args:
        cam: vLLM's `CommonAttentionMetadata` of the whole batch.
        first, end: batch rows, one at least.
    """
    begin, last = cam.query_start_loc_cpu[[first, end]].tolist()
    return cam.replace(
        query_start_loc=cam.query_start_loc[first : end + 1] - begin,
        query_start_loc_cpu=cam.query_start_loc_cpu[first : end + 1] - begin,
        seq_lens=cam.seq_lens[first:end],
        num_reqs=end - first,
        num_actual_tokens=last - begin,
        block_table_tensor=cam.block_table_tensor[first:end],
        slot_mapping=cam.slot_mapping[begin:last],
    )


def single_rows_of_batch(cam: Any, rows: Tensor) -> Any:
    """Some of the requests that have one query token each, as a batch of their own.

    Args:
        cam: vLLM's `CommonAttentionMetadata` of the whole batch, such requests first.
        rows: [num_rows] int64, which of them.
    """
    starts = torch.arange(len(rows) + 1, dtype=torch.int32)
    return cam.replace(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=cam.seq_lens[rows],
        num_reqs=len(rows),
        num_actual_tokens=len(rows),
        max_query_len=1,
        block_table_tensor=cam.block_table_tensor[rows],
        slot_mapping=cam.slot_mapping[rows],
    )


@dataclass
class KindRows:
    """What rows are to do in layers of every kind.

    Layers of a kind have the same window and the same options of the operator; most models have one
    or two. NumPy: on arrays this small, a call takes half of what it does in torch.

    Attributes:
        of_layer: [num_layers] int64, the kind of each layer of the builder.
        visible: [num_kinds, num_rows] int64, keys a row may see.
        target: [num_kinds, num_rows] int64, keys a row is to keep, all heads together, where k
            rules; else 0.
        reasons: {name in REASONS: [num_kinds, num_rows] bool}; at most one holds.
        dense: [num_kinds, num_rows] bool, whether one does: rows that run without pruning.
    """

    of_layer: NDArray[np.int64]
    visible: NDArray[np.int64]
    target: NDArray[np.int64]
    reasons: dict[str, NDArray[np.bool_]]
    dense: NDArray[np.bool_]

    def by_layer(self, values: NDArray[Any]) -> Tensor:
        """[num_layers, num_rows] of values that differ between kinds; a copy."""
        return torch.from_numpy(values[self.of_layer])


@dataclass
class RowPlan:
    """What rows are to do in every layer of one builder. The tensors are the caller's own.

    Attributes:
        kinds: what layers of a kind have in common; properties give the same by layer.
        log_min_prob: [num_layers, num_rows, num_kv_heads] float32, natural logarithm of the
            attention probability below which a key is dropped.
        min_mass: [num_rows] float32, share of a row's attention that is kept at least.
    """

    kinds: KindRows
    log_min_prob: Tensor
    min_mass: Tensor

    @property
    def visible(self) -> Tensor:
        """[num_layers, num_rows] int64, see `KindRows`."""
        return self.kinds.by_layer(self.kinds.visible)

    @property
    def target(self) -> Tensor:
        """[num_layers, num_rows] int64, see `KindRows`."""
        return self.kinds.by_layer(self.kinds.target)

    @property
    def reasons(self) -> dict[str, Tensor]:
        """{name in REASONS: [num_layers, num_rows] bool}, see `KindRows`."""
        return {name: self.kinds.by_layer(value) for name, value in self.kinds.reasons.items()}

    @property
    def dense(self) -> Tensor:
        """[num_layers, num_rows] bool, rows that run without pruning."""
        return self.kinds.by_layer(self.kinds.dense)


@dataclass(frozen=True)
class _Settings:
    """What the requests of a batch ask for; it lasts until other requests are in the batch.

    Attributes:
        off: [num_requests] bool, the request asked for no pruning.
        keys: [num_requests] int64, what k means for a row, all heads together; 0 where no k rules.
        min_mass: [num_requests] float32.
        curves: [num_requests, num_knots] thresholds at the row lengths of the table; None where no
            k rules in the batch.
        log_min_prob: [num_layers, num_requests, num_kv_heads] thresholds, None where one does.
    """

    off: NDArray[np.bool_]
    keys: NDArray[np.int64]
    min_mass: Tensor
    curves: Tensor | None
    log_min_prob: Tensor | None


class Dial:
    """Thresholds of one builder's layers, for whatever requests ask for.

    Attributes:
        layers: [num_layers] int64, index of the builder's layers into an axis of all layers.
        weights: [num_layers, num_heads, NUM_WEIGHTS] float32, of the compensation.
    """

    def __init__(
        self,
        plan: Plan,
        layers: list[int],
        windows: list[int | None],
        first_head: int,
        num_heads: int,
    ) -> None:
        """Prepare what does not depend on the batch.

        Args:
            plan: options and calibration of the engine.
            layers: the builder's layers, in the order of its tensors.
            windows: keys a row sees at most, for each of them.
            first_head: first query head of this rank.
            num_heads: query heads of this rank.
        """
        self.layers = np.array(layers)
        self.weights, self._offsets = plan.of_rank(layers, first_head, num_heads)
        self._plan, self._num_heads = plan, num_heads
        kinds = [
            (window or _NO_WINDOW, plan.layer_log_min_prob(index), plan.layer_is_dense(index))
            for index, window in zip(layers, windows, strict=True)
        ]
        distinct = list(dict.fromkeys(kinds))
        self._kind_of = np.array([distinct.index(kind) for kind in kinds])
        self._windows = np.array([[window] for window, _, _ in distinct])
        self._has_own = np.array([[own is not None] for _, own, _ in distinct])
        self._own = torch.tensor([[own or 0.0] for _, own, _ in distinct])
        self._dense_layer = np.array([[dense] for _, _, dense in distinct])
        never = self._windows <= plan.config.min_kv_len
        self._dense_window = never & ~self._dense_layer
        self._curve_at_k = functools.lru_cache(_MAX_CURVES)(self._curve_of)
        self._last: dict[Phase, tuple[int, dict[int, Resolved], _Settings]] = {}

    def plan(
        self,
        seq_lens: Tensor,
        options: Mapping[int, Resolved],
        phase: Phase = "decode",
        query_lens: Tensor | None = None,
    ) -> RowPlan:
        """Look up what the rows of a batch are to do.

        Args:
            seq_lens: [num_rows] integer, keys of each row.
            options: by request, where they are not the default ones; others are ignored.
            phase: which of the server's targets holds where a request does not say.
            query_lens: [num_requests] int64, rows of each request; None for one each.
        """
        settings = self._settings(
            options, len(seq_lens if query_lens is None else query_lens), phase
        )
        off, keys, min_mass = settings.off, settings.keys, settings.min_mass
        visible = np.minimum(seq_lens.numpy().astype(np.int64), self._windows)
        if settings.log_min_prob is not None:
            log_min_prob = settings.log_min_prob
        else:
            assert self._plan.table is not None
            assert settings.curves is not None
            curves = settings.curves
            if query_lens is not None:
                curves = curves.repeat_interleave(query_lens, 0)
            found = self._plan.table.lookup(curves, torch.from_numpy(visible).T).T
            log_min_prob = self._by_head(found)
        if query_lens is not None:
            rows = query_lens.numpy()
            off, keys = off.repeat(rows), keys.repeat(rows)
            min_mass = min_mass.repeat_interleave(query_lens)
            if settings.log_min_prob is not None:
                log_min_prob = log_min_prob.repeat_interleave(query_lens, 1)
        reasons = self._reasons(visible, off, excluded=getattr(self._plan.targets, phase) is None)
        kinds = KindRows(
            of_layer=self._kind_of,
            visible=visible,
            target=np.minimum(keys, visible * self._num_heads) * ~self._has_own,
            reasons=reasons,
            dense=np.logical_or.reduce(list(reasons.values())),
        )
        # What the settings hold is not the caller's own.
        if query_lens is None:
            min_mass = min_mass.clone()
            if settings.log_min_prob is not None:
                log_min_prob = log_min_prob.clone()
        return RowPlan(kinds, log_min_prob, min_mass)

    def _settings(
        self, options: Mapping[int, Resolved], num_requests: int, phase: Phase
    ) -> _Settings:
        """What the requests of a batch ask for; what was found last, where they are the same."""
        asked = {i: one for i, one in options.items() if i < num_requests}
        if (last := self._last.get(phase)) is not None and last[:2] == (num_requests, asked):
            return last[2]
        server: Target | None = getattr(self._plan.targets, phase)
        off = np.zeros(num_requests, dtype=bool)
        targets = [server or Target(1.0)] * num_requests
        if server is not None:
            for i, one in asked.items():
                target = getattr(one.targets, phase)
                targets[i], off[i] = target or server, target is None
        curves = log_min_prob = None
        if any(target.k is not None for target in targets):
            curves = torch.stack([self._curve_at_k(target) for target in targets])
        else:
            logs = [math.log(target.min_prob or 1.0) for target in targets]
            log_min_prob = self._by_head(torch.tensor(logs).expand(len(self._windows), -1))
        settings = _Settings(
            off=off,
            keys=np.array([round((target.k or 0.0) * self._num_heads) for target in targets]),
            min_mass=torch.tensor([target.min_mass for target in targets]),
            curves=curves,
            log_min_prob=log_min_prob,
        )
        self._last[phase] = num_requests, asked, settings
        return settings

    def _by_head(self, log_min_prob: Tensor) -> Tensor:
        """[num_layers, num_rows, num_kv_heads] thresholds, of those of [num_kinds, num_rows] that
        the requests' targets mean."""
        if self._has_own.any():
            log_min_prob = torch.where(torch.from_numpy(self._has_own), self._own, log_min_prob)
        by_layer = log_min_prob[torch.from_numpy(self._kind_of)]
        return by_layer[..., None] + self._offsets[:, None]

    def _curve_of(self, target: Target) -> Tensor:
        """[num_knots] thresholds at the row lengths of the table."""
        table = self._plan.table
        assert table is not None
        if target.k is not None:
            return table.curve_at_k(target.k)
        return torch.full_like(table.lengths, math.log(target.min_prob or 1.0))

    def _reasons(
        self, visible: NDArray[np.int64], off: NDArray[np.bool_], *, excluded: bool
    ) -> dict[str, NDArray[np.bool_]]:
        """Why rows run dense.

        Args:
            visible: [num_kinds, num_rows].
            off: [num_rows], the request asked for it.
            excluded: an option excludes all of these rows.
        """
        nothing = np.zeros_like(visible, dtype=bool)
        if excluded:
            return {name: nothing | (name == "dense_layer") for name in REASONS}
        on = ~off
        short = (visible <= self._plan.config.min_kv_len) & on
        return {
            "dense_short": short & ~self._dense_layer & ~self._dense_window,
            "dense_window": self._dense_window & on,
            "dense_layer": self._dense_layer & on,
            "dense_off": nothing | off,
        }
