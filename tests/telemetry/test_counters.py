"""How counts are shown: ratios, dense reasons, layers."""

from vllm_toptheta.kernels.columns import COLUMNS, MASS_UNIT
from vllm_toptheta.requests import Target, Targets
from vllm_toptheta.telemetry.counters import add, summarise, summarise_layers, zeros

TARGETS = Targets(Target(0.001, 0.5), Target(0.002))


def row(**values: int) -> list[int]:
    return [values.get(name, 0) for name in COLUMNS]


def test_ratios_are_of_what_they_say() -> None:
    counts = row(
        rows=10,
        keys_scored=1000,
        keys_kept=350,
        keys_dense=200,
        keys_target=100,
        v_rows_scored=300,
        v_rows_read=120,
        kept_mass=MASS_UNIT * 9,
        rows_lifted=2,
        dense_short=4,
    )
    shown = summarise(TARGETS, counts)
    assert (shown["rows"], shown["keys_kept"], shown["rows_lifted"]) == (10, 350, 2)
    assert shown["kept_fraction"] == 0.35
    assert shown["kept_mass"] == 0.9
    assert shown["v_row_reduction"] == 2.5
    assert shown["target_ratio"] == 1.5, "only rows under a k have a target"
    assert shown["dense_rows"] == {"short": 4, "window": 0, "layer": 0, "off": 0, "prefill": 0}


def test_prompt_rows_are_shown_on_their_own() -> None:
    assert summarise(TARGETS, row(rows=1))["prefill"] is None, "nobody counted them"
    counts = row(
        prefill_rows=4,
        prefill_keys_scored=200,
        prefill_keys_kept=30,
        prefill_v_tiles=12,
        prefill_v_tiles_read=5,
        prefill_kept_mass=3 * MASS_UNIT,
    )
    assert summarise(TARGETS, counts)["prefill"] == {
        "k": None,
        "min_prob": 0.002,
        "rows": 4,
        "keys_scored": 200,
        "keys_kept": 30,
        "v_tiles": 12,
        "v_tiles_read": 5,
        "kept_fraction": 0.15,
        "kept_mass": 0.75,
        "v_tiles_skipped": 7,
    }


def test_the_settings_are_those_in_effect_and_a_dense_phase_has_none() -> None:
    counts = row(rows=1, prefill_rows=4)
    for targets, decode, prefill in (
        (TARGETS, [None, 0.001, 0.5], [None, 0.002]),
        (Targets(Target(None, 0.0, 64), Target(None, 0.0, 64)), [64, None, 0.0], [64, None]),
        (Targets(None, Target(0.002)), [None, None, None], [None, 0.002]),
        (Targets(Target(0.001), None), [None, 0.001, 0.0], [None, None]),
    ):
        shown = summarise(targets, counts)
        assert [shown[name] for name in ("k", "min_prob", "min_mass")] == decode
        assert [shown["prefill"][name] for name in ("k", "min_prob")] == prefill


def test_what_did_not_happen_has_no_ratio() -> None:
    shown = summarise(Targets(None, None), row(dense_prefill=5))
    for name in ("kept_fraction", "kept_mass", "v_row_reduction", "target_ratio"):
        assert shown[name] is None


def test_rows_under_a_min_prob_have_no_target_ratio() -> None:
    assert summarise(TARGETS, row(rows=1, keys_kept=7, keys_dense=7))["target_ratio"] is None


def test_layers_are_arrays() -> None:
    layers = [
        row(rows=1, keys_scored=10, keys_kept=5, keys_target=4, kept_mass=MASS_UNIT // 2),
        row(rows=2, keys_scored=10, keys_kept=1, keys_dense=1, kept_mass=MASS_UNIT, rows_lifted=2),
    ]
    shown = summarise_layers(layers)
    assert shown["rows"] == [1, 2]
    assert shown["rows_lifted"] == [0, 2]
    assert shown["kept_fraction"] == [0.5, 0.1]
    assert shown["kept_mass"] == [0.5, 0.5]
    assert shown["target_ratio"] == [1.25, None]


def test_counts_add_up_in_place() -> None:
    total = zeros()
    add(total, list(range(len(COLUMNS))))
    add(total, [1] * len(COLUMNS))
    assert total == list(range(1, len(COLUMNS) + 1))
