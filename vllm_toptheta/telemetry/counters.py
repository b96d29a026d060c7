"""What is counted, and how it is shown: columns of integers in, the object of a response out."""

import operator
from collections.abc import Sequence
from typing import Any

from vllm_toptheta.request_options import TargetK

FIELDS = (
    "rows",
    "keys_scored",
    "keys_kept",
    "v_rows_scored",
    "v_rows_read",
    "keys_dense",
    "keys_target",
    "dense_short",
    "dense_window",
    "dense_layer",
    "dense_off",
    "dense_prefill",
    "prefill_rows",
    "prefill_keys_scored",
    "prefill_keys_kept",
    "prefill_v_tiles",
    "prefill_v_tiles_read",
)
"""Columns of all counts. A row is one token in one layer and one query head.

`rows`, `keys_*` and `v_rows_*` cover decode rows, dense ones included; V rows are counted per kv
head. `keys_dense` are the keys of rows that ran dense, `keys_target` the keys that the other rows
were meant to keep. `dense_*` counts rows that ran dense by reason: short (at most min_kv_len or k
keys), window (the layer's window is not larger than k), layer (excluded by an option), off (the
request asked for it), prefill (prompt tokens). `prefill_*` covers prompt rows that our kernel
computed, dense ones included; a V tile is a run of 64 keys of one token and kv head, read where any
query head of the group keeps a key in it."""

SHOWN = ("rows", "keys_scored", "keys_kept", "v_rows_scored", "v_rows_read")
SHOWN_PREFILL = (
    "prefill_rows",
    "prefill_keys_scored",
    "prefill_keys_kept",
    "prefill_v_tiles",
    "prefill_v_tiles_read",
)
DENSE_REASONS = tuple(name.removeprefix("dense_") for name in FIELDS if name.startswith("dense_"))

Counts = list[int]
"""One number per column of FIELDS."""


def zeros() -> Counts:
    """No counts."""
    return [0] * len(FIELDS)


def add(into: Counts, more: Sequence[int]) -> None:
    """Add counts in place."""
    into[:] = map(operator.add, into, more)


def summarise(target: TargetK, counts: Sequence[int]) -> dict[str, Any]:
    """Turn counts into the object a response shows.

    Args:
        target: mean keys the rows were to keep.
        counts: columns as in FIELDS.
    """
    named = dict(zip(FIELDS, counts, strict=True))
    return {
        "k": target.decode,
        **{name: named[name] for name in SHOWN},
        "kept_fraction": ratio(named["keys_kept"], named["keys_scored"]),
        "v_row_reduction": ratio(named["v_rows_scored"], named["v_rows_read"]),
        "target_ratio": target_ratio(counts),
        "prefill": _prefill(target.prefill, named),
        "dense_rows": {reason: named[f"dense_{reason}"] for reason in DENSE_REASONS},
    }


def _prefill(k: float | None, named: dict[str, int]) -> dict[str, Any] | None:
    """What was counted of prompt rows; None where nobody counted them."""
    if not named["prefill_rows"]:
        return None
    shown: dict[str, Any] = {"k": k}
    shown |= {name.removeprefix("prefill_"): named[name] for name in SHOWN_PREFILL}
    shown["kept_fraction"] = ratio(named["prefill_keys_kept"], named["prefill_keys_scored"])
    shown["v_tiles_skipped"] = named["prefill_v_tiles"] - named["prefill_v_tiles_read"]
    return shown


def summarise_layers(layers: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
    """Turn the counts of every layer into arrays, one entry per layer."""
    shown: dict[str, list[Any]] = {
        name: [counts[FIELDS.index(name)] for counts in layers] for name in SHOWN
    }
    pairs = zip(shown["keys_kept"], shown["keys_scored"], strict=True)
    shown["kept_fraction"] = [ratio(kept, scored) for kept, scored in pairs]
    shown["target_ratio"] = [target_ratio(counts) for counts in layers]
    return shown


def target_ratio(counts: Sequence[int]) -> float | None:
    """Keys kept by rows that were pruned, over the keys they were meant to keep."""
    named = dict(zip(FIELDS, counts, strict=True))
    return ratio(named["keys_kept"] - named["keys_dense"], named["keys_target"])


def ratio(part: int, whole: int) -> float | None:
    """A fraction rounded for people, None where there is nothing to divide by."""
    return round(part / whole, 6) if whole else None
