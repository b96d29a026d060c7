"""The counts of one attention step, on either device: which rows of a step count as what is for the
targets to say, in their own units; what these mean in COLUMNS is said here, once.
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.distributed import get_tp_group

from vllm_toptheta.backend.dial import KindRows
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

    @functools.lru_cache  # noqa: B019  (a handful of ranks)
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
class DecodeCounts:
    """What the decode rows of a step on a CPU do, and what they did once they have run. NumPy,
    which travels between processes at little cost.

    Attributes:
        kinds: what they are to do.
        num_kept, lifts: [num_layers, num_rows, num_kv_heads] int32, as the kernel writes them.
        kept_mass: [num_layers, num_rows, num_heads] float32, the same.
        on_stock: [num_layers, num_rows] bool, rows that CPU_ATTN ran, which counts nothing; None
            for none.
    """

    kinds: KindRows
    num_kept: NDArray[np.int32]
    lifts: NDArray[np.int32]
    kept_mass: NDArray[np.float32]
    on_stock: NDArray[np.bool_] | None = None

    @property
    def num_rows(self) -> int:
        """Decode rows."""
        return self.num_kept.shape[1]

    @property
    def visible(self) -> NDArray[np.int64]:
        """[num_layers, num_rows] keys that rows see."""
        return self.kinds.visible[self.kinds.of_layer]

    @property
    def kept(self) -> NDArray[Any]:
        """[num_layers, num_rows, num_kv_heads] keys on lists."""
        if self.on_stock is None:
            return self.num_kept
        return np.where(self.on_stock[..., None], self.visible[..., None], self.num_kept)


@dataclass
class StepCounts(ABC):
    """One attention step of one builder's layers, as `telemetry/totals.py` wants it.

    Attributes:
        num_reqs: requests of the batch, padding included.
        num_layers: layers of the model.
        detail: batch rows of the requests that asked for counts per layer.
        rank: heads of this rank.
        GROUP: which of vLLM's groups of a rank's peers adds up.
    """

    GROUP: ClassVar[str]

    num_reqs: int
    num_layers: int
    detail: list[int]
    rank: RankHeads

    @property
    def waits(self) -> bool:
        """Whether it may be sent to another process, and asked there, later, for its counts."""
        return self.is_small and get_tp_group().world_size == 1

    @property
    def is_small(self) -> bool:
        """Whether it is small enough for that, and on the host."""
        return False

    @abstractmethod
    def lines(self, *others: Any) -> Tensor:
        """[num_lines, len(COLUMNS)] int64 counts of this rank, in UNITS: of requests, of layers,
        and of the layers of each request in `detail`. Runs after the last layer.

        Args:
            others: more steps that wait, of the same builder and the same batch.
        """

    def of_rank(self, *others: Any) -> Tensor:
        """Counts of this rank, in one run of the lines, see there."""
        lines = self.lines(*others)
        return (lines * self.rank.units(lines.device)).flatten()

    def totals(self) -> Tensor:
        """Counts of all tensor-parallel ranks, in one run of the lines."""
        totals = self.of_rank()
        group = get_tp_group()
        if group.world_size > 1:
            # Every rank comes by here in the same step, after the last layer.
            torch.distributed.all_reduce(totals, group=getattr(group, self.GROUP))
        return totals


def in_units(kept_mass: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shares in whole units of 1 / MASS_UNIT, as the GPU's counters round them; sums of them belong
    in float64."""
    return np.floor(kept_mass * np.float32(MASS_UNIT) + np.float32(0.5))
