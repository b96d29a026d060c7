"""Counts per layer and head since the start, kept in the worker and fetched on demand.

They are too many to travel with every output. vLLM's `collective_rpc("toptheta_heads")` reaches a
method that is put on the worker class here; it can go when backends may publish one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta.telemetry.shield import shielded


@dataclass
class HeadCounts:
    """Keys of decode rows, dense ones included, of one builder.

    Attributes:
        layers: index of every layer in the model.
        first_head: first query head of this rank.
        kept: [num_layers, num_heads] int64.
        scored: [num_layers, 1] int64; heads of a layer score alike.
    """

    layers: list[int]
    first_head: int
    kept: NDArray[np.int64]
    scored: NDArray[np.int64]


_published: list[HeadCounts] = []


def publish_heads(layers: list[int], first_head: int, num_heads: int) -> HeadCounts:
    """Start counting for the layers of one builder, and make the counts reachable."""
    kept = np.zeros((len(layers), num_heads), dtype=np.int64)
    counts = HeadCounts(layers, first_head, kept, np.zeros((len(layers), 1), dtype=np.int64))
    # A builder that is made again, as after a profiling run, replaces its predecessor.
    _published[:] = [held for held in _published if not set(held.layers) & set(layers)]
    _published.append(counts)
    with shielded("worker"):
        from vllm.v1.worker.worker_base import WorkerBase

        WorkerBase.toptheta_heads = toptheta_heads
    return counts


def toptheta_heads(worker: Any = None) -> list[dict[str, Any]]:
    """Counts of this worker, as `HeadCounts` in plain lists."""
    return [
        {
            "layers": counts.layers,
            "first_head": counts.first_head,
            "kept": counts.kept.tolist(),
            "scored": np.broadcast_to(counts.scored, counts.kept.shape).tolist(),
        }
        for counts in _published
    ]
