"""`toptheta calibrate` and `inspect` on a tiny checkpoint, and what is refused before any weights
are read.
"""

import json
from pathlib import Path

import pytest
from tiny_models import tiny_model, tiny_tokenizer

from vllm_toptheta import cli
from vllm_toptheta.calibration import calibrate, collect


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("org") / "tiny"
    model = tiny_model()
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(32 + (i * i + 7 * i) % 90) for i in range(3000)))
    return path


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights is a mistake."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(calibrate.AutoModelForCausalLM, "from_pretrained", fail)


def test_calibrate_and_inspect(
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TOPTHETA_HOME", str(tmp_path))
    small = ["--text", str(text), "--length", "256", "--tokens", "512", "--name", "org/tiny"]
    assert cli.main(["calibrate", str(checkpoint), *small]) == 0
    table = tmp_path / "thresholds" / "org--tiny" / "256.safetensors"
    assert table.is_file()
    assert str(tmp_path).encode() not in table.read_bytes()

    capsys.readouterr()
    assert cli.main(["inspect", str(table), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["identity"]["name"] == "org/tiny"
    assert cli.main(["inspect", str(table)]) == 0
    assert "toptheta calibrate org/tiny --text text.txt --tokens 512" in capsys.readouterr().out


def test_documents_end_where_the_models_positions_do(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.safetensors"
    arguments = ["--text", str(text), "--tokens", "512", "--out", str(out)]
    assert cli.main(["calibrate", str(checkpoint), *arguments]) == 0
    told = capsys.readouterr().err.splitlines()[0]
    assert told == "documents of 512 tokens instead of 4096: the model's positions"
    capsys.readouterr()
    assert cli.main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["length"] == 512


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float33"], "dtype is 'float33', expected float32"),
        (["--device", "toaster"], "device 'toaster' cannot be used"),
        (["--out", "{folder}"], "cannot be written: "),
        (["--out", "{text}/table"], "cannot be written: "),
        (["--min-prob", "0"], "min_prob must lie between 0 and 1, got 0"),
        (["--tokens", "0"], "tokens must be positive, got 0"),
        (["--length", "255"], "length 255 is too short, expected at least 256"),
        (["--text", "{folder}/none"], "No such file"),
    ],
)
def test_refused_in_one_line_before_weights_are_read(
    checkpoint: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    filled = [part.format(folder=text.parent, text=text) for part in arguments]
    assert cli.main(["calibrate", str(checkpoint), "--length", "512", *filled]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("toptheta: ")
    assert message in line


def test_interrupt_writes_nothing(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(collect.Collector, "_count", interrupt)
    out = tmp_path / "out" / "table.safetensors"
    arguments = ["--text", str(text), "--length", "256", "--tokens", "256", "--out", str(out)]
    assert cli.main(["calibrate", str(checkpoint), *arguments]) == 130
    assert not out.parent.exists()
