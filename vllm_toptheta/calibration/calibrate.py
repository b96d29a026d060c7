"""A model's name in, its threshold table out: corpus, collect and fit in one call."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import vllm_toptheta
from vllm_toptheta.calibration.collect import AttentionStatistics, Collector
from vllm_toptheta.calibration.corpus import Corpus
from vllm_toptheta.calibration.fit import fit
from vllm_toptheta.config import TopThetaConfig
from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.thresholds import SCHEMA_VERSION, TableMetadata, ThresholdTable


@dataclass(frozen=True)
class CalibrationOptions:
    """What a calibration may vary.

    Attributes:
        num_tokens: tokens to calibrate on, rounded up to whole documents.
        length: tokens per document; what is known of longer rows is extrapolated.
        min_prob: attention probability below which keys are dropped where the weights of the
            compensation are fitted.
    """

    num_tokens: int = 16384
    length: int = 4096
    min_prob: float = TopThetaConfig.model_fields["min_prob"].default

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"tokens must be positive, got {self.num_tokens}")
        if not 0 < self.min_prob < 1:
            raise ValueError(f"min_prob must lie between 0 and 1, got {self.min_prob:g}")


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
        ValueError: there is no such dtype or device; no weights were read.
    """
    kind = None if dtype == "auto" else getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}, expected float32, bfloat16, float16 or auto")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}") from error
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=kind or "auto")
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
    config = AutoConfig.from_pretrained(model_name)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < options.length:
        print(
            f"documents of {positions} tokens instead of {options.length}: the model's positions",
            file=sys.stderr,
        )
        options = replace(options, length=positions)
    AttentionStatistics.check_length(options.length)
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
    identity = ModelIdentity.from_config(model.config, name, max_len=options.length)
    if "chunked_attention" in str(identity.fields.get("layer_types", "")):
        raise ValueError(f"{name}: layers with chunked attention are not supported")
    if not identity.uniform:
        raise ValueError(
            f"{name}: layers differ in kv heads, and a table has as many for all; serve the model "
            "without one"
        )
    statistics = AttentionStatistics.empty(
        identity.num_layers, identity.num_heads, identity.num_kv_heads, options.length
    )
    Collector(model, statistics, options.min_prob).run(
        corpus.documents(tokenizer, length=options.length, num_tokens=options.num_tokens), report
    )
    metadata = TableMetadata(
        schema_version=SCHEMA_VERSION,
        identity=identity,
        windows=statistics.windows,
        min_prob=options.min_prob,
        corpus=corpus.description,
        num_tokens=statistics.num_tokens,
        length=options.length,
        versions={
            "vllm_toptheta": getattr(vllm_toptheta, "__version__", "unknown"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=_command(name, corpus, options, model.dtype),
    )
    return ThresholdTable(metadata, **vars(fit(statistics)))


def _command(name: str, corpus: Corpus, options: CalibrationOptions, dtype: torch.dtype) -> str:
    more = "" if dtype == torch.float32 else f" --dtype {str(dtype).removeprefix('torch.')}"
    if corpus.files:
        more += f" --text {' '.join(corpus.files)}"
    return (
        f"toptheta calibrate {name}{more} --tokens {options.num_tokens} --length {options.length} "
        f"--min-prob {options.min_prob:g}"
    )


def read_corpus(paths: list[Path] | None) -> Corpus:
    """The user's files, or the default corpus without any."""
    return Corpus.from_files(paths) if paths else Corpus.default()
