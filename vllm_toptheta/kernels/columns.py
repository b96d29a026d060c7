"""What is counted: the columns of all counts, from the kernels to a response. A leaf.

Every count of a request, a layer or a step is a list of integers in this order. A row is one token
in one layer and one query head.
"""

from typing import Literal

Unit = Literal["", "heads", "group", "kv_heads", "lists"]
"""What one of a target's own counts stands for, which `backend/counts.py` multiplies by: "heads", a
token of all query heads; "group", a list of keys of one kv head, shared by the query heads of its
group; "" itself. "kv_heads", a token of all kv heads, and "lists", one of such lists, are told by
one of the tensor-parallel ranks that share a kv head."""

UNITS: dict[str, Unit] = {
    # Decode rows, dense ones included; V rows are counted per kv head.
    "rows": "heads",
    "keys_scored": "heads",
    "keys_kept": "group",
    "v_rows_scored": "kv_heads",
    "v_rows_read": "lists",
    # Keys that rows without a k kept: rows that ran dense, and rows under a min_prob.
    "keys_dense": "group",
    # Keys that rows under a k were meant to keep.
    "keys_target": "",
    # The share of its attention that a row's kept keys hold, in units of 1 / MASS_UNIT, summed over
    # rows; a dense row has one.
    "kept_mass": "",
    # Rows whose threshold the floor min_mass lowered.
    "rows_lifted": "group",
    # Rows that ran dense, by reason: at most min_kv_len keys, a window that is not larger, excluded
    # by an option, asked for by the request, prompt tokens.
    "dense_short": "heads",
    "dense_window": "heads",
    "dense_layer": "heads",
    "dense_off": "heads",
    "dense_prefill": "heads",
    # Prompt rows that our kernel computed, dense ones included. A V tile is a run of 64 keys of one
    # token and kv head, read where any query head of the group keeps a key in it.
    "prefill_rows": "heads",
    "prefill_keys_scored": "heads",
    "prefill_keys_kept": "group",
    "prefill_v_tiles": "kv_heads",
    "prefill_v_tiles_read": "lists",
    "prefill_kept_mass": "",
}
COLUMNS = tuple(UNITS)

MASS_UNIT = 1_000_000
"""What a kept share of one counts as: shares add up as integers, and so in any order."""

DENSE_NONE, DENSE_SHORT, DENSE_WINDOW, DENSE_LAYER, DENSE_ROW = range(5)
"""Why a row of a layer runs dense: not at all, few keys, a window of few keys, the layer or the row
is excluded. Of several reasons the highest counts; their columns follow each other in this order.
"""
