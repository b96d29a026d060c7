"""Counts per layer and head since the start, kept in the worker and fetched on demand.

They are too many to travel with every output: vLLM's `collective_rpc("toptheta_heads")` asks for
them.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_toptheta.backend.counts import DecodeCounts, in_units
from vllm_toptheta.hooks import worker as worker_hook
from vllm_toptheta.kernels.columns import MASS_UNIT

_MAX_WAITING = 64


@dataclass
class HeadCounts:
    """Decode rows, dense ones included, of one builder.

    Attributes:
        engine: `VllmConfig.instance_id`; a process may have several.
        layers: index of every layer in the model.
        first_head: first query head of this rank; its kv heads follow from that.
        num_kv_heads: of this rank.
        sums: [num_layers, num_kv_heads + num_heads + 2] int64 where the attention runs: keys on the
            lists of kv heads, the share of a query head's attention that the kept keys have in
            units of 1 / MASS_UNIT, keys that rows see, as heads of a layer score alike, and rows.
        waiting: steps on a CPU that are not in `sums` yet.
    """

    engine: str
    layers: list[int]
    first_head: int
    num_kv_heads: int
    sums: Tensor
    waiting: list[DecodeCounts] = field(default_factory=list)

    def follow(self, step: DecodeCounts) -> None:
        """Count a step on a CPU, whose rows are yet to run."""
        if len(self.waiting) == _MAX_WAITING:
            self.count()
        self.waiting.append(step)

    def count(self) -> None:
        """Count the steps that wait, all of which have run."""
        held = self.sums.numpy()
        for step in self.waiting:
            kept, visible = step.kept, step.visible
            rows = np.full_like(visible[:, :1], visible.shape[1])
            mass = in_units(step.kept_mass).sum(1, dtype=np.float64)
            parts = [kept.sum(1), mass, visible.sum(1, keepdims=True), rows]
            held += np.concatenate(parts, 1).astype(np.int64)
        self.waiting = []

    def shown(self) -> dict[str, Any]:
        """In plain lists; `scored` in the shape of `kept`, `rows` one number per layer. Waits for
        the device."""
        if self.waiting:
            self.count()
        counts = self.sums.cpu().numpy()
        kept = counts[:, : self.num_kv_heads]
        return {
            "layers": self.layers,
            "first_head": self.first_head,
            "kept": kept.tolist(),
            "scored": np.broadcast_to(counts[:, -2:-1], kept.shape).tolist(),
            "kept_mass": (counts[:, self.num_kv_heads : -2] / MASS_UNIT).tolist(),
            "rows": counts[:, -1].tolist(),
        }


_published: list[HeadCounts] = []


def count_heads(
    engine: str,
    layers: list[int],
    first_head: int,
    num_heads: int,
    num_kv_heads: int,
    device: torch.device,
) -> HeadCounts:
    """Start counting for the layers of one builder.

    Args:
        engine: `VllmConfig.instance_id`.
        layers: their indices in the model.
        first_head, num_heads, num_kv_heads: of this rank.
        device: where the attention runs.
    """
    sums = torch.zeros(len(layers), num_kv_heads + num_heads + 2, dtype=torch.int64, device=device)
    counts = HeadCounts(engine, layers, first_head, num_kv_heads, sums)
    # A builder that is made again, as after a profiling run, replaces its predecessor.
    _published[:] = [
        held for held in _published if held.engine != engine or not set(held.layers) & set(layers)
    ]
    _published.append(counts)
    return counts


def publish() -> None:
    """Make the counts of this process reachable."""
    worker_hook.publish("toptheta_heads", toptheta_heads)


def toptheta_heads(worker: Any) -> list[dict[str, Any]]:
    """Counts of this worker, see `HeadCounts.shown`."""
    engine = worker.vllm_config.instance_id
    return [counts.shown() for counts in _published if counts.engine == engine]
