"""One step of one builder on a CPU: the decode rows as the kernel takes them, and what the counters
need of the step.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tp_group

from vllm_toptheta.backend.dial import RowPlan
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
        # NumPy: on arrays this small, a step costs half of what it does in torch.
        counts = np.zeros((len(FIELDS), self.num_layers, self.num_reqs), dtype=np.int64)
        columns = dict(zip(FIELDS, counts, strict=True))
        columns["dense_prefill"][self.layers] = self.prefill_lens.numpy() * self.num_heads
        if self.prompts is not None:
            rest = (self.layers, slice(self.num_reqs - len(self.prompts.seq_lens), self.num_reqs))
            for name, values in self.prompts.counts().items():
                columns[name][rest] = values
        if self.decode is not None and self.rows is not None:
            self._count_decodes(self.decode, self.rows, columns)
        if not self.first_replica:
            for name in _V_COLUMNS:
                columns[name][:] = 0
        parts = [counts.sum(1), counts.sum(2), *(counts[:, :, row] for row in self.detail)]
        totals = torch.from_numpy(np.concatenate(parts, axis=1).T.reshape(-1))
        group = get_tp_group()
        if group.world_size > 1:
            torch.distributed.all_reduce(totals, group=group.cpu_group)
        return totals

    def _count_decodes(
        self, decode: DecodeStep, rows: RowPlan, columns: dict[str, np.ndarray[Any, Any]]
    ) -> None:
        """Write the columns of decode rows, and add to the counts per head."""
        where = (self.layers, slice(0, decode.num_decodes))
        group = self.num_heads // self.num_kv_heads
        visible, dense, mass = rows.visible.numpy(), decode.dense.numpy(), decode.kept_mass.numpy()
        target = rows.target.numpy() * ~dense
        # Of dense rows CPU_ATTN counts nothing.
        lists = np.where(dense[..., None], visible[..., None], decode.num_kept.numpy())
        read = lists.sum(2, dtype=np.int64)
        columns["rows"][where] = self.num_heads
        columns["keys_scored"][where] = visible * self.num_heads
        columns["keys_kept"][where] = read * group
        columns["v_rows_scored"][where] = visible * self.num_kv_heads
        columns["v_rows_read"][where] = read
        columns["keys_dense"][where] = read * group * (target == 0)
        columns["keys_target"][where] = target
        columns["kept_mass"][where] = np.rint(mass.sum(2, dtype=np.float64) * MASS_UNIT)
        columns["rows_lifted"][where] = (decode.lifts.numpy() > 0).sum(2) * group
        for name, values in rows.reasons.items():
            columns[name][where] = values.numpy() * self.num_heads
        self.heads.kept += lists.sum(1, dtype=np.int64)
        self.heads.scored += visible.sum(1, keepdims=True)
        self.heads.kept_mass += mass.sum(1, dtype=np.float64)
        self.heads.rows += decode.num_decodes
