"""What the counters need of one GPU step: kept counts and dense codes on the device in, totals per
request and per layer out.

The sums run on the device and only they are copied, so that nothing waits for the GPU before the
totals are asked for.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from vllm_toptheta.backend.gpu_tensors import PROMPT, StepTensors
from vllm_toptheta.kernels.triton_theta import (
    DENSE_LAYER,
    DENSE_ROW,
    DENSE_SHORT,
    DENSE_WINDOW,
)
from vllm_toptheta.telemetry.counters import FIELDS

_DENSE_FIELDS = {
    "dense_short": DENSE_SHORT,
    "dense_window": DENSE_WINDOW,
    "dense_layer": DENSE_LAYER,
}


@dataclass
class GPUStepCounts:
    """One attention step of one builder's layers, as `StepLog.append` wants it.

    Attributes:
        tensors: the builder's; they hold this step until its next one.
        prefill_lens: [num_reqs] int64 on the CPU, tokens of every request that vLLM's own kernel
            attends.
        seq_lens: [num_decodes] int32, rows of the Top-theta kernel; they come first in the batch.
        layers: the builder's layers among all layers of the model.
        num_layers: layers of the model.
        detail: batch rows of the requests that asked for counts per layer.
    """

    tensors: StepTensors
    prefill_lens: Tensor
    seq_lens: Tensor
    layers: list[int]
    num_layers: int
    detail: list[int]
    _copied: Tensor | None = field(default=None, init=False)
    _event: "torch.cuda.Event | None" = field(default=None, init=False)

    @property
    def num_reqs(self) -> int:
        return len(self.prefill_lens)

    def begin_copy(self) -> None:
        """Enqueue the sums and their copy to the host; to be called after the step's last layer was
        launched.
        """
        counts = self._device_counts()
        sums = torch.cat([counts.sum(1), counts.sum(2), *self._details(counts)], dim=1)
        if sums.device.type == "cpu":
            self._copied = sums
            return
        self._copied = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
        self._copied.copy_(sums, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def totals(self) -> Tensor:
        """Counts as `StepLog.append` wants them, summed over tensor-parallel ranks."""
        num_decodes, num_ours = len(self.seq_lens), len(self.layers)
        sizes = [self.num_reqs, self.num_layers, *[self.num_layers] * len(self.detail)]
        parts = list(torch.zeros(len(FIELDS), sum(sizes), dtype=torch.int64).split(sizes, dim=1))
        prefill = FIELDS.index("dense_prefill")
        rows = self.prefill_lens * self.tensors.shape.num_heads
        parts[0][prefill] = rows * num_ours
        parts[1][prefill, self.layers] = rows.sum()
        for part, row in zip(parts[2:], self.detail, strict=True):
            part[prefill, self.layers] = rows[row]
        if num_decodes:
            if self._copied is None:
                self.begin_copy()
            if self._event is not None:
                self._event.synchronize()
            assert self._copied is not None
            decoded = [row for row in self.detail if row < num_decodes]
            ours = self._copied.split([num_decodes, num_ours, *[num_ours] * len(decoded)], dim=1)
            parts[0][:, :num_decodes] += ours[0]
            parts[1][:, self.layers] += ours[1]
            for row, counts in zip(decoded, ours[2:], strict=True):
                parts[2 + self.detail.index(row)][:, self.layers] += counts
        totals = torch.cat(parts, dim=1).T.reshape(-1).contiguous()
        group = get_tp_group()
        if group.world_size > 1:
            torch.distributed.all_reduce(totals, group=group.cpu_group)
        return totals

    def _details(self, counts: Tensor) -> list[Tensor]:
        return [counts[:, :, row] for row in self.detail if row < len(self.seq_lens)]

    def _device_counts(self) -> Tensor:
        """[len(FIELDS), num_layers, num_decodes] int64; rows of padding are zero."""
        num_decodes, tensors = len(self.seq_lens), self.tensors
        num_heads, num_kv_heads = tensors.shape.num_heads, tensors.shape.num_kv_heads
        dense = tensors.dense[:, :num_decodes]
        num_kept = tensors.num_kept[:, :num_decodes].sum(2)
        v_rows_read = tensors.v_rows_read[:, :num_decodes].sum(2)
        is_row = self.seq_lens > 0
        is_prompt = (dense == DENSE_ROW) & (tensors.row_dense[:num_decodes] == PROMPT)
        is_off = (dense == DENSE_ROW) & ~is_prompt
        counted = (is_row & ~is_prompt).to(torch.int64)
        visible = torch.minimum(self.seq_lens, tensors.layer_window[:, None]) * counted
        target = torch.minimum(tensors.head_k(num_decodes), visible[..., None]).sum(2)
        columns = {
            "rows": counted * num_heads,
            "keys_scored": visible * num_heads,
            "keys_kept": num_kept * counted,
            "v_rows_scored": visible * num_kv_heads,
            "v_rows_read": v_rows_read * counted,
            "keys_dense": visible * (dense != 0) * num_heads,
            "keys_target": target * (dense == 0),
            "dense_off": (is_off & is_row) * num_heads,
            "dense_prefill": (is_prompt & is_row) * num_heads,
        }
        for name, code in _DENSE_FIELDS.items():
            columns[name] = ((dense == code) & is_row) * num_heads
        # The columns of pruned prompt rows stay zero: prompts run dense on a GPU.
        nothing = torch.zeros_like(counted)
        return torch.stack([columns.get(name, nothing).to(torch.int64) for name in FIELDS])
