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
    """Decode rows, dense ones included, of one builder.

    Attributes:
        layers: index of every layer in the model.
        first_head: first query head of this rank; its kv heads follow from that.
        kept: [num_layers, num_kv_heads] int64, keys on the lists of kv heads.
        scored: [num_layers, 1] int64, keys that rows see; heads of a layer score alike.
        kept_mass: [num_layers, num_heads] float64, sum over rows of the share of a query head's
            attention that the kept keys have.
        rows: [num_layers, 1] int64.
    """

    layers: list[int]
    first_head: int
    kept: NDArray[np.int64]
    scored: NDArray[np.int64]
    kept_mass: NDArray[np.float64]
    rows: NDArray[np.int64]


_published: list[HeadCounts] = []


def publish_heads(
    layers: list[int], first_head: int, num_heads: int, num_kv_heads: int
) -> HeadCounts:
    """Start counting for the layers of one builder, and make the counts reachable.

    Args:
        layers: their indices in the model.
        first_head, num_heads, num_kv_heads: of this rank.
    """
    num_layers = len(layers)
    counts = HeadCounts(
        layers,
        first_head,
        kept=np.zeros((num_layers, num_kv_heads), dtype=np.int64),
        scored=np.zeros((num_layers, 1), dtype=np.int64),
        kept_mass=np.zeros((num_layers, num_heads)),
        rows=np.zeros((num_layers, 1), dtype=np.int64),
    )
    # A builder that is made again, as after a profiling run, replaces its predecessor.
    _published[:] = [held for held in _published if not set(held.layers) & set(layers)]
    _published.append(counts)
    with shielded("worker"):
        from vllm.v1.worker.worker_base import WorkerBase

        WorkerBase.toptheta_heads = toptheta_heads
    return counts


def toptheta_heads(worker: Any = None) -> list[dict[str, Any]]:
    """Counts of this worker, as `HeadCounts` in plain lists; `scored` in the shape of `kept`,
    `rows` one number per layer."""
    return [
        {
            "layers": counts.layers,
            "first_head": counts.first_head,
            "kept": counts.kept.tolist(),
            "scored": np.broadcast_to(counts.scored, counts.kept.shape).tolist(),
            "kept_mass": counts.kept_mass.tolist(),
            "rows": counts.rows[:, 0].tolist(),
        }
        for counts in _published
    ]
