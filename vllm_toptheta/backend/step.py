"""What the counters need of one GPU step: counts and dense codes on the device in, totals per
request and per layer out.

Everything runs on the device, in the order of its stream, and nothing waits for it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from vllm_toptheta.backend.gpu_tensors import StepTensors
from vllm_toptheta.backend.prompts import PromptRows
from vllm_toptheta.kernels.triton_counts import CountedPrompts, count_step
from vllm_toptheta.telemetry.counters import FIELDS


@dataclass
class GPUStepCounts:
    """One attention step of one builder's layers, as `StepLog.append` wants it.

    Attributes:
        tensors: the builder's; they hold this step until its next one.
        num_rows: single-token rows; they come first in the batch.
        prompts: the tokens of the other requests, or None where vLLM's own kernel attends them.
        query_start_loc: [num_reqs + 1] int32 on the device.
        seq_lens: [num_reqs] int32 on the device, 0 for padding.
        num_layers: layers of the model.
        detail: batch rows of the requests that asked for counts per layer.
    """

    tensors: StepTensors
    num_rows: int
    prompts: PromptRows | None
    query_start_loc: Tensor
    seq_lens: Tensor
    num_layers: int
    detail: list[int]

    @property
    def num_reqs(self) -> int:
        return len(self.seq_lens)

    def totals(self) -> Tensor:
        """Counts as `StepLog.append` wants them, on the device."""
        totals = self.of_this_rank()
        group = get_tp_group()
        if group.world_size > 1:
            # Every rank comes by here in the same step, after the last layer.
            torch.distributed.all_reduce(totals, group=group.device_group)
        return totals

    def of_this_rank(self) -> Tensor:
        """`totals` of the heads of this tensor-parallel rank."""
        shape = (self.num_reqs, self.num_layers, len(FIELDS))
        counts = torch.zeros(shape, dtype=torch.int64, device=self.seq_lens.device)
        phases, prompts = self.tensors.plan.config.phases, None
        if self.prompts is not None:
            prompts = CountedPrompts(
                self.prompts.dense, self.prompts.num_kept, self.prompts.v_tiles_read
            )
        count_step(
            self.seq_lens,
            self.query_start_loc,
            self.tensors.layers,
            self.tensors.counted(self.num_rows),
            prompts,
            prunes_prompts=phases != "decode",
            prunes_generated=phases != "prefill",
            out=counts,
        )
        parts = [counts.sum(1), counts.sum(0), *(counts[row] for row in self.detail)]
        return torch.cat(parts).flatten()
