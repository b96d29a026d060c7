"""`"thresholds": "calibrate"`: the first start makes the table, later and simultaneous ones
find it; what cannot work is one error.
"""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import run_program
from threshold_fixtures import make_table
from tiny_families import SERVED, save_checkpoint
from tiny_models import tiny_tokenizer
from vllm.engine.arg_utils import EngineArgs

from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.calibration import at_start
from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.threshold_store import ThresholdStore

OPTIONS = {"toptheta": {"thresholds": "calibrate"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(SERVED["qwen2"], tmp_path_factory.mktemp("start") / "org" / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOPTHETA_HOME", str(tmp_path))
    return tmp_path


def config_of(checkpoint: Path) -> Any:
    """The configuration of a start, before the plug-in looks at it."""
    return EngineArgs(model=str(checkpoint), additional_config=OPTIONS).create_engine_config()


def test_the_first_start_calibrates_and_the_second_finds_it(checkpoint: Path, home: Path) -> None:
    script = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        "if __name__ == '__main__':\n"
        "    for _ in range(2):\n"
        f"        EngineArgs(model={str(checkpoint)!r}, attention_backend='toptheta', "
        f"additional_config={OPTIONS!r}, dtype='float32').create_engine_config()\n"
        "        print('=====')\n"
    )
    (home / "start.py").write_text(script)
    first, second, _ = run_program(home / "start.py").stdout.split("=====")
    for words in ("toptheta calibrates org/tiny before it serves, once", "Expect ", "calibrated"):
        assert first.count(words) == 1, first
    assert "toptheta calibrate" not in second
    (table,) = (home / "thresholds" / "org--tiny").glob("*.safetensors")
    for start in (first, second):
        assert f"thresholds {table} (org/tiny" in start


def test_simultaneous_starts_calibrate_once(
    checkpoint: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(checkpoint)
    runs: list[str] = []

    def calibrate(_: object, name: str) -> None:
        runs.append(name)
        time.sleep(0.5)
        identity = ModelIdentity.from_config(config.model_config.hf_text_config, name)
        make_table(identity).save(ThresholdStore().path_for(identity, "512"))

    monkeypatch.setattr(at_start, "_calibrate", calibrate)
    starts = [
        threading.Thread(target=at_start.calibrate_once, args=(None, config)) for _ in range(3)
    ]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert runs == ["org/tiny"]


@pytest.mark.usefixtures("home")
def test_several_nodes_are_told_what_to_type(checkpoint: Path) -> None:
    config = config_of(checkpoint)
    config.parallel_config.nnodes = 2
    with pytest.raises(ValueError, match="run on each: toptheta calibrate org/tiny -- FLAGS"):
        at_start.calibrate_once(None, config)


def test_a_store_that_cannot_be_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOPTHETA_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ValueError, match="cannot be written"):
        at_start.calibrate_once(None, config_of(checkpoint))


def test_a_calibration_that_fails_is_one_error(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match='could not calibrate org/none; .*"thresholds": "auto"'):
        at_start._calibrate(EngineArgs(model=str(home / "none")), "org/none")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.usefixtures("home")
def test_a_worker_that_finds_no_table_does_not_serve_without(checkpoint: Path) -> None:
    config = config_of(checkpoint)
    with pytest.raises(FileNotFoundError, match="no threshold table"):
        Plan.from_vllm_config(config)
