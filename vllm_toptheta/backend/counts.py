"""The counts of one attention step, on either device: which rows of a step count as what is for the
targets to say, in their own units; what these mean in COLUMNS is said here, once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from vllm_toptheta.kernels.columns import MASS_UNIT, UNITS, Unit


@dataclass(frozen=True)
class RankHeads:
    """Heads of one tensor-parallel rank.

    Attributes:
        num_heads, num_kv_heads: query and kv heads.
        first_replica: whether no lower rank holds the same kv heads.
    """

    num_heads: int
    num_kv_heads: int
    first_replica: bool

    @classmethod
    def of(cls, identity: Any, num_heads: int, num_kv_heads: int, rank: int) -> "RankHeads":
        """Those of a rank.

        Args:
            identity: the model's `ModelIdentity`.
            num_heads, num_kv_heads: of each rank.
            rank: which.
        """
        shared_by = identity.num_heads // identity.num_kv_heads
        return cls(num_heads, num_kv_heads, rank * num_heads % shared_by == 0)

    def units(self, device: torch.device) -> Tensor:
        """[len(COLUMNS)] int64, what a count of a kernel stands for."""
        of_unit: dict[Unit, int] = {
            "": 1,
            "heads": self.num_heads,
            "group": self.num_heads // self.num_kv_heads,
            "kv_heads": self.num_kv_heads * self.first_replica,
            "lists": int(self.first_replica),
        }
        return torch.tensor([of_unit[unit] for unit in UNITS.values()], device=device)


@dataclass
class StepCounts(ABC):
    """One attention step of one builder's layers, as `telemetry/totals.py` wants it.

    Attributes:
        num_reqs: requests of the batch, padding included.
        num_layers: layers of the model.
        detail: batch rows of the requests that asked for counts per layer.
        units: from `RankHeads.units`.
        GROUP: which of vLLM's groups of a rank's peers adds up.
    """

    GROUP: ClassVar[str]

    num_reqs: int
    num_layers: int
    detail: list[int]
    units: Tensor

    @abstractmethod
    def lines(self) -> Tensor:
        """[num_lines, len(COLUMNS)] int64 counts of this rank, in UNITS: of requests, of layers,
        and of the layers of each request in `detail`. Runs after the last layer."""

    def totals(self) -> Tensor:
        """Counts of all tensor-parallel ranks, in one run of the lines."""
        totals = (self.lines() * self.units).flatten()
        group = get_tp_group()
        if group.world_size > 1:
            # Every rank comes by here in the same step, after the last layer.
            torch.distributed.all_reduce(totals, group=getattr(group, self.GROUP))
        return totals


def in_units(kept_mass: Tensor) -> Tensor:
    """Shares in whole units of 1 / MASS_UNIT, as the GPU's counters round them; float32, of which
    sums belong in float64."""
    # NumPy: half the time of torch.
    return torch.from_numpy(np.floor(kept_mass.numpy() * MASS_UNIT + 0.5))
