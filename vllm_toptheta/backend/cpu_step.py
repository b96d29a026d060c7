"""One step of one builder on a CPU: the decode rows as the kernel takes them, and what the counters
need of the step.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_toptheta.backend.counts import StepCounts, in_units
from vllm_toptheta.backend.dial import KindRows, RowPlan
from vllm_toptheta.backend.heads import HeadCounts
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
        rows: what was planned for them, or None.
        prompts: the prompt rows of the requests after the decode rows, where they are pruned, or
            None.
        prefill_lens: [num_reqs] prompt tokens of every request in this step.
        layers: [num_layers of this builder] index into an axis of all layers.
        heads: counts per head since the start, of this builder; updated by `lines`.
    """

    GROUP = "cpu_group"

    decode: DecodeStep | None
    rows: RowPlan | None
    prompts: PromptStep | None
    prefill_lens: torch.Tensor
    layers: NDArray[np.int64]
    heads: HeadCounts

    def lines(self) -> torch.Tensor:
        width = self.num_reqs + self.num_layers * (1 + len(self.detail))
        lines = np.zeros((width, len(COLUMNS)), dtype=np.int64)
        if self.decode is not None and self.rows is not None:
            self._count_decodes(self.decode, self.rows.kinds, lines)
        if self.prompts is not None:
            prompts = self.prompts.counts()
            self._add_up(prompts, lines, self.num_reqs - len(self.prompts.seq_lens))
        elif self.decode is None or self.decode.num_decodes < self.num_reqs:
            lens = self.prefill_lens.numpy()
            self._add_up({"dense_prefill": np.tile(lens, (len(self.layers), 1))}, lines, 0)
        return torch.from_numpy(lines)

    def _add_up(
        self, counts: dict[str, NDArray[Any]], lines: NDArray[np.int64], first: int
    ) -> NDArray[np.float64]:
        """Write columns: what requests have in all layers, layers of all requests, and requests in
        `detail` in each layer.

        All columns in one array: on rows this few, what costs is the number of calls.

        Args:
            counts: by column, [num_layers, num_rows] or [num_layers, num_rows, num_heads].
            lines: [width, len(COLUMNS)], written.
            first: request of the first row.

        Returns:
            [num_layers, heads of all columns] sums over rows.
        """
        columns = [COLUMNS.index(name) for name in counts]
        by_head = [values if values.ndim == 3 else values[..., None] for values in counts.values()]
        starts = [0, *itertools.accumulate(values.shape[2] for values in by_head[:-1])]
        # float64 holds these integers.
        whole = np.concatenate(by_head, 2, dtype=np.float64)
        rows = whole.shape[1]

        def of_heads(values: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.add.reduceat(values, starts, axis=1)

        # NumPy adds up along the first axis faster, torch along the second.
        sums: NDArray[np.float64] = torch.from_numpy(whole).sum(1).numpy()
        lines[first : first + rows, columns] = of_heads(whole.sum(0))
        layers = self.num_reqs + self.layers[:, None]
        lines[layers, columns] = of_heads(sums)
        for number, row in enumerate(self.detail, 1):
            if 0 <= row - first < rows:
                lines[layers + number * self.num_layers, columns] = of_heads(whole[:, row - first])
        return sums

    def _count_decodes(self, decode: DecodeStep, kinds: KindRows, lines: NDArray[np.int64]) -> None:
        """Write the columns of decode rows, and add to the counts per head."""
        kept = decode.rows.num_kept.numpy()
        visible = kinds.visible[kinds.of_layer]
        if any(decode.stock):  # CPU_ATTN counts nothing
            kept = np.where(decode.rows.dense.numpy()[..., None], visible[..., None], kept)
        counts: dict[str, NDArray[Any]] = {  # first those of `HeadCounts.sums`, in their order
            "keys_kept": kept,
            "kept_mass": in_units(decode.rows.kept_mass).numpy(),
            "keys_scored": visible,
            "rows": np.ones_like(visible),
        }
        if (lifted := decode.rows.lifts.numpy() > 0).any():
            counts["rows_lifted"] = lifted
        if any_dense := kinds.dense.any():
            counts |= {name: mask[kinds.of_layer] for name, mask in kinds.reasons.items()}
        target = kinds.target * ~kinds.dense if any_dense else kinds.target
        same = {"v_rows_scored": "keys_scored", "v_rows_read": "keys_kept"}
        if target.any():
            counts["keys_target"] = target = target[kinds.of_layer]
            counts["keys_dense"] = kept * (target == 0)[..., None]
        else:
            same["keys_dense"] = "keys_kept"
        self.heads.add(self._add_up(counts, lines, 0))
        lines[:, [*map(COLUMNS.index, same)]] = lines[:, [*map(COLUMNS.index, same.values())]]
