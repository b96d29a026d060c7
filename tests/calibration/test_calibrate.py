"""Model and text to a table: end to end for every kind of model, provenance without machine
paths.
"""

import pytest
import torch
from tiny_models import CONFIGS, tiny_model, tiny_tokenizer

from vllm_toptheta.calibration.calibrate import CalibrationOptions, calibrate, repo_name
from vllm_toptheta.calibration.corpus import Corpus
from vllm_toptheta.calibration.summary import summarize, to_text
from vllm_toptheta.thresholds import ThresholdTable

TEXT = "".join(chr(32 + (i * i + 7 * i) % 90) for i in range(3000))


def calibrated(name: str = "llama", **options: object) -> ThresholdTable:
    settings = CalibrationOptions(**({"num_tokens": 1024, "length": 256} | options))  # type: ignore[arg-type]
    return calibrate(
        tiny_model(name),
        tiny_tokenizer(),
        Corpus("made up", [TEXT], [1]),
        settings,
        name=f"tiny/{name}",
    )


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_kind_of_model(name: str) -> None:
    reported: list[int] = []
    model = tiny_model(name)
    table = calibrate(
        model,
        tiny_tokenizer(),
        Corpus("made up", [TEXT], [1]),
        CalibrationOptions(num_tokens=512, length=256),
        name="tiny/model",
        report=reported.append,
    )
    assert reported == [256, 256]
    assert table.num_layers == model.config.num_hidden_layers
    assert table.metadata.num_tokens == 512
    assert table.levels[0] == 16
    table.at_k(20).lookup(torch.tensor([1, 100, 1000]))


def test_provenance() -> None:
    metadata = calibrated(allocation="uniform", tac_k=16).metadata
    assert metadata.command == (
        "toptheta calibrate tiny/llama --tokens 1024 --length 256 --allocation uniform "
        "--tac-k 16 --group-size 16"
    )
    assert metadata.corpus == "made up"
    assert set(metadata.versions) == {"vllm_toptheta", "torch", "transformers"}


def test_the_same_input_gives_the_same_table() -> None:
    first, second = calibrated(), calibrated()
    assert torch.equal(first.theta, second.theta)


def test_summary() -> None:
    table = calibrated("gemma3-mixed-windows")
    summary = summarize(table, 32, 200)
    assert [layer["window"] for layer in summary["layers"]] == [40, 40, None]
    assert "tiny/gemma3-mixed-windows" in to_text(summary)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("org/model", "org/model"),
        ("/data/checkpoints/org/model/", "org/model"),
        ("/home/user/.cache/hub/models--org--a--b/snapshots/0123", "org/a--b"),
        ("model", "model"),
    ],
)
def test_repo_name(given: str, expected: str) -> None:
    assert repo_name(given) == expected
