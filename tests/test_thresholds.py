"""The table: curves for k, lookup, slicing, and one clear error for everything that can be wrong
with a file.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from threshold_fixtures import make_identity, make_metadata, make_table

from vllm_toptheta.thresholds import ThresholdTable, read_metadata

NAMES = ("lengths", "log_probs", "kept", "weights", "offsets")


def write(path: Path, header: dict[str, str] | None = None, **tensors: torch.Tensor) -> Path:
    """A file of a valid table with some parts replaced."""
    table = make_table()
    values = {name: getattr(table, name) for name in NAMES} | tensors
    header = {"toptheta": table.metadata.model_dump_json()} if header is None else header
    save_file({name: value.contiguous() for name, value in values.items()}, path, metadata=header)
    return path


def metadata_with(**fields: object) -> dict[str, str]:
    return {"toptheta": json.dumps(make_metadata().model_dump(mode="json") | fields)}


def uneven_table() -> ThresholdTable:
    """Heads that keep differently many keys, moved by offsets."""
    table = make_table()
    share = torch.tensor([[0.25, 0.5], [1.0, 2.0]])[..., None, None]
    kept = (table.kept * share).clamp(min=1).minimum(table.lengths[:, None])
    return make_table(kept=kept, offsets=torch.tensor([[0.5, -0.25], [0.0, -2.0]]))


@pytest.mark.parametrize("k", [2, 20, 64, 100.5, 256])
def test_curve_is_where_rows_keep_k(k: float) -> None:
    table = make_table()
    expected = -math.log(k) - (table.lengths / 128).log() / 2
    expected[table.lengths < k] = -20
    torch.testing.assert_close(table.curve_at_k(k), expected.clamp(max=0), atol=0.02, rtol=0)


def test_curve_meets_k_on_average_over_heads_with_their_offsets() -> None:
    table = uneven_table()
    for k in (30.0, 64.0):
        curve = table.curve_at_k(k)
        kept = [
            table.kept_at(curve[knot : knot + 1])[:, :, knot].mean() for knot in range(len(curve))
        ]
        # One threshold's keys are interpolated per head, a curve's over their mean.
        torch.testing.assert_close(torch.stack(kept), torch.full((3,), k), rtol=0.01, atol=0)


def test_an_offset_moves_the_threshold() -> None:
    table = make_table()
    higher = make_table(offsets=torch.full((2, 2), 0.75))
    torch.testing.assert_close(higher.curve_at_k(64) + 0.75, table.curve_at_k(64))


@pytest.mark.parametrize("k", [0.9, 256.1, float("nan")])
def test_k_outside_names_the_range(k: float) -> None:
    with pytest.raises(ValueError, match=r"outside the table's range \[1, 256\] of org/model"):
        make_table().curve_at_k(k)


def test_lookup_at_between_and_beyond_knots() -> None:
    table = make_table()
    curve = torch.tensor([-6.0, -4.0, -5.0])
    lengths = torch.tensor([[1, 128, 256], [512, 1024, 8192]])
    expected = torch.tensor([[-6.0, -6.0, -5.0], [-4.0, -4.5, -6.0]])
    torch.testing.assert_close(table.lookup(curve, lengths), expected)
    assert table.lookup(torch.tensor([-3.0, -2.0, -1.0]), torch.tensor(1 << 20)) == 0


def test_lookup_with_a_curve_for_each_row() -> None:
    table = make_table()
    curves = torch.stack([table.curve_at_k(k) for k in (4, 64)])
    lengths = torch.tensor([[200, 3000, 70000], [90, 600, 2048]])
    rows = [table.lookup(curve, row) for curve, row in zip(curves, lengths, strict=True)]
    torch.testing.assert_close(table.lookup(curves, lengths), torch.stack(rows))


def test_lookup_of_no_rows_is_empty() -> None:
    table = make_table()
    assert table.lookup(table.curve_at_k(16), torch.tensor([], dtype=torch.int32)).shape == (0,)


def test_slice_heads_keeps_the_whole_models_curve() -> None:
    table = uneven_table()
    part = table.slice_heads(2, 4)
    assert (part.num_heads, part.num_kv_heads) == (2, 1)
    assert torch.equal(part.curve_at_k(64), table.curve_at_k(64))
    assert torch.equal(part.offsets, table.offsets[:, 1:])
    assert torch.equal(part.kept, table.kept[:, 1:])
    # A replicated kv head.
    assert torch.equal(table.slice_heads(1, 2).offsets, table.offsets[:, :1])
    with pytest.raises(ValueError, match="heads 3:5 are not a range"):
        table.slice_heads(3, 5)
    with pytest.raises(ValueError, match="heads 1:3 cut a kv head of 2"):
        table.slice_heads(1, 3)


def test_round_trip(tmp_path: Path) -> None:
    table = uneven_table()
    path = tmp_path / "folder" / "table.safetensors"
    table.save(path)
    loaded = ThresholdTable.load(path)
    assert loaded.metadata == table.metadata
    for name in (*NAMES, "mean_kept"):
        assert torch.equal(getattr(loaded, name), getattr(table, name))


def test_a_slice_is_no_table_of_the_model(tmp_path: Path) -> None:
    make_table().slice_heads(0, 2).save(tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"kept have shape \[2, 1, 3, 81\], expected \[2, 2, 3"):
        ThresholdTable.load(tmp_path / "part.safetensors")


def test_numbers_that_no_k_comes_of_are_refused(tmp_path: Path) -> None:
    kept = torch.full_like(make_table().kept, torch.finfo(torch.float32).max)
    with pytest.raises(ValueError, match="too large for a mean"):
        ThresholdTable.load(write(tmp_path / "table.safetensors", kept=kept))
    lengths = torch.tensor([128.0, 2048.0, 2048.0])
    lengths[2] = torch.nextafter(lengths[1], lengths[1] + 1)
    with pytest.raises(ValueError, match="not positive and ascending"):
        ThresholdTable.load(write(tmp_path / "table.safetensors", lengths=lengths))


def test_save_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.safetensors"
    make_table().save(path)
    before = path.read_bytes()

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        uneven_table().save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["table.safetensors"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        ThresholdTable.load(tmp_path / "none.safetensors")


def test_not_a_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    path.write_bytes(b"import os; os.system('true')")
    with pytest.raises(ValueError, match="not a safetensors file"):
        ThresholdTable.load(path)


def test_truncated_file(tmp_path: Path) -> None:
    path = write(tmp_path / "table.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a safetensors file"):
        ThresholdTable.load(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"other": "{}"}, "not one of toptheta's"),
        ({"toptheta": "{"}, "header is not JSON"),
        ({"toptheta": "[" * 100_000}, "header is not JSON"),
        (
            metadata_with(identity=make_identity().model_dump(mode="json") | {"fields": {}}),
            "'identity'.*num_key_value_heads is None, expected 2",
        ),
        ({"toptheta": "[2]"}, "schema None, expected 2"),
        (
            metadata_with(schema_version=1, allocation="lost_mass"),
            "schema 1, expected 2; calibrate again: toptheta calibrate org/model$",
        ),
        (
            metadata_with(schema_version=1, identity={"name": "a\nb"}),
            "schema 1, expected 2; calibrate again: toptheta calibrate MODEL$",
        ),
        (metadata_with(surprise=1), "'surprise'"),
        (metadata_with(windows=[None]), "windows name 1 layers, the model has 2"),
        (metadata_with(windows=[None, -1]), "'windows.1'"),
        (metadata_with(min_prob=1), "'min_prob'.*calibrate again: toptheta calibrate org/model$"),
    ],
)
def test_wrong_metadata(tmp_path: Path, header: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ThresholdTable.load(write(tmp_path / "table.safetensors", header))
    assert "\n" not in str(caught.value)


def broken(name: str, index: tuple[int, ...], value: float) -> dict[str, torch.Tensor]:
    tensor = getattr(make_table(), name).clone()
    tensor[index] = value
    return {name: tensor}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"extra": torch.zeros(1)}, "tensors are .*extra"),
        ({"kept": make_table().kept.double()}, "kept are torch.float64, expected torch.float32"),
        (
            {"kept": make_table().kept[:1]},
            r"kept have shape \[1, 2, 3, 81\], expected \[2, 2, 3, 81\]",
        ),
        ({"weights": make_table().weights[:, :3]}, r"weights have shape \[2, 3, 5\], expected"),
        ({"offsets": torch.zeros(2)}, r"offsets have shape \[2\], expected \[2, 2\]"),
        ({"lengths": torch.tensor([1.0])}, "lengths have shape"),
        (broken("kept", (0, 0, 0, 1), float("nan")), "kept hold numbers that are not finite"),
        (broken("offsets", (0, 0), float("inf")), "offsets hold numbers that are not finite"),
        (broken("lengths", (2,), 512.0), "lengths are not positive and ascending"),
        (broken("log_probs", (80,), 0.5), "log_probs are not ascending up to 0"),
        (broken("log_probs", (3,), -30.0), "log_probs are not ascending up to 0"),
        (broken("kept", (0, 0, 0, 80), 0.5), "kept is below 1"),
        (broken("kept", (1, 1, 2, 60), 2000.0), "kept grows with the threshold"),
        (broken("weights", (1, 3, 0), 0.9), "do not sum to 1"),
    ],
)
def test_wrong_tensors(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThresholdTable.load(write(tmp_path / "table.safetensors", **tensors))


def test_foreign_table_names_the_differing_fields() -> None:
    expected = make_identity("org/other", num_hidden_layers=3)
    with pytest.raises(
        ValueError, match="num_hidden_layers: got 2, expected 3.*toptheta calibrate org/other"
    ):
        make_table().check_model(expected)


def test_metadata_alone(tmp_path: Path) -> None:
    assert read_metadata(write(tmp_path / "table.safetensors")) == make_metadata()


def test_replaced_tensors_get_their_own_mean() -> None:
    table = make_table()
    other = replace(table, offsets=table.offsets - 1, mean_kept=None)
    assert not torch.equal(other.mean_kept, table.mean_kept)
