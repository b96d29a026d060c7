"""`toptheta calibrate` and `inspect` on a tiny checkpoint, and what is refused before any weights
are read.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_families import REFUSED, SERVED, save_checkpoint
from tiny_models import tiny_tokenizer

from vllm_toptheta import cli


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(SERVED["qwen2"], tmp_path_factory.mktemp("org") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(32 + (i * i + 7 * i) % 90) for i in range(3000)))
    return path


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    env = {"TOPTHETA_HOME": str(home), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return subprocess.run(
        [sys.executable, "-m", "vllm_toptheta.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **env, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_calibrate_and_inspect(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--text", str(text), "--tokens", "512", "--name", "org/tiny"]
    flags = ["--dtype", "float32", "--port", "1", "--attention-backend", "toptheta"]
    done = run(tmp_path, "calibrate", str(checkpoint), *small, "--", *flags)
    table = tmp_path / "thresholds" / "org--tiny" / "511.safetensors"
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wrote {table}: k ")
    told = "documents of 511 tokens instead of 4096: the model's positions"
    assert told in done.stderr.splitlines()
    assert str(tmp_path).encode() not in table.read_bytes()

    assert cli.main(["inspect", str(table), "--json"]) == 0
    metadata = json.loads(capsys.readouterr().out)["metadata"]
    assert metadata["identity"]["name"] == "org/tiny"
    assert metadata["length"] == 511
    assert cli.main(["inspect", str(table)]) == 0
    assert "toptheta calibrate org/tiny --text text.txt --tokens 512" in capsys.readouterr().out


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting an engine, which reads weights, is a mistake."""
    from vllm_toptheta.calibration import engine

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(engine, "LLMEngine", fail)


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{folder}"], "cannot be written: "),
        (["--out", "{text}/table"], "cannot be written: "),
        (["--min-prob", "0"], "min_prob must lie between 0 and 1, got 0"),
        (["--tokens", "0"], "tokens must be positive, got 0"),
        (["--length", "255"], "length 255 is too short, expected at least 256"),
        (["--length", "512"], "length 512 is too long, expected at most 511: 512 positions"),
        (["--text", "{folder}/none"], "No such file"),
        (["--text", "{folder}/short.txt"], "shorter than one document of 511 tokens"),
        (["--dtype", "float33"], "argument --dtype: invalid choice: 'float33'"),
        (["--", "--dtype", "float33"], "argument --dtype: invalid choice: 'float33'"),
        (["--", "--no-such-flag"], "unrecognized arguments: --no-such-flag; `vllm serve --help"),
        (["--", "another/model"], "'another/model' after -- is no flag of vllm serve"),
        (["--", "--max-model-len", "2000"], "max_model_len (2000) is greater than the derived"),
        (["--", "--max-model-len", "100"], "length 99 is too short, expected at least 256"),
        (["--", "--skip-tokenizer-init"], "there is no tokenizer"),
    ],
)
def test_refused_in_one_line_before_weights_are_read(
    checkpoint: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    (text.parent / "short.txt").write_text("short")
    filled = [part.format(folder=text.parent, text=text) for part in arguments]
    assert cli.main(["calibrate", str(checkpoint), *filled]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "toptheta: " in line]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.usefixtures("no_engine")
def test_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calibrate", str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize("name", ["bloom", "llama4-text", "gemma4-kv-heads"])
def test_models_without_tables_are_refused_by_their_configuration(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "gemma4-kv-heads":
        config, message = SERVED["gemma4-text"].config(), "layers differ in kv heads"
        config.architectures = ["Gemma4ForCausalLM"]
    else:
        family, message = REFUSED[name]
        config = family.config()
        config.architectures = ["BloomForCausalLM" if name == "bloom" else "Llama4ForCausalLM"]
    config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert cli.main(["calibrate", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_interrupt_writes_nothing(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_toptheta.calibration import engine

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "LLMEngine", interrupt)
    out = tmp_path / "out" / "table.safetensors"
    arguments = ["--text", str(text), "--length", "256", "--tokens", "256", "--out", str(out)]
    assert cli.main(["calibrate", str(checkpoint), *arguments]) == 130
    assert not out.parent.exists()
