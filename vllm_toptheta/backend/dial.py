"""What every row of a batch is to do: row lengths and request options in, thresholds and reasons to
run dense out.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.request_options import RequestOptions, Target
from vllm_toptheta.telemetry.carrier import batch_request_ids
from vllm_toptheta.telemetry.step_log import STEP_LOG

REASONS = ("dense_short", "dense_window", "dense_layer", "dense_off")

_NO_WINDOW = 1 << 40
_MAX_CURVES = 1024
"""Curves of k kept ready, a few numbers each. Clients choose k freely, so there is a bound."""


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
class RowPlan:
    """What rows are to do in every layer of one builder. The tensors are the caller's own.

    Attributes:
        visible: [num_layers, num_rows] int64, keys a row may see.
        log_min_prob: [num_layers, num_rows, num_kv_heads] float32, natural logarithm of the
            attention probability below which a key is dropped.
        min_mass: [num_rows] float32, share of a row's attention that is kept at least.
        target: [num_layers, num_rows] int64, keys a row is to keep, all heads together, where k
            rules; else 0.
        reasons: {name in REASONS: [num_layers, num_rows] bool}; at most one holds.
    """

    visible: Tensor
    log_min_prob: Tensor
    min_mass: Tensor
    target: Tensor
    reasons: dict[str, Tensor]

    @property
    def dense(self) -> Tensor:
        """[num_layers, num_rows] bool, rows that run without pruning."""
        return torch.stack(list(self.reasons.values())).any(0)


class Dial:
    """Thresholds of one builder's layers, for whatever requests ask for.

    Attributes:
        layers: index of the builder's layers into an axis of all layers; a slice where they
            follow each other.
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
        in_a_row = layers == list(range(layers[0], layers[0] + len(layers)))
        self.layers = slice(layers[0], layers[-1] + 1) if in_a_row else layers
        self.weights, self._offsets = plan.of_rank(layers, first_head, num_heads)
        self._plan, self._num_heads = plan, num_heads
        # Lengths and thresholds of rows differ between windows, not between layers.
        distinct = list(dict.fromkeys(windows))
        self._windows = torch.tensor([[window or _NO_WINDOW] for window in distinct])
        self._window_of = torch.tensor([distinct.index(window) for window in windows])
        own = [plan.layer_log_min_prob(index) for index in layers]
        self._has_own = torch.tensor([[value is not None] for value in own])
        self._own = torch.tensor([[value or 0.0] for value in own])
        dense = torch.tensor([[plan.layer_is_dense(index)] for index in layers])
        never = self._windows[self._window_of] <= plan.config.min_kv_len
        self._dense_layer, self._dense_window = dense, never & ~dense
        self._curve_at_k = functools.lru_cache(_MAX_CURVES)(self._curve_of)

    def plan(
        self,
        seq_lens: Tensor,
        options: Mapping[int, RequestOptions],
        phase: Literal["decode", "prefill"] = "decode",
        query_lens: Tensor | None = None,
    ) -> RowPlan:
        """Look up what the rows of a batch are to do.

        Args:
            seq_lens: [num_rows] integer, keys of each row.
            options: by request, where they are not the default ones; others are ignored.
            phase: which of the server's targets holds where a request does not say.
            query_lens: [num_requests] int64, rows of each request; None for one each.
        """
        server: Target | None = getattr(self._plan.targets, phase)
        num_requests = len(seq_lens if query_lens is None else query_lens)
        asked = {i: one for i, one in options.items() if i < num_requests}
        visible = torch.minimum(seq_lens.to(torch.int64), self._windows)
        off = torch.zeros(len(seq_lens), dtype=torch.bool)
        which = torch.zeros(len(seq_lens), dtype=torch.int64)
        targets = [server or Target(1.0)]
        if asked and server is not None:
            of_request = [
                server if i not in asked else server.of(asked[i]) for i in range(num_requests)
            ]
            targets = list(dict.fromkeys(of_request))
            number = {target: i for i, target in enumerate(targets)}
            which = torch.tensor([number[target] for target in of_request])
            off = torch.tensor([i in asked and asked[i].off for i in range(num_requests)])
            if query_lens is not None:
                which, off = (x.repeat_interleave(query_lens) for x in (which, off))
        log_min_prob = self._log_min_prob(targets, which, visible)[self._window_of]
        log_min_prob = torch.where(self._has_own, self._own, log_min_prob)
        visible = visible[self._window_of]
        target = self._keys_meant(targets, which, visible)
        return RowPlan(
            visible=visible,
            log_min_prob=log_min_prob[..., None] + self._offsets[:, None],
            min_mass=torch.tensor([target.min_mass for target in targets])[which],
            target=target,
            reasons=self._reasons(visible, off, excluded=server is None),
        )

    def _log_min_prob(self, targets: list[Target], which: Tensor, visible: Tensor) -> Tensor:
        """[num_windows, num_rows] thresholds, without what differs between layers.

        Args:
            targets: distinct ones.
            which: [num_rows] int64, the target of each row.
            visible: [num_windows, num_rows] int64.
        """
        table = self._plan.table
        if table is None or all(target.k is None for target in targets):
            constants = torch.tensor([math.log(target.min_prob or 1.0) for target in targets])
            return constants[which].expand(visible.shape)
        curves = torch.stack([self._curve_at_k(target) for target in targets])
        return table.lookup(curves[which], visible.T).T

    def _curve_of(self, target: Target) -> Tensor:
        """[num_knots] thresholds at the row lengths of the table."""
        table = self._plan.table
        assert table is not None
        if target.k is not None:
            return table.curve_at_k(target.k)
        return torch.full_like(table.lengths, math.log(target.min_prob or 1.0))

    def _keys_meant(self, targets: list[Target], which: Tensor, visible: Tensor) -> Tensor:
        """[num_layers, num_rows] int64, see `RowPlan.target`."""
        keys = torch.tensor([round((target.k or 0.0) * self._num_heads) for target in targets])
        return torch.minimum(keys[which], visible * self._num_heads) * ~self._has_own

    def _reasons(self, visible: Tensor, off: Tensor, *, excluded: bool) -> dict[str, Tensor]:
        """Why rows run dense.

        Args:
            visible: [num_layers, num_rows] int64.
            off: [num_rows] bool, the request asked for it.
            excluded: an option excludes all of these rows.
        """
        nothing = torch.zeros_like(visible, dtype=torch.bool)
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
