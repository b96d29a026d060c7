"""The counts of an engine step on their way from its attention steps to the ledger."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_toptheta.kernels.columns import COLUMNS


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
class StepRecord:
    """What engine steps of one batch counted.

    Attributes:
        requests: [num_requests, len(COLUMNS)] counts of each.
        layers: [num_layers, len(COLUMNS)] counts of each layer, all requests together.
        detail: [num_layers, len(COLUMNS)] counts of each layer, of requests that asked for them.
    """

    requests: NDArray[np.int64]
    layers: NDArray[np.int64]
    detail: dict[str, NDArray[np.int64]]


@dataclass
class Totals:
    """The counts of an engine step on their way to the ledger, which may be in another process.

    Attributes:
        request_ids: the rows of the batch, without padding; empty where nothing was counted.
        num_reqs, num_layers, detail: of any of the attention steps that were added up.
        counts: from `add_up`, on the host; None while `steps` has them.
        copied: happens when `counts` is there; None where it is already.
        steps: attention steps that wait.
        failures: telemetry failures in the worker since the last ones that were told.
    """

    request_ids: list[str]
    num_reqs: int = 0
    num_layers: int = 0
    detail: list[int] = field(default_factory=list)
    counts: NDArray[np.int64] | None = None
    copied: "torch.cuda.Event | None" = None
    steps: list[Any] = field(default_factory=list)
    failures: int = 0

    @classmethod
    def of(cls, steps: list[Any], received: list[Tensor]) -> "Totals | None":
        """Of an engine step, whose requests are to be named; None where nobody counted. Steps that
        do not wait are added up, and their copy to the host starts, which nothing waits for.

        Args:
            steps, received: see `add_up`.
        """
        if not steps and not received:
            return None
        step = steps[-1]
        totals = cls([], step.num_reqs, step.num_layers, step.detail)
        if not received and all(getattr(one, "waits", False) for one in steps):
            totals.steps = steps
            return totals
        # First of all: ranks add up together, and one that failed before would let others wait.
        counts = add_up(steps, received)
        assert counts is not None
        if counts.device.type != "cpu":
            host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            counts = host.copy_(counts, non_blocking=True)
            totals.copied = torch.cuda.Event()
            totals.copied.record()
        totals.counts = counts.numpy()
        return totals

    def follows(self, before: "Totals") -> bool:
        """Whether it can be added to what an earlier engine step counted."""
        return (
            self.request_ids == before.request_ids
            and self.detail == before.detail
            and (self.num_reqs, len(self.steps)) == (before.num_reqs, len(before.steps))
        )

    def together(self, others: list["Totals"]) -> StepRecord:
        """Wait for the counts, add those of engine steps that follow, and sort them."""
        totals = [self, *others]
        # Builders are asked in the same order in every engine step.
        by_builder = zip(*(one.steps for one in totals), strict=True)
        parts = [first.of_rank(*rest).numpy() for first, *rest in by_builder]
        for one in totals:
            one.wait()
            if one.counts is not None:
                parts.append(one.counts)
        num_requests, num_layers = self.num_reqs, self.num_layers
        lines = np.sum(parts, 0).reshape(-1, len(COLUMNS))
        first_detail = num_requests + num_layers
        starts = range(first_detail, len(lines), num_layers)
        detail = {
            self.request_ids[row]: lines[start : start + num_layers]
            for row, start in zip(self.detail, starts, strict=True)
        }
        # Padding rows belong to no request.
        requests = lines[:num_requests][: len(self.request_ids)]
        return StepRecord(requests, lines[num_requests:first_detail], detail)

    def wait(self) -> None:
        """Wait for the counts to be on the host."""
        if self.copied is not None:
            self.copied.synchronize()
            self.copied = None

    def __getstate__(self) -> dict[str, Any]:
        self.wait()
        return self.__dict__
