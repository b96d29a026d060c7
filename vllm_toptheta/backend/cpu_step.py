"""One step of one builder on a CPU: the decode rows as the kernel takes them, and what the counters
need of the step.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.distributed import get_tp_group

from vllm_toptheta.backend.dial import KindRows, RowPlan
from vllm_toptheta.backend.heads import HeadCounts
from vllm_toptheta.backend.prompts import PromptStep
from vllm_toptheta.telemetry.counters import FIELDS, MASS_UNIT


@dataclass
class StockRows:
    """Decode rows that keep every key and run on CPU_ATTN.

    Attributes:
        rows: [num_rows] int64, which of the decode rows; None for all of them.
        metadata: CPU_ATTN's, of these rows.
        others: [num_decodes] int32, lengths of the other rows, 0 for these.
    """

    rows: torch.Tensor | None
    metadata: Any
    others: torch.Tensor


@dataclass
class DecodeStep:
    """The decode rows of one step, for all layers of one metadata builder.

    Attributes:
        num_decodes: rows; each is one token of one request, and they come first in the batch.
        block_table: [num_decodes, max_blocks] int32.
        seq_lens: [num_decodes] int32.
        log_min_prob: [num_layers, num_decodes, num_kv_heads] float32, natural logarithm.
        min_mass: [num_decodes] float32.
        dense: [num_layers, num_decodes] bool, rows that run without pruning.
        num_kept: [num_layers, num_decodes, num_kv_heads] int32, written by the kernel.
        kept_mass: [num_layers, num_decodes, num_heads] float32, written by the kernel.
        lifts: [num_layers, num_decodes, num_kv_heads] int32, written by the kernel.
        stock: by layer, the rows that our kernel does not take; None where it takes all.
        of_layer: log_min_prob, dense, num_kept, kept_mass and lifts of each layer: made at once,
            which takes a fifth of one by one.
    """

    num_decodes: int
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    log_min_prob: torch.Tensor
    min_mass: torch.Tensor
    dense: torch.Tensor
    num_kept: torch.Tensor
    kept_mass: torch.Tensor
    lifts: torch.Tensor
    stock: list[StockRows | None]
    of_layer: list[tuple[torch.Tensor, ...]] = field(init=False)

    def __post_init__(self) -> None:
        whole = (self.log_min_prob, self.dense, self.num_kept, self.kept_mass, self.lifts)
        self.of_layer = list(zip(*(tensor.unbind() for tensor in whole), strict=True))


_V_COLUMNS = ("v_rows_scored", "v_rows_read", "prefill_v_tiles", "prefill_v_tiles_read")


@dataclass
class StepCounts:
    """What the counters need of one step; `totals` runs after the last layer.

    Attributes:
        decode: the decode rows, or None.
        rows: what was planned for them, or None.
        prompts: the prompt rows of the requests after the decode rows, where they are pruned, or
            None.
        prefill_lens: [num_reqs] prompt tokens of every request in this step.
        layers: index of this builder's layers into an axis of all layers.
        num_layers: layers of the model.
        num_heads, num_kv_heads: of this rank.
        first_replica: whether no lower rank holds the same kv head; V rows of a kv head that
            several ranks hold are counted by one.
        detail: batch rows of the requests that asked for counts per layer.
        heads: counts per head since the start, of this builder; updated by `totals`.
    """

    decode: DecodeStep | None
    rows: RowPlan | None
    prompts: PromptStep | None
    prefill_lens: torch.Tensor
    layers: slice | list[int]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    first_replica: bool
    detail: list[int]
    heads: HeadCounts

    @property
    def num_reqs(self) -> int:
        return len(self.prefill_lens)

    def totals(self) -> torch.Tensor:
        """Counts as `StepLog.append` wants them, summed over tensor-parallel ranks."""
        # Requests, layers, and the layers of each request in `detail`, one after the other.
        width = self.num_reqs + self.num_layers * (1 + len(self.detail))
        counts = np.zeros((len(FIELDS), width), dtype=np.int64)
        columns = dict(zip(FIELDS, counts, strict=True))
        if self.decode is not None and self.rows is not None:
            self._count_decodes(self.decode, self.rows.kinds, columns)
        prompts: dict[str, NDArray[np.int64]] = {}
        if self.prompts is not None:
            prompts = self.prompts.counts()
        elif self.decode is None or self.decode.num_decodes < self.num_reqs:
            lens = self.prefill_lens.numpy() * self.num_heads
            prompts = {"dense_prefill": np.tile(lens, (len(self.heads.layers), 1))}
        for name, values in prompts.items():
            first = self.num_reqs - values.shape[1]
            self._add_up(values[None], columns[name][None], first)
        if not self.first_replica:
            for name in _V_COLUMNS:
                columns[name][:] = 0
        totals = torch.from_numpy(counts.T.reshape(-1))
        group = get_tp_group()
        if group.world_size > 1:
            torch.distributed.all_reduce(totals, group=group.cpu_group)
        return totals

    def _add_up(
        self,
        values: NDArray[np.int64],
        out: NDArray[np.int64],
        first: int = 0,
        of_layer: NDArray[np.int64] | None = None,
    ) -> None:
        """Sums over layers, over rows, and what requests in `detail` have in each layer.

        Args:
            values: [n, num_layers, num_rows]; with `of_layer` [n, num_kinds, num_rows].
            out: [n, width], written.
            first: request of the first row.
            of_layer: [num_layers] kind of each layer; None for one of its own.
        """
        rows, last = values.shape[2], first + values.shape[2]
        requests = out[:, : self.num_reqs]
        # Also a view: only the last axis is cut.
        layers = out[:, self.num_reqs :].reshape(len(out), -1, self.num_layers)
        per_layer = values.sum(2)
        if of_layer is None:
            requests[:, first:last] = values.sum(1)
        else:
            layers_of_kind = np.bincount(of_layer)
            requests[:, first:last] = (values * layers_of_kind[:, None]).sum(1)
            per_layer = per_layer[:, of_layer]
        layers[:, 0, self.layers] = per_layer
        for number, row in enumerate(self.detail, 1):
            if 0 <= row - first < rows:
                of_row = values[:, :, row - first]
                layers[:, number, self.layers] = of_row if of_layer is None else of_row[:, of_layer]

    def _count_decodes(
        self, decode: DecodeStep, kinds: KindRows, columns: dict[str, NDArray[np.int64]]
    ) -> None:
        """Write the columns of decode rows, and add to the counts per head."""
        group, width = self.num_heads // self.num_kv_heads, len(columns["rows"])
        # Sums of short last axes are torch's: NumPy makes them number by number.
        kept, masses = decode.num_kept, decode.kept_mass.double()
        any_dense = bool(kinds.dense.any())
        if any_dense:  # CPU_ATTN counts nothing
            visible = kinds.by_layer(kinds.visible)[..., None]
            kept = torch.where(decode.dense[..., None], visible, kept)
        read = kept.sum(2).numpy()
        target = kinds.target * ~kinds.dense
        measured = np.zeros((4, *read.shape), dtype=np.int64)
        measured[0] = read
        if target.any():
            measured[1] = read * (target > 0)[kinds.of_layer]
        measured[2] = np.rint(masses.sum(2).numpy() * MASS_UNIT)
        measured[3] = (decode.lifts > 0).sum(2).numpy()
        sums = np.zeros((4, width), dtype=np.int64)
        self._add_up(measured, sums)
        planned = [np.ones_like(target), kinds.visible, target]
        names = ["rows", "keys_scored", "keys_target"]
        if any_dense:
            planned += [reason.astype(np.int64) for reason in kinds.reasons.values()]
            names += kinds.reasons
        known = np.zeros((len(planned), width), dtype=np.int64)
        self._add_up(np.stack(planned), known, of_layer=kinds.of_layer)
        for name, values in zip(names, known, strict=True):
            columns[name][:] = values if name == "keys_target" else values * self.num_heads
        columns["v_rows_scored"][:] = known[1] * self.num_kv_heads
        columns["keys_kept"][:] = sums[0] * group
        columns["v_rows_read"][:] = sums[0]
        columns["keys_dense"][:] = (sums[0] - sums[1]) * group
        columns["kept_mass"][:] = sums[2]
        columns["rows_lifted"][:] = sums[3] * group
        self.heads.kept += kept.sum(1).numpy()
        self.heads.scored += kinds.visible.sum(1)[kinds.of_layer, None]
        self.heads.kept_mass += masses.sum(1).numpy()
        self.heads.rows += decode.num_decodes
