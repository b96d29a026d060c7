"""The command line: evaluate on a tiny checkpoint; clear errors."""

import json
import logging
import os
from pathlib import Path

import pytest
from threshold_fixtures import make_table
from tiny_models import tiny_model, tiny_tokenizer

from vllm_toptheta import cli
from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.threshold_store import ThresholdStore


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("org") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(32 + (i * i + 7 * i) % 90) for i in range(3000)))
    return path


def test_evaluate(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TOPTHETA_HOME", str(tmp_path))
    identity = ModelIdentity.from_config(tiny_model().config, "org/tiny")
    table = ThresholdStore().path_for(identity, "256")
    make_table(identity).save(table)
    report = tmp_path / "report.json"
    small = ["--text", str(text), "--length", "256"]
    small += ["--rows", "32", "--min-kv-len", "0", "--json", str(report)]
    dials = ["--min-prob", "0.01", "--no-table", "--rivals", "top_k:16"]
    assert cli.main(["evaluate", "fidelity", str(checkpoint), *small, *dials]) == 0
    assert [result["variant"] for result in json.loads(report.read_text())] == [
        "toptheta",
        "toptheta:no-table",
        "top_k:16",
    ]
    assert "V rows" in capsys.readouterr().out


def test_without_a_table_the_error_says_what_to_type(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TOPTHETA_HOME", str(tmp_path))
    arguments = ["evaluate", "fidelity", str(checkpoint), "--text", str(text), "--k", "64"]
    assert cli.main(arguments) == 1
    assert "toptheta calibrate" in capsys.readouterr().err


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate"])
    assert "WHAT" in capsys.readouterr().err


@pytest.mark.parametrize("time", ["first", "again"])
def test_no_test_quietens_the_next_ones(time: str) -> None:
    """`cli.main` says in the environment how much vLLM logs; in tests it is called in process."""
    assert os.environ.get("VLLM_LOGGING_LEVEL") != "CRITICAL", time
    assert logging.getLogger("vllm").level != logging.CRITICAL
    os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"
    logging.getLogger("vllm").setLevel(logging.CRITICAL)
