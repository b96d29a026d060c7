"""Model and text to a table in a real engine: what vLLM's layers are asked gives the table that
transformers' give, for every kind of attention; provenance without machine paths.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e.conftest import run_program
from tiny_families import SERVED, save_checkpoint
from tiny_models import collect, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_toptheta.calibration.calibrate import CalibrationOptions, repo_name
from vllm_toptheta.calibration.collect import AttentionStatistics
from vllm_toptheta.calibration.corpus import Corpus
from vllm_toptheta.calibration.fit import fit
from vllm_toptheta.calibration.summary import summarize, to_text
from vllm_toptheta.thresholds import ThresholdTable

HERE = Path(__file__).parent
TEXT = "".join(chr(32 + (i * i + 7 * i) % 90) for i in range(3000))
LENGTH, TOKENS, MIN_PROB = 500, 1000, 0.01
FAMILIES = [
    "qwen2",  # with a bias of K
    "gemma2",  # windows and a soft cap
    "gpt-oss",  # sinks, experts
    "qwen3-moe",
    "gemma3n-text",  # layers that share KV
    "pythia",  # a kv head for each query head
    "phi3-longrope",
]


def checkpoint(name: str, folder: Path) -> Path:
    path = save_checkpoint(SERVED[name], folder / name)
    tiny_tokenizer().save_pretrained(path)
    if name == "qwen2":
        model = AutoModelForCausalLM.from_pretrained(path)
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.data.normal_(0, 5)
        model.save_pretrained(path)
    return path


def calibrated(folder: Path, jobs: list[dict[str, Any]]) -> dict[str, ThresholdTable]:
    """Tables, each made by an engine; see `engine_run.py`."""
    run_program(HERE / "engine_run.py", folder, json.dumps(jobs), timeout=900)
    return {job["name"]: ThresholdTable.load(folder / f"{job['name']}.safetensors") for job in jobs}


HYBRID = "lfm2"
"""Not compared with transformers: in vLLM 0.32 on a CPU its queries are others."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    for name in (*FAMILIES, HYBRID):
        checkpoint(name, folder)
    return folder


def job(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """One table: engine arguments, text and options."""
    arguments = {"model": str(folder / changes.pop("model", name)), "dtype": "float32"}
    return {
        "name": name,
        "arguments": arguments | changes.pop("arguments", {}),
        "text": changes.pop("text", TEXT),
        "options": {"num_tokens": TOKENS, "length": LENGTH, "min_prob": MIN_PROB} | changes,
    }


@pytest.fixture(scope="module")
def tables(
    checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, ThresholdTable]:
    """Of every family, and others of qwen2 by what they are for."""
    digits = "".join(random.Random(0).choices("0123456789", k=3000))
    dummy = {"attention_backend": "toptheta", "max_num_batched_tokens": 64}
    dummy |= {"additional_config": {"toptheta": {"min_prob": 0.01}}}
    dummy |= {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}
    jobs = [job(checkpoints, name) for name in (*FAMILIES, HYBRID)]
    jobs += [
        job(checkpoints, "as-served", model="qwen2", arguments=dummy),
        job(checkpoints, "digits", model="qwen2", text=digits),
        job(checkpoints, "one word", model="qwen2", text="word " * 1000),
        job(checkpoints, "tensor-parallel", model="pythia", arguments={"tensor_parallel_size": 2}),
        job(checkpoints, "pipeline", model="qwen2", arguments={"pipeline_parallel_size": 2}),
        job(checkpoints, "long", model="phi3-longrope", arguments={"max_model_len": 600}),
    ]
    return calibrated(tmp_path_factory.mktemp("tables"), jobs)


def expected(folder: Path, name: str, table: ThresholdTable) -> Any:
    """What transformers' attention gives, fitted."""
    model = AutoModelForCausalLM.from_pretrained(folder / name).float().eval()
    identity = table.metadata.identity
    # Not the tiny tokenizer itself: its files become what the model's type makes of them.
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    documents = Corpus("made up", [TEXT], [1]).documents(
        tokenizer, length=LENGTH, num_tokens=TOKENS
    )
    statistics = AttentionStatistics.empty(
        identity.num_layers, identity.num_heads, identity.num_kv_heads, LENGTH
    )
    collect(model, list(documents), statistics, MIN_PROB)
    return fit(statistics), statistics.windows


@pytest.mark.parametrize("name", FAMILIES)
def test_an_engine_gives_the_table_that_transformers_gives(
    checkpoints: Path, tables: dict[str, ThresholdTable], name: str
) -> None:
    table = tables[name]
    fitted, windows = expected(checkpoints, name, table)
    assert table.metadata.windows == windows
    assert torch.equal(table.lengths, fitted.lengths)
    torch.testing.assert_close(table.kept, fitted.kept, rtol=0.01, atol=0.05)
    # A key within rounding of min_prob may fall on either side.
    torch.testing.assert_close(table.weights, fitted.weights, rtol=0.03, atol=0.03)


def test_layers_of_a_hybrid_that_do_not_attend(tables: dict[str, ThresholdTable]) -> None:
    conv, attending = tables[HYBRID].kept
    assert torch.equal(conv, attending)
    assert not torch.equal(tables[HYBRID].weights[0], tables[HYBRID].weights[1])
    assert tables[HYBRID].weights[0].unique(dim=0).shape[0] == 1


def test_flags_of_a_server_change_nothing(tables: dict[str, ThresholdTable]) -> None:
    for name in ("lengths", "kept", "weights"):
        assert torch.equal(getattr(tables["as-served"], name), getattr(tables["qwen2"], name))


def test_ranks_give_the_table_that_one_gives(tables: dict[str, ThresholdTable]) -> None:
    for name, alone in (("tensor-parallel", "pythia"), ("pipeline", "qwen2")):
        torch.testing.assert_close(tables[name].kept, tables[alone].kept, rtol=0.01, atol=0.05)
        torch.testing.assert_close(tables[name].weights, tables[alone].weights, rtol=0, atol=0.01)


def test_longrope_has_the_factors_of_the_length_that_is_served(
    tables: dict[str, ThresholdTable],
) -> None:
    short, long = tables["phi3-longrope"], tables["long"]
    assert not torch.equal(short.kept, long.kept)
    assert "long_factor" in str(long.metadata.identity.fields["rope"])


@pytest.mark.parametrize("name", ["digits", "one word"])
def test_every_kind_of_text(tables: dict[str, ThresholdTable], name: str) -> None:
    assert float(tables[name].weights.abs().max()) < 20


def test_provenance(tables: dict[str, ThresholdTable]) -> None:
    metadata = tables["long"].metadata
    assert metadata.command == (
        "toptheta calibrate tiny/long --tokens 1000 --length 500 --min-prob 0.01 -- "
        "--dtype float32 --max-model-len 600"
    )
    assert metadata.corpus == "made up"
    assert metadata.min_prob == MIN_PROB
    assert metadata.num_tokens == TOKENS
    assert set(metadata.versions) == {"vllm_toptheta", "torch", "vllm"}


def test_summary(tables: dict[str, ThresholdTable]) -> None:
    table = tables["gemma2"]
    summary = summarize(table)
    assert [layer["window"] for layer in summary["layers"]] == [160, None]
    longest = summary["kept"][-1]
    assert longest == sorted(longest, reverse=True)
    mean = [layer["kept"][1] for layer in summary["layers"]]
    assert sum(mean) / 2 == pytest.approx(longest[1])
    text = to_text(summary)
    for part in ("tiny/gemma2", "offsets      none", "0.0005", f"{longest[1]:.1f}"):
        assert part in text


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
