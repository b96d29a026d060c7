"""Model and text to a table: end to end for every kind of model and text, provenance without
machine paths.
"""

import random

import pytest
import torch
from tiny_models import CONFIGS, tiny_model, tiny_tokenizer

from vllm_toptheta.calibration.calibrate import (
    CalibrationOptions,
    calibrate,
    load_model,
    repo_name,
)
from vllm_toptheta.calibration.corpus import Corpus
from vllm_toptheta.calibration.summary import summarize, to_text
from vllm_toptheta.thresholds import ThresholdTable

TEXT = "".join(chr(32 + (i * i + 7 * i) % 90) for i in range(3000))


def calibrated(name: str = "llama", text: str = TEXT, **options: object) -> ThresholdTable:
    settings = CalibrationOptions(**({"num_tokens": 1024, "length": 512} | options))  # type: ignore[arg-type]
    return calibrate(
        tiny_model(name),
        tiny_tokenizer(),
        Corpus("made up", [text], [1]),
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
        CalibrationOptions(num_tokens=1024, length=512),
        name="tiny/model",
        report=reported.append,
    )
    assert reported == [512, 512]
    assert table.num_layers == model.config.num_hidden_layers
    assert table.metadata.num_tokens == 1024
    if name == "mistral-windowed":
        # No layer sees a whole group: every row keeps all 40 keys.
        assert (table.kept == 40).all()
    else:
        curve = table.curve_at_k(table.min_k + 1)
        assert (table.lookup(curve, torch.tensor([1, 100, 1000])) <= 0).all()


@pytest.mark.parametrize("text", ["digits", "one word"])
def test_every_kind_of_text(text: str) -> None:
    digits = "".join(random.Random(0).choices("0123456789", k=3000))
    table = calibrated(text=digits if text == "digits" else "word " * 3000)
    assert float(table.weights.abs().max()) < 20


def test_provenance() -> None:
    metadata = calibrated(min_prob=0.002).metadata
    assert metadata.command == (
        "toptheta calibrate tiny/llama --tokens 1024 --length 512 --min-prob 0.002"
    )
    assert metadata.corpus == "made up"
    assert metadata.min_prob == 0.002
    assert set(metadata.versions) == {"vllm_toptheta", "torch", "transformers"}


def test_the_same_input_gives_the_same_table() -> None:
    first, second = calibrated(), calibrated()
    for name in ("lengths", "kept", "weights"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_summary() -> None:
    table = calibrated("gemma3-mixed-windows")
    summary = summarize(table)
    assert [layer["window"] for layer in summary["layers"]] == [40, 40, None]
    longest = summary["kept"][-1]
    assert longest == sorted(longest, reverse=True)
    mean = [layer["kept"][1] for layer in summary["layers"]]
    assert sum(mean) / 3 == pytest.approx(longest[1])
    text = to_text(summary)
    for part in ("tiny/gemma3-mixed-windows", "offsets      none", "0.0005", f"{longest[1]:.1f}"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float33"}, "dtype is 'float33', expected float32"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
    ],
)
def test_no_model_is_loaded_for_what_is_not_there(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_model("/no/such/model", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options", [{"min_prob": 0.0}, {"min_prob": 1.0}, {"num_tokens": 0}])
def test_impossible_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        CalibrationOptions(**options)  # type: ignore[arg-type]


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
