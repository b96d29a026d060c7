"""One step of one builder on a CPU: the decode rows as the kernel takes them, and what the counters
need of the step.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_toptheta.backend.counts import DecodeCounts, StepCounts, in_units
from vllm_toptheta.backend.prompts import PromptRows, PromptStep
from vllm_toptheta.kernels.columns import COLUMNS
from vllm_toptheta.kernels.decode import DecodeRows


@dataclass
class StockRows:
    """Decode rows that keep every key and run on CPU_ATTN.

    Attributes:
        rows: [num_rows] int64, which of the decode rows; None for all of them.
        metadata: CPU_ATTN's, of these rows.
        others: all rows, with length 0 for these.
    """

    rows: torch.Tensor | None
    metadata: Any
    others: DecodeRows


@dataclass
class DecodeStep:
    """The decode rows of one step, for all layers of one metadata builder.

    Attributes:
        num_decodes: rows; each is one token of one request, and they come first in the batch.
        rows: as the kernel takes them, which writes their counts.
        stock: by layer, the rows that our kernel does not take; None where it takes all.
    """

    num_decodes: int
    rows: DecodeRows
    stock: list[StockRows | None]


@dataclass
class TopThetaCPUMetadata:
    """One step's attention metadata for the layers of one builder.

    Attributes:
        num_actual_tokens: tokens of the batch; decode rows first.
        decode: the decode rows, or None.
        prefill: CPU_ATTN's metadata of the remaining rows, where our kernel does not take them, or
            None.
        prompts: the remaining rows, where they run on our kernel, or None.
    """

    num_actual_tokens: int
    decode: DecodeStep | None
    prefill: Any | None
    prompts: PromptRows | None = None


@dataclass
class CPUStepCounts(StepCounts):
    """One attention step on a CPU.

    Attributes:
        decode: the decode rows, or None.
        prompts: the prompt rows of the requests after the decode rows, where they are pruned, or
            None.
        prefill_lens: [num_reqs] prompt tokens of every request in this step.
        layers: [num_layers of this builder] index into an axis of all layers.
    """

    GROUP = "cpu_group"

    decode: DecodeCounts | None
    prompts: PromptStep | None
    prefill_lens: NDArray[np.int64]
    layers: NDArray[np.int64]

    @property
    def is_small(self) -> bool:
        return self.prompts is None  # which have elements for every token

    def lines(self, *others: "CPUStepCounts") -> torch.Tensor:
        width = self.num_reqs + self.num_layers * (1 + len(self.detail))
        lines = np.zeros((width, len(COLUMNS)), dtype=np.int64)
        by_rows: dict[int, list[DecodeCounts]] = {}
        for step in (self, *others):
            num_decodes = 0
            if step.decode is not None:
                num_decodes = step.decode.num_rows
                by_rows.setdefault(num_decodes, []).append(step.decode)
            if step.prompts is not None:
                first = self.num_reqs - len(step.prompts.seq_lens)
                self._add_up(step.prompts.counts(), lines, first)
            elif num_decodes < self.num_reqs:
                lens = np.tile(step.prefill_lens, (len(self.layers), 1))
                self._add_up({"dense_prefill": lens}, lines, 0)
        for decodes in by_rows.values():
            self._add_up(_counts_of(decodes), lines, 0)
        return torch.from_numpy(lines)

    def _add_up(
        self, counts: dict[str, NDArray[Any]], lines: NDArray[np.int64], first: int
    ) -> None:
        """Add to columns: what requests have in all layers, layers of all requests, and requests in
        `detail` in each layer.

        All columns in one array: on rows this few, what costs is the number of calls.

        Args:
            counts: by column, [num_layers, num_rows] or [num_layers, num_rows, num_heads].
            lines: [width, len(COLUMNS)], added to.
            first: request of the first row.
        """
        columns = [COLUMNS.index(name) for name in counts]
        by_head = [values if values.ndim == 3 else values[..., None] for values in counts.values()]
        starts = [0, *itertools.accumulate(values.shape[2] for values in by_head[:-1])]
        # float64 holds these integers.
        whole = np.concatenate(by_head, 2, dtype=np.float64)
        rows = whole.shape[1]

        def add(to: Any, values: NDArray[np.float64]) -> None:
            lines[to, columns] += np.add.reduceat(values, starts, axis=1).astype(np.int64)

        add(slice(first, first + rows), whole.sum(0))
        layers = self.num_reqs + self.layers[:, None]
        add(layers, whole.sum(1))
        for number, row in enumerate(self.detail, 1):
            if 0 <= row - first < rows:
                add(layers + number * self.num_layers, whole[:, row - first])


def _counts_of(steps: Sequence[DecodeCounts]) -> dict[str, NDArray[Any]]:
    """Columns of as many decode rows in several steps, [num_layers, num_rows] each or also
    [..., heads]."""
    kinds = [step.kinds for step in steps]
    of_layer = kinds[0].of_layer
    kept = [step.kept for step in steps]
    targets = [kind.target * ~kind.dense for kind in kinds]
    without_k = [
        keys * (target == 0)[of_layer][..., None] if target.any() else keys
        for keys, target in zip(kept, targets, strict=True)
    ]
    scored, all_kept = _sum(kind.visible for kind in kinds)[of_layer], _sum(kept)
    return {
        "rows": np.full_like(scored, len(steps)),
        "keys_scored": scored,
        "keys_kept": all_kept,
        "v_rows_scored": scored,
        "v_rows_read": all_kept,
        "keys_dense": _sum(without_k),
        "keys_target": _sum(targets)[of_layer],
        "kept_mass": _sum(in_units(step.kept_mass) for step in steps),
        "rows_lifted": _sum(step.lifts > 0 for step in steps),
        **{name: _sum(kind.reasons[name] for kind in kinds)[of_layer] for name in kinds[0].reasons},
    }


def _sum(parts: Iterable[NDArray[Any]]) -> NDArray[np.float64]:
    """In float64, which holds these integers."""
    first, *others = parts
    total = first.astype(np.float64)
    for part in others:
        total += part
    return total
