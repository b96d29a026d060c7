"""The launch heuristic and the tuned table."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from vllm_toptheta.kernels import triton_config
from vllm_toptheta.kernels.triton_config import (
    MAX_SPLITS,
    LaunchConfig,
    choose_config,
    choose_num_splits,
)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
def test_tiles_hold_whole_groups(head_dim: int, group_size: int) -> None:
    config = choose_config(head_dim=head_dim, group_size=group_size, cache_bytes=2)
    assert config.tile % group_size == 0
    assert config.tile // group_size <= 16


def test_too_little_shared_memory_is_refused() -> None:
    shape = {"head_dim": 256, "group_size": 128, "cache_bytes": 2}
    choose_config(**shape, shared_limit=227 << 10)
    with pytest.raises(ValueError, match="need 152 KiB of shared memory, the device has 99"):
        choose_config(**shape, shared_limit=99 << 10)


@pytest.mark.parametrize(
    ("num_seqs", "splits"), [(0, 64), (1, 64), (2, 64), (8, 16), (33, 2), (200, 1)]
)
def test_splits_fill_the_device(num_seqs: int, splits: int) -> None:
    assert choose_num_splits(num_seqs, 8, 132, 4) == splits
    assert splits <= MAX_SPLITS


def test_a_tuned_entry_wins_on_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"Some GPU": {"128/16/2": {"tile": 32, "num_stages": 4}}}))
    monkeypatch.setattr(triton_config, "TUNED_PATH", path)
    triton_config._tuned.cache_clear()
    shape = {"head_dim": 128, "group_size": 16, "cache_bytes": 2}
    try:
        assert choose_config(**shape, device="Some GPU") == LaunchConfig(32, num_stages=4)
        assert choose_config(**shape, device="Another") == choose_config(**shape)
    finally:
        triton_config._tuned.cache_clear()


def test_the_shipped_table_is_valid() -> None:
    if triton_config.TUNED_PATH.exists():
        for entries in json.loads(triton_config.TUNED_PATH.read_text()).values():
            for key, fields in entries.items():
                config, group_size = LaunchConfig(**fields), int(key.split("/")[1])
                assert config.tile % group_size == 0
