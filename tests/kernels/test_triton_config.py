"""The launch heuristic, the tuned table, and the scripts that need a GPU as far as they go without
one.
"""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

from vllm_toptheta.kernels import triton_config
from vllm_toptheta.kernels.triton_config import (
    MAX_SPLITS,
    LaunchConfig,
    choose_config,
    choose_num_splits,
)

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"


def load_script(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(name, str(SCRIPTS / name))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


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


def test_tuning_picks_the_fastest_that_runs() -> None:
    script = load_script("tune_triton")
    slow, broken, fast = LaunchConfig(32), LaunchConfig(64), LaunchConfig(128)
    times = {slow: [1.0, 4.0], broken: None, fast: [0.5, 6.0]}
    assert script.best([slow, broken, fast], times.__getitem__)[0] is fast
    with pytest.raises(RuntimeError, match="no configuration runs"):
        script.best([broken], times.__getitem__)
    configs = list(script.candidates(128, 64))
    assert configs[0] == choose_config(head_dim=128, group_size=64, cache_bytes=2)
    assert {config.tile for config in configs} == {64, 128}


def test_gpu_check_runs_under_the_interpreter(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, SCRIPTS / "gpu_check", "--json", report],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    records = json.loads(report.read_text())["records"]
    assert [record["check"] for record in records] == ["correctness", "determinism", "prompts"]
    assert all(record["ok"] for record in records)
