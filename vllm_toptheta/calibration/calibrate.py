"""A model's name in, its threshold table out: corpus, collect and fit in one call."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import vllm_toptheta
from vllm_toptheta.calibration.collect import Collector, ScoreStatistics
from vllm_toptheta.calibration.corpus import Corpus
from vllm_toptheta.calibration.fit import fit
from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.thresholds import SCHEMA_VERSION, TableMetadata, ThresholdTable

_CLIPPED_LIMIT = 1e-4


@dataclass(frozen=True)
class CalibrationOptions:
    """What a calibration may vary; the defaults are the measured best.

    Attributes:
        num_tokens: tokens to calibrate on, rounded up to whole documents.
        length: tokens per document; thresholds for longer rows are extrapolated.
        allocation: how a level's k is divided among heads.
        tac_k: top-k at calibration: what the layers output while calibrating; 0 leaves them dense.
        group_size: tokens per compensation group, used where tac_k is.
    """

    num_tokens: int = 65536
    length: int = 4096
    allocation: Literal["lost_mass", "uniform"] = "lost_mass"
    tac_k: int = 0
    group_size: int = 16


def load_model(
    model_name: str, *, dtype: str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model in eval mode, and its tokenizer.

    Args:
        model_name: repository or folder.
        dtype: torch dtype's name, or "auto" for the checkpoint's.
        device: torch device.

    Raises:
        OSError: there is no such model.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(
        model_name, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
    )
    return model.to(device).eval(), tokenizer


def repo_name(model_name: str) -> str:
    """ "org/model" for a repository, a folder or a snapshot in the Hugging Face cache, without
    machine paths.
    """
    parts = [part for part in model_name.split("/") if part not in ("", ".", "..")]
    for part in parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return "/".join(parts[-2:])


def calibrate_with_progress(
    model_name: str,
    texts: list[Path] | None,
    options: CalibrationOptions,
    *,
    name: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> ThresholdTable:
    """Load a model and calibrate it, with a progress bar on stderr; writes nothing.

    Args:
        model_name: repository or folder.
        texts: text files; None or empty for the default corpus.
        options: see there.
        name: model name to record; from model_name by default.
        dtype: torch dtype's name, or "auto" for the checkpoint's.
        device: torch device.

    Raises:
        OSError: the model or a text cannot be read.
        ValueError: the model cannot be calibrated, or the text is too short.
    """
    corpus = read_corpus(texts)
    model, tokenizer = load_model(model_name, dtype=dtype, device=device)
    with tqdm(total=options.num_tokens, unit="token", desc="calibrating") as progress:
        return calibrate(
            model,
            tokenizer,
            corpus,
            options,
            name=name or repo_name(model_name),
            report=progress.update,
        )


def calibrate(
    model: PreTrainedModel,
    tokenizer: Any,
    corpus: Corpus,
    options: CalibrationOptions,
    *,
    name: str,
    report: Callable[[int], object] | None = None,
) -> ThresholdTable:
    """Calibrate a model; writes nothing.

    Args:
        model: a causal language model in eval mode.
        tokenizer: its tokenizer.
        corpus: the text.
        options: see there.
        name: model name to record, as "org/model".
        report: told the number of tokens after each document.

    Raises:
        ValueError: the model cannot be calibrated, or the text is too short.
    """
    identity = ModelIdentity.from_config(model.config, name)
    if "chunked_attention" in str(identity.fields.get("layer_types", "")):
        raise ValueError(f"{name}: layers with chunked attention are not supported")
    statistics = ScoreStatistics.empty(identity.num_layers, identity.num_heads, options.length)
    collector = Collector(model, statistics, options.tac_k, options.group_size)
    collector.run(
        corpus.documents(tokenizer, length=options.length, num_tokens=options.num_tokens), report
    )
    if statistics.clipped_fraction > _CLIPPED_LIMIT:
        raise ValueError(
            f"{statistics.clipped_fraction:.2%} of the scores lie above the range that the first "
            "document showed; thresholds would be wrong: put a more typical document first"
        )
    fitted = fit(statistics, options.allocation)
    metadata = TableMetadata(
        schema_version=SCHEMA_VERSION,
        identity=identity,
        windows=statistics.windows,
        allocation=options.allocation,
        group_size=options.group_size,
        tac_k=options.tac_k,
        corpus=corpus.description,
        num_tokens=statistics.num_tokens,
        length=options.length,
        versions={
            "vllm_toptheta": getattr(vllm_toptheta, "__version__", "unknown"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=_command(name, corpus, options),
    )
    return ThresholdTable(metadata, **vars(fitted))


def _command(name: str, corpus: Corpus, options: CalibrationOptions) -> str:
    text = f" --text {' '.join(corpus.files)}" if corpus.files else ""
    return (
        f"toptheta calibrate {name}{text} --tokens {options.num_tokens} --length {options.length} "
        f"--allocation {options.allocation} --tac-k {options.tac_k} "
        f"--group-size {options.group_size}"
    )


def read_corpus(paths: list[Path] | None) -> Corpus:
    """The user's files, or the default corpus without any."""
    return Corpus.from_files(paths) if paths else Corpus.default()
