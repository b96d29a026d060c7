"""One step of one builder on a GPU: its metadata, and what it counts. Everything runs on the
device, in the order of its stream, and nothing waits for it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_toptheta.backend.counts import StepCounts
from vllm_toptheta.backend.gpu_tensors import StepRows, StepTensors
from vllm_toptheta.backend.heads import HeadCounts
from vllm_toptheta.kernels.columns import COLUMNS
from vllm_toptheta.kernels.triton.counts import count_step


@dataclass
class TopThetaGPUMetadata:
    """One step's attention metadata for the layers of one builder.

    Attributes:
        rows: the tokens that run on our kernels, or None.
        stock: other requests, before and behind the single-token ones, as batches of their own:
            their tokens, and the metadata of vLLM's kernel.
    """

    rows: StepRows | None
    stock: list[tuple[slice, Any]]


@dataclass
class GPUStepCounts(StepCounts):
    """One attention step on a GPU.

    Attributes:
        tensors: the builder's; they hold this step until its next one.
        heads: counts per head since the start, of this builder; updated by `lines`.
        rows: query tokens that our kernels attend, or None.
        query_start_loc: [num_reqs + 1] int32 on the device.
        seq_lens: [num_reqs] int32 on the device, 0 for padding.
    """

    GROUP = "device_group"

    tensors: StepTensors
    heads: HeadCounts
    rows: StepRows | None
    query_start_loc: Tensor
    seq_lens: Tensor

    @classmethod
    def of(
        cls,
        tensors: StepTensors,
        heads: HeadCounts,
        rows: StepRows | None,
        cam: Any,
        detail: list[int],
    ) -> "GPUStepCounts":
        """What counts of a batch, vLLM's `CommonAttentionMetadata`."""
        return cls(
            len(cam.seq_lens),
            tensors.plan.identity.num_layers,
            detail,
            tensors.rank,
            tensors,
            heads,
            rows,
            cam.query_start_loc,
            cam.seq_lens,
        )

    def lines(self, *others: Any) -> Tensor:
        shape = (self.num_reqs, self.num_layers, len(COLUMNS))
        counts = torch.zeros(shape, dtype=torch.int64, device=self.seq_lens.device)
        count_step(
            self.seq_lens,
            self.query_start_loc,
            self.tensors.layers,
            self.tensors.counted(self.rows),
            single=slice(0, 0)
            if self.rows is None
            else slice(self.rows.first, self.rows.first + self.rows.num_single),
            skipped=0 if self.rows is None else self.rows.single.start - self.rows.single_at.start,
            prunes_prompts=self.tensors.plan.targets.prefill is not None,
            out=counts,
            heads=self.heads.sums,
        )
        return torch.cat([counts.sum(1), counts.sum(0), *(counts[row] for row in self.detail)])
