"""`toptheta evaluate engine` and `needle` on the real model: forced decoding is teacher forcing,
pruned rows are counted, and pruned prompts predict other text nearly as well as dense ones."""

import json
import math
import os
import pydoc_data.topics
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e.conftest import ENV

from vllm_toptheta.calibration.calibrate import read_corpus
from vllm_toptheta.evaluation.model import load_model

LENGTH, PROMPT, DOCUMENTS = 256, 100, 2


def evaluate(what: str, model: Path, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    output = folder / "results.json"
    common = ["--phases", "both", "--min-kv-len", "32", "--json", str(output)]
    command = ["evaluate", what, str(model), *common, *arguments]
    done = subprocess.run(
        [sys.executable, "-m", "vllm_toptheta.cli", *command],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **ENV},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "both min_prob " in done.stdout
    results: list[dict[str, Any]] = json.loads(output.read_text())
    return results


def test_engine(smollm2: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(pydoc_data.topics.topics["formatstrings"])
    numbers = ["--length", str(LENGTH), "--prompt-tokens", str(PROMPT)]
    stock, pruned = evaluate(
        "engine",
        smollm2,
        tmp_path,
        "--text",
        str(text),
        "--documents",
        str(DOCUMENTS),
        *numbers,
        "--min-prob",
        "0.05",
    )
    model, tokenizer = load_model(str(smollm2), dtype="float32", device="cpu")
    documents = list(
        read_corpus([text]).documents(tokenizer, length=LENGTH, num_tokens=DOCUMENTS * LENGTH)
    )
    with torch.inference_mode():
        losses = [float(model(ids[None], labels=ids[None]).loss) for ids in documents]
    dense = math.exp(sum(losses) / len(losses))
    assert stock["perplexity"] == pytest.approx(dense, rel=1e-4)
    assert stock["num_prompt_tokens"] == DOCUMENTS * PROMPT
    assert stock["num_decode_tokens"] == DOCUMENTS * (LENGTH - PROMPT - 1)
    assert stock["decode_kept_fraction"] is None
    # Keys of one part in twenty and more are little: the text is a lot harder, but still English.
    assert 1.001 < pruned["decode_ratio_to_stock"] < 2
    assert pruned["prompt_perplexity"] != stock["prompt_perplexity"]
    # A quarter: of so short a text, the group that a row sees in part, which it keeps, is much.
    assert 0 < pruned["decode_kept_fraction"] < 0.25
    assert pruned["decode_kept_fraction"] < pruned["prompt_kept_fraction"] < 1


def prose() -> str:
    """English that the shipped thresholds were not calibrated on: paragraphs out of the
    descriptions of packages that every vLLM requires."""
    paragraphs = []
    for package in ("transformers", "fastapi", "torch", "openai", "tqdm"):
        text = metadata(package)
        description = text.get_payload() or text["Description"]  # type: ignore[attr-defined]
        description = re.sub(r"```.*?```", "", description, flags=re.DOTALL)
        for paragraph in re.split(r"\n\s*\n", description):
            words = len(re.findall(r"\b[a-z]+\b", paragraph))
            if words >= 20 and not re.search(r"[<>|{}]|://|\]\(|^ {4}", paragraph):
                paragraphs.append(paragraph.strip())
    return "\n\n".join(paragraphs)


def test_a_tenth_of_a_prompts_attention_is_as_good(smollm2: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(prose())
    options = ["--min-prob", "0.003", "--min-kv-len", "128", "--documents", "1"]
    numbers = ["--length", "2048", "--prompt-tokens", "2048"]
    _, pruned = evaluate("engine", smollm2, tmp_path, "--text", str(text), *options, *numbers)
    assert pruned["num_prompt_tokens"] == 2047
    assert 0.04 < pruned["prompt_kept_fraction"] <= 0.1
    assert pruned["prompt_v_tile_fraction"] < 0.9
    assert abs(pruned["ratio_to_stock"] - 1) <= 0.02


def test_needle(smollm2: Path, tmp_path: Path) -> None:
    stock, pruned = evaluate(
        "needle", smollm2, tmp_path, "--lengths", "256", "--depths", "0.5", "--min-prob", "0.01"
    )
    assert stock["found"]
    assert (stock["length"], stock["depth"]) == (256, 0.5)
    assert pruned["log_probability"] != stock["log_probability"]
    assert 0 < pruned["decode_kept_fraction"] < pruned["prompt_kept_fraction"] < 1


def test_fidelity(smollm2: Path, tmp_path: Path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "results.json"
    text.write_text(prose())
    command = ["evaluate", "fidelity", str(smollm2), "--text", str(text), "--json", str(output)]
    numbers = ["--length", "1024", "--rows", "64", "--min-kv-len", "128", "--dtype", "float32"]
    rules = ["--min-prob", "0.002", "0.0005", "--no-table", "--rivals", "top_k:32"]
    done = subprocess.run(
        [sys.executable, "-m", "vllm_toptheta.cli", *command, *numbers, *rules],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    less, more, *uncalibrated, top_k = json.loads(output.read_text())
    assert [r["variant"] for r in uncalibrated] == ["toptheta:no-table"] * 2
    assert [r["min_mass"] for r in (less, *uncalibrated)] == [0, 0.5, 0.5]
    assert 0 < more["kl"] < less["kl"] < 0.05
    assert more["v_row_fraction"] > less["v_row_fraction"]
    assert 0.5 < less["kept_mass"] < more["kept_mass"] < 1
    # Exact top-k reads as much and is a lot further from dense.
    assert top_k["v_row_fraction"] > less["v_row_fraction"] * 0.7
    assert top_k["kl"] > 2 * less["kl"]
    assert less["pruned_row_share"] == 1
