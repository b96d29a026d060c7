"""Per-request counters of one worker: totals of every step in, cumulative summaries per request out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

FIELDS = (
    "rows",
    "keys_scored",
    "keys_kept",
    "v_rows_scored",
    "v_rows_read",
    "dense_short",
    "dense_window",
    "dense_layer",
    "dense_prefill",
)
"""Columns of a step's totals. A row is one token in one layer and one query head. `rows`, `keys_*` and `v_rows_*` cover
decode rows, dense ones included; V rows are counted per kv head. `dense_*` counts rows that planned to run dense:
short (at most min_kv_len or k keys), window (the layer's window is not larger than k), layer (excluded by an option),
prefill (prompt tokens)."""

DENSE_REASONS = tuple(name.removeprefix("dense_") for name in FIELDS if name.startswith("dense_"))


@dataclass
class RequestCounters:
    """Cumulative counters by request id.

    Attributes:
        k: mean keys a row keeps, as configured; part of every summary.
    """

    k: float
    _totals: dict[str, list[int]] = field(default_factory=dict)

    def add(self, request_ids: Sequence[str], totals: Sequence[Sequence[int]]) -> None:
        """Add one step.

        Args:
            request_ids: the request of every batch row.
            totals: one list per batch row, columns as in FIELDS.
        """
        for request_id, row in zip(request_ids, totals, strict=False):
            held = self._totals.setdefault(request_id, [0] * len(FIELDS))
            for column, value in enumerate(row):
                held[column] += value

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop requests that have left the engine."""
        for request_id in request_ids:
            self._totals.pop(request_id, None)

    def summary(self, request_id: str) -> dict[str, object] | None:
        """What the response shows for one request, or None where nothing was counted."""
        row = self._totals.get(request_id)
        return None if row is None else summarise(self.k, row)


def summarise(k: float, row: Sequence[int]) -> dict[str, object]:
    """Turn one row of counters into the object a response carries.

    Args:
        k: mean keys a row keeps, as configured.
        row: columns as in FIELDS.
    """
    counts = dict(zip(FIELDS, row, strict=True))
    dense = {reason: counts.pop(f"dense_{reason}") for reason in DENSE_REASONS}
    return {
        "k": k,
        **counts,
        "kept_fraction": _ratio(counts["keys_kept"], counts["keys_scored"]),
        "v_row_fraction": _ratio(counts["v_rows_read"], counts["v_rows_scored"]),
        "dense_rows": dense,
    }


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None
