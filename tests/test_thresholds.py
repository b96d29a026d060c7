"""The table: lookup, interpolation, slicing, and one clear error for everything that can be wrong
with a file.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from threshold_fixtures import make_identity, make_metadata, make_table

from vllm_toptheta.thresholds import KEEP_ALL, ThresholdTable, read_metadata

NAMES = ("levels", "lengths", "theta", "slope", "head_k", "lost_mass")


def write(path: Path, header: dict[str, str] | None = None, **tensors: torch.Tensor) -> Path:
    """A file of a valid table with some parts replaced."""
    table = make_table()
    values = {name: getattr(table, name) for name in NAMES} | tensors
    header = {"toptheta": table.metadata.model_dump_json()} if header is None else header
    save_file({name: value.contiguous() for name, value in values.items()}, path, metadata=header)
    return path


def metadata_with(**fields: object) -> dict[str, str]:
    return {"toptheta": json.dumps(make_metadata().model_dump(mode="json") | fields)}


def test_level_is_returned_exactly() -> None:
    table = make_table()
    level = table.at_k(64)
    assert torch.equal(level.theta, table.theta[1])
    assert torch.equal(level.head_k, table.head_k[1])


def test_between_levels_interpolates_in_log_k() -> None:
    table = make_table()
    level = table.at_k(32)
    assert torch.allclose(level.theta[..., 1:], (table.theta[0] + table.theta[1])[..., 1:] / 2)
    assert torch.allclose(level.head_k, torch.full((2, 4), 32.0))


@pytest.mark.parametrize("k", [15.9, 64.1, float("nan")])
def test_k_outside_names_the_range(k: float) -> None:
    with pytest.raises(ValueError, match=r"outside the table's range \[16, 64\] of org/model"):
        make_table().at_k(k)


def test_lookup_at_between_and_beyond_knots() -> None:
    level = make_table().at_k(16)
    lengths = torch.tensor([1, 32, 64, 128, 512, 2048])
    theta = level.lookup(lengths)
    assert theta.shape == (2, 6, 4)
    seen = torch.tensor([32.0, 32.0, 64.0, 128.0, 512.0, 2048.0])
    expected = 2 * seen.log2() - 4
    assert torch.allclose(theta[0, :, 0], expected)
    assert torch.allclose(theta[1, :, 3], expected + 1.3)


def test_row_no_longer_than_the_budget_keeps_all() -> None:
    theta = make_table().at_k(64).lookup(torch.tensor([1, 32, 127, 128]))
    assert torch.isfinite(theta).all()
    assert (theta[:, :3] < -1e6).all()
    assert (theta[:, 3] > 0).all()


def test_lookup_of_no_rows_is_empty() -> None:
    assert make_table().at_k(16).lookup(torch.tensor([], dtype=torch.int32)).shape == (2, 0, 4)


def test_slice_heads() -> None:
    table = make_table()
    part = table.slice_heads(1, 3)
    assert part.num_heads == 2
    lengths = torch.tensor([100, 3000])
    assert torch.equal(part.at_k(32).lookup(lengths), table.at_k(32).lookup(lengths)[..., 1:3])
    with pytest.raises(ValueError, match="heads 3:5 are not a range"):
        table.slice_heads(3, 5)


def test_round_trip(tmp_path: Path) -> None:
    table = make_table()
    path = tmp_path / "folder" / "table.safetensors"
    table.save(path)
    loaded = ThresholdTable.load(path)
    assert loaded.metadata == table.metadata
    for name in NAMES:
        assert torch.equal(getattr(loaded, name), getattr(table, name))


def test_save_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.safetensors"
    make_table().save(path)
    before = path.read_bytes()

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_table(slope=torch.ones(2, 2, 4)).save(path)
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
        ({"toptheta": "{"}, "metadata field 'header'.*JSON"),
        (metadata_with(schema_version=99), "schema version 99, expected 1"),
        (metadata_with(surprise=1), "'surprise'"),
        (metadata_with(windows=[None]), "windows name 1 layers, the model has 2"),
        (metadata_with(windows=[None, -1]), "'windows.1'"),
        (metadata_with(allocation="guess"), "'allocation'"),
    ],
)
def test_wrong_metadata(tmp_path: Path, header: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThresholdTable.load(write(tmp_path / "table.safetensors", header))


def broken(name: str, index: tuple[int, ...], value: float) -> dict[str, torch.Tensor]:
    tensor = getattr(make_table(), name).clone()
    tensor[index] = value
    return {name: tensor}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"extra": torch.zeros(1)}, "tensors are .*extra"),
        ({"theta": make_table().theta.double()}, "theta is torch.float64, expected torch.float32"),
        (
            {"theta": make_table().theta[:, :1]},
            r"theta has shape \[2, 1, 4, 3\], expected \[2, 2, 4, 3\]",
        ),
        ({"theta": make_table().theta[0]}, "theta has shape"),
        ({"levels": torch.tensor(1.0)}, "levels have shape"),
        (broken("theta", (0, 0, 0, 1), float("nan")), "theta holds numbers that are not finite"),
        (broken("slope", (0, 0, 0), float("inf")), "slope holds numbers that are not finite"),
        (broken("theta", (1, 0, 0, 2), 1e3), "theta grows with k"),
        (broken("levels", (1,), 8.0), "levels are not positive and ascending"),
        (broken("lengths", (2,), 128.0), "lengths are not positive and ascending"),
        (broken("head_k", (1, 0, 0), 1.0), "head_k is not positive and growing"),
        ({"head_k": make_table().head_k * 2}, "averages 32.0, expected the level itself"),
        (broken("lost_mass", (1, 0, 0), 1.5), "lost_mass is not within"),
    ],
)
def test_wrong_tensors(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThresholdTable.load(write(tmp_path / "table.safetensors", **tensors))


def test_foreign_table_names_the_differing_fields() -> None:
    expected = make_identity("org/other", vocab_size=101)
    with pytest.raises(
        ValueError, match="vocab_size: got 100, expected 101.*toptheta calibrate org/other"
    ):
        make_table().check_model(expected)


def test_metadata_alone(tmp_path: Path) -> None:
    assert read_metadata(write(tmp_path / "table.safetensors")) == make_metadata()


def test_keep_all_survives_interpolation_of_lengths() -> None:
    theta = make_table().theta
    assert (theta == KEEP_ALL).any()
    assert torch.isfinite(torch.lerp(theta[..., 0], theta[..., 1], 0.3)).all()
