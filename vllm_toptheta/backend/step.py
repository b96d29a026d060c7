"""What the counters need of one GPU step: totals per request and per layer.

Everything runs on the device, in the order of its stream, and nothing waits for it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from vllm_toptheta.backend.gpu_tensors import StepRows, StepTensors
from vllm_toptheta.kernels.triton.counts import count_step
from vllm_toptheta.telemetry.counters import FIELDS


@dataclass
class GPUStepCounts:
    """One attention step of one builder's layers, as `StepLog.append` wants it.

    Attributes:
        tensors: the builder's; they hold this step until its next one.
        rows: query tokens that our kernels attend, or None.
        query_start_loc: [num_reqs + 1] int32 on the device.
        seq_lens: [num_reqs] int32 on the device, 0 for padding.
        detail: batch rows of the requests that asked for counts per layer.
    """

    tensors: StepTensors
    rows: StepRows | None
    query_start_loc: Tensor
    seq_lens: Tensor
    detail: list[int]

    @property
    def num_reqs(self) -> int:
        return len(self.seq_lens)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.tensors.plan.identity.num_layers

    def totals(self) -> Tensor:
        """Counts as `StepLog.append` wants them, on the device, of all tensor-parallel ranks."""
        shape = (self.num_reqs, self.num_layers, len(FIELDS))
        counts = torch.zeros(shape, dtype=torch.int64, device=self.seq_lens.device)
        count_step(
            self.seq_lens,
            self.query_start_loc,
            self.tensors.layers,
            self.tensors.counted(self.rows),
            num_single=0 if self.rows is None else self.rows.num_single,
            prunes_prompts=self.tensors.plan.targets.prefill is not None,
            counts_kv_heads=self.tensors.counts_kv_heads,
            out=counts,
        )
        parts = [counts.sum(1), counts.sum(0), *(counts[row] for row in self.detail)]
        totals = torch.cat(parts).flatten()
        group = get_tp_group()
        if group.world_size > 1:
            # Every rank comes by here in the same step, after the last layer.
            torch.distributed.all_reduce(totals, group=group.device_group)
        return totals
