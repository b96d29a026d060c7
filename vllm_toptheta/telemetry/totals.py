"""The counts of an engine step on their way from its attention steps to the step's record."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_toptheta.kernels.columns import COLUMNS
from vllm_toptheta.telemetry.ledger import StepRecord
from vllm_toptheta.telemetry.shield import take_failures


def add_up(steps: list[Any], received: list[Tensor]) -> Tensor | None:
    """One tensor of what all layers of an engine step counted; None where nobody counted.

    Args:
        steps: of every metadata builder. Each has `totals()`, a flat int64 tensor of `num_reqs` +
            `num_layers` + `num_layers` * len(`detail`) rows of COLUMNS (requests, layers, and the
            layers of each request in `detail`), summed over tensor-parallel ranks. It is on the
            step's device, which nothing has to wait for.
        received: the same of earlier pipeline stages.
    """
    parts = [*received, *(step.totals() for step in steps)]
    if not parts:
        return None
    # On the device of this stage's own steps, where it has attention layers.
    total: Tensor = parts[-1]
    for part in parts[:-1]:
        total = total + part.to(total.device)
    return total


@dataclass
class Totals:
    """The counts of a step on their way from the device. They outlive the step, whose tensors are
    large where prompts are pruned.

    Attributes:
        request_ids: the rows of the batch, without padding.
        num_reqs, num_layers, detail: of any of the attention steps that were added up.
        counts: from `add_up`, on the host.
        copied: happens when `counts` is there; None where it is already.
    """

    request_ids: list[str]
    num_reqs: int
    num_layers: int
    detail: list[int]
    counts: Tensor
    copied: "torch.cuda.Event | None"

    @classmethod
    def of(cls, counts: Tensor, request_ids: list[str], step: Any) -> "Totals":
        """Start the copy to the host, without waiting for it.

        Args:
            counts: from `add_up`.
            request_ids: the rows of the batch, without padding.
            step: any of the attention steps.
        """
        copied = None
        if counts.device.type != "cpu":
            host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            counts = host.copy_(counts, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return cls(request_ids, step.num_reqs, step.num_layers, step.detail, counts, copied)

    def record(self) -> StepRecord:
        """Wait for the counts, and sort them."""
        if self.copied is not None:
            self.copied.synchronize()
        num_requests, num_layers = self.num_reqs, self.num_layers
        lines = self.counts.view(-1, len(COLUMNS)).numpy()
        first_detail = num_requests + num_layers
        starts = range(first_detail, len(lines), num_layers)
        detail = {
            self.request_ids[row]: lines[start : start + num_layers]
            for row, start in zip(self.detail, starts, strict=True)
        }
        # Padding rows belong to no request.
        return StepRecord(
            self.request_ids,
            lines[:num_requests][: len(self.request_ids)],
            lines[num_requests:first_detail],
            detail,
            take_failures("worker"),
        )
