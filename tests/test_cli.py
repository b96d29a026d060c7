"""The command line: calibrate, inspect and evaluate on a tiny checkpoint; clear errors; nothing
heavy at import.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from vllm_toptheta import cli


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


def test_calibrate_inspect_evaluate(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TOPTHETA_HOME", str(tmp_path))
    small = ["--text", str(text), "--length", "256"]
    assert (
        cli.main(["calibrate", str(checkpoint), *small, "--tokens", "512", "--name", "org/tiny"])
        == 0
    )
    table = tmp_path / "thresholds" / "org--tiny" / "256.safetensors"
    assert table.is_file()
    assert str(tmp_path).encode() not in table.read_bytes()

    capsys.readouterr()
    assert cli.main(["inspect", str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["identity"]["name"] == "org/tiny"
    assert cli.main(["inspect", str(table)]) == 0
    assert "toptheta calibrate org/tiny --text text.txt --tokens 512" in capsys.readouterr().out

    report = tmp_path / "report.json"
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


def test_interrupt_writes_nothing(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_toptheta.calibration import collect

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(collect.Collector, "_count", interrupt)
    out = tmp_path / "out" / "table.safetensors"
    arguments = ["--text", str(text), "--length", "256", "--tokens", "256", "--out", str(out)]
    assert cli.main(["calibrate", str(checkpoint), *arguments]) == 130
    assert not out.parent.exists()


def test_import_is_light() -> None:
    code = (
        "import sys, vllm_toptheta.cli; print({'torch', 'transformers', 'vllm'} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "set()\n"
    )


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate"])
    assert "WHAT" in capsys.readouterr().err
