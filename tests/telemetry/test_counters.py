"""How counts are shown: ratios, dense reasons, layers."""

from vllm_toptheta.request_options import TargetK
from vllm_toptheta.telemetry.counters import FIELDS, add, summarise, summarise_layers, zeros


def row(**values: int) -> list[int]:
    return [values.get(name, 0) for name in FIELDS]


def test_ratios_are_of_what_they_say() -> None:
    counts = row(
        rows=10,
        keys_scored=1000,
        keys_kept=350,
        keys_dense=200,
        keys_target=100,
        v_rows_scored=300,
        v_rows_read=120,
        dense_short=4,
    )
    shown = summarise(TargetK(128, None), counts)
    assert (shown["k"], shown["rows"], shown["keys_kept"]) == (128, 10, 350)
    assert shown["kept_fraction"] == 0.35
    assert shown["v_row_reduction"] == 2.5
    assert shown["target_ratio"] == 1.5, "dense rows have no target and keep everything"
    assert shown["dense_rows"] == {"short": 4, "window": 0, "layer": 0, "off": 0, "prefill": 0}


def test_prompt_rows_are_shown_on_their_own() -> None:
    target = TargetK(128, 80)
    assert summarise(target, row(rows=1))["prefill"] is None, "nobody counted them"
    counts = row(
        prefill_rows=4,
        prefill_keys_scored=200,
        prefill_keys_kept=30,
        prefill_v_tiles=12,
        prefill_v_tiles_read=5,
    )
    assert summarise(target, counts)["prefill"] == {
        "k": 80,
        "rows": 4,
        "keys_scored": 200,
        "keys_kept": 30,
        "v_tiles": 12,
        "v_tiles_read": 5,
        "kept_fraction": 0.15,
        "v_tiles_skipped": 7,
    }


def test_a_phase_that_runs_dense_has_no_k() -> None:
    counts = row(rows=1, prefill_rows=4)
    for target in (TargetK(None, 80), TargetK(128, 80), TargetK(None, None)):
        shown = summarise(target, counts)
        assert (shown["k"], shown["prefill"]["k"]) == (target.decode, target.prefill)


def test_what_did_not_happen_has_no_ratio() -> None:
    shown = summarise(TargetK(None, None), row(dense_prefill=5))
    assert [shown[name] for name in ("kept_fraction", "v_row_reduction", "target_ratio")] == [
        None,
        None,
        None,
    ]


def test_layers_are_arrays() -> None:
    layers = [
        row(rows=1, keys_scored=10, keys_kept=5, keys_target=4),
        row(rows=2, keys_scored=10, keys_kept=1, keys_dense=1),
    ]
    shown = summarise_layers(layers)
    assert shown["rows"] == [1, 2]
    assert shown["kept_fraction"] == [0.5, 0.1]
    assert shown["target_ratio"] == [1.25, None]


def test_counts_add_up_in_place() -> None:
    total = zeros()
    add(total, list(range(len(FIELDS))))
    add(total, [1] * len(FIELDS))
    assert total == list(range(1, len(FIELDS) + 1))
