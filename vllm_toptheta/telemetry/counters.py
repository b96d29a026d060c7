"""How counts are shown: columns of integers in, the object of a response out."""

import operator
from collections.abc import Sequence
from typing import Any

from vllm_toptheta.kernels.columns import COLUMNS, MASS_UNIT
from vllm_toptheta.requests import Target, Targets

SHOWN = ("rows", "keys_scored", "keys_kept", "v_rows_scored", "v_rows_read", "rows_lifted")
SHOWN_PREFILL = (
    "prefill_rows",
    "prefill_keys_scored",
    "prefill_keys_kept",
    "prefill_v_tiles",
    "prefill_v_tiles_read",
)
PREFILL = "prefill_"
DENSE_REASONS = tuple(name.removeprefix("dense_") for name in COLUMNS if name.startswith("dense_"))

Counts = list[int]
"""One number per column of COLUMNS."""

Named = dict[str, int]
"""The same by name."""


def zeros() -> Counts:
    """No counts."""
    return [0] * len(COLUMNS)


def add(into: Counts, more: Sequence[int]) -> None:
    """Add counts in place."""
    into[:] = map(operator.add, into, more)


def by_name(counts: Sequence[int]) -> Named:
    """Counts as a mapping."""
    return dict(zip(COLUMNS, counts, strict=True))


def summarise(targets: Targets, counts: Sequence[int]) -> dict[str, Any]:
    """Turn counts into the object a response shows.

    Args:
        targets: what the rows ran with.
        counts: columns as in COLUMNS.
    """
    named, decode = by_name(counts), targets.decode
    return {
        "k": decode and decode.k,
        "min_prob": decode and decode.min_prob,
        "min_mass": decode and decode.min_mass,
        **{name: named[name] for name in SHOWN},
        **_ratios(named),
        "v_row_reduction": ratio(named["v_rows_scored"], named["v_rows_read"]),
        "target_ratio": target_ratio(named),
        "prefill": _prefill(targets.prefill, named),
        "dense_rows": {reason: named[f"dense_{reason}"] for reason in DENSE_REASONS},
    }


def _prefill(target: Target | None, named: Named) -> dict[str, Any] | None:
    """What was counted of prompt rows; None where nobody counted them."""
    if not named["prefill_rows"]:
        return None
    return {
        "k": target and target.k,
        "min_prob": target and target.min_prob,
        **{name.removeprefix(PREFILL): named[name] for name in SHOWN_PREFILL},
        **_ratios(named, PREFILL),
        "v_tiles_skipped": named["prefill_v_tiles"] - named["prefill_v_tiles_read"],
    }


def _ratios(named: Named, phase: str = "") -> dict[str, float | None]:
    """What rows kept of their keys, and of their attention."""
    return {
        "kept_fraction": ratio(named[f"{phase}keys_kept"], named[f"{phase}keys_scored"]),
        "kept_mass": kept_mass(named, phase),
    }


def kept_mass(named: Named, phase: str = "") -> float | None:
    """Mean share of their attention that rows kept.

    Args:
        named: counts by name.
        phase: "" for decode rows, PREFILL for prompt rows.
    """
    return ratio(named[f"{phase}kept_mass"], MASS_UNIT * named[f"{phase}rows"])


def summarise_layers(layers: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
    """Turn the counts of every layer into arrays, one entry per layer."""
    shown = [
        {name: named[name] for name in SHOWN}
        | _ratios(named)
        | {"target_ratio": target_ratio(named)}
        for named in map(by_name, layers)
    ]
    return {name: [line[name] for line in shown] for name in shown[0]}


def target_ratio(named: Named) -> float | None:
    """Keys kept by rows under a k, over the keys they were meant to keep."""
    return ratio(named["keys_kept"] - named["keys_dense"], named["keys_target"])


def ratio(part: int, whole: int) -> float | None:
    """A fraction rounded for people, None where there is nothing to divide by."""
    return round(part / whole, 6) if whole else None
