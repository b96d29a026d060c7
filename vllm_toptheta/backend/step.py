"""What the counters need of one GPU step: kept counts and dense codes on the device in, totals per
request out.

The sums run on the device and only one small row per request is copied, so that nothing waits for
the GPU before the totals are asked for.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

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
    """One attention step of one builder's layers; the tensors are the builder's own and live until
    its next step.

    Attributes:
        prefill_lens: [num_reqs] int64 on the CPU, tokens of every request that vLLM's own kernel
            attends.
        num_decodes: rows of the Top-theta kernel; they come first in the batch.
        seq_lens: [num_decodes] int32.
        layer_window: [num_layers] int32, keys a row sees at most.
        dense: [num_layers, num_decodes] int8, codes of `lookup_theta`.
        num_kept: [num_layers, num_decodes, num_heads] int32.
        v_rows_read: [num_layers, num_decodes, num_kv_heads] int32.
    """

    prefill_lens: Tensor
    num_decodes: int
    seq_lens: Tensor
    layer_window: Tensor
    dense: Tensor
    num_kept: Tensor
    v_rows_read: Tensor
    _copied: Tensor | None = field(default=None, init=False)
    _event: "torch.cuda.Event | None" = field(default=None, init=False)

    def begin_copy(self) -> None:
        """Enqueue the sums and their copy to the host; to be called after the step's last layer was
        launched.
        """
        sums = self._device_totals()
        if sums.device.type == "cpu":
            self._copied = sums
            return
        self._copied = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
        self._copied.copy_(sums, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def totals(self) -> list[list[int]]:
        """Totals over layers and heads, summed over tensor-parallel ranks.

        Returns:
            One list per request of the batch, columns as in FIELDS.
        """
        num_layers, _, num_heads = self.num_kept.shape
        totals = torch.zeros(len(self.prefill_lens), len(FIELDS), dtype=torch.int64)
        totals[:, FIELDS.index("dense_prefill")] = self.prefill_lens * (num_layers * num_heads)
        if self.num_decodes:
            if self._copied is None:
                self.begin_copy()
            if self._event is not None:
                self._event.synchronize()
            assert self._copied is not None
            totals[: self.num_decodes] += self._copied
        group = get_tp_group()
        if group.world_size > 1:
            torch.distributed.all_reduce(totals, group=group.cpu_group)
        return totals.tolist()

    def _device_totals(self) -> Tensor:
        """[num_decodes, len(FIELDS)] int64; rows of padding are zero."""
        num_heads, num_kv_heads = self.num_kept.shape[2], self.v_rows_read.shape[2]
        is_row = self.seq_lens > 0
        is_prompt = self.dense == DENSE_ROW
        counted = (is_row & ~is_prompt).to(torch.int64)
        visible = torch.minimum(self.seq_lens, self.layer_window[:, None]) * counted
        columns = {name: torch.zeros_like(counted[0]) for name in FIELDS}
        columns["rows"] = counted.sum(0) * num_heads
        columns["keys_scored"] = visible.sum(0) * num_heads
        columns["v_rows_scored"] = visible.sum(0) * num_kv_heads
        columns["keys_kept"] = (self.num_kept.sum(2) * counted).sum(0)
        columns["v_rows_read"] = (self.v_rows_read.sum(2) * counted).sum(0)
        columns["dense_prefill"] = (is_prompt & is_row).sum(0) * num_heads
        for name, code in _DENSE_FIELDS.items():
            columns[name] = ((self.dense == code) & is_row).sum(0) * num_heads
        return torch.stack([columns[name] for name in FIELDS], dim=1)
