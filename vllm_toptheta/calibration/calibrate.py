"""A model's name in, its threshold table out: corpus, engine, collect and fit in one call."""

import importlib.metadata
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_toptheta.calibration.collect import AttentionStatistics
from vllm_toptheta.calibration.corpus import Corpus
from vllm_toptheta.calibration.fit import fit
from vllm_toptheta.config import TopThetaConfig
from vllm_toptheta.thresholds import SCHEMA_VERSION, TableMetadata, ThresholdTable

DEFAULT_LENGTH = 4096


@dataclass(frozen=True)
class CalibrationOptions:
    """What a calibration may vary.

    Attributes:
        num_tokens: tokens to calibrate on, rounded up to whole documents.
        length: tokens per document; what is known of longer rows is extrapolated. None for
            DEFAULT_LENGTH, or fewer where the model has fewer positions.
        min_prob: attention probability below which keys are dropped where the weights of the
            compensation are fitted.
    """

    num_tokens: int = 16384
    length: int | None = None
    min_prob: float = TopThetaConfig.model_fields["min_prob"].default

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"tokens must be positive, got {self.num_tokens}")
        if not 0 < self.min_prob < 1:
            raise ValueError(f"min_prob must lie between 0 and 1, got {self.min_prob:g}")
        if self.length is not None:
            AttentionStatistics.check_length(self.length)


def repo_name(model_name: str) -> str:
    """ "org/model" for a repository, a folder or a snapshot in the Hugging Face cache, without
    machine paths.
    """
    parts = [part for part in model_name.split("/") if part not in ("", ".", "..")]
    for part in parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return "/".join(parts[-2:])


def calibrate(
    engine_args: Any,
    corpus: Corpus,
    options: CalibrationOptions,
    *,
    name: str | None = None,
) -> ThresholdTable:
    """Calibrate a model in a vLLM engine, with a progress bar on stderr; writes nothing.

    Args:
        engine_args: vLLM's `EngineArgs` of the server that the table is for.
        corpus: the text.
        options: see there.
        name: model name to record, as "org/model"; from the model by default.

    Raises:
        OSError: the model cannot be read.
        ValueError: the model cannot be calibrated, or the text is too short. No weights were read.
    """
    import vllm

    from vllm_toptheta.calibration.engine import Engine

    name = name or repo_name(engine_args.model)
    engine = Engine.create(engine_args, name, options.length, DEFAULT_LENGTH)
    if options.length is None and engine.length < DEFAULT_LENGTH:
        print(
            f"documents of {engine.length} tokens instead of {DEFAULT_LENGTH}: the model's "
            "positions",
            file=sys.stderr,
        )
    documents = list(
        corpus.documents(engine.tokenizer(), length=engine.length, num_tokens=options.num_tokens)
    )
    with tqdm(total=len(documents) * engine.length, unit="token", desc="calibrating") as progress:
        statistics = engine.read(documents, options.min_prob, progress.update)
    metadata = TableMetadata(
        schema_version=SCHEMA_VERSION,
        identity=engine.identity,
        windows=statistics.windows,
        min_prob=options.min_prob,
        corpus=corpus.description,
        num_tokens=statistics.num_tokens,
        length=engine.length,
        versions={
            "vllm_toptheta": importlib.metadata.version("vllm-toptheta"),
            "torch": torch.__version__,
            "vllm": vllm.__version__,
        },
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=_command(name, corpus, replace(options, length=engine.length), engine_args, engine),
    )
    return ThresholdTable(metadata, **vars(fit(statistics)))


def _command(
    name: str, corpus: Corpus, options: CalibrationOptions, engine_args: Any, engine: Any
) -> str:
    """The command, with those flags that may change attention scores: others hold paths."""
    model = engine.config.model_config
    flags = ["--dtype", str(model.dtype).removeprefix("torch.")]
    if model.quantization:
        flags += ["--quantization", str(model.quantization)]
    if engine_args.max_model_len:
        flags += ["--max-model-len", str(engine_args.max_model_len)]
    if isinstance(engine_args.hf_overrides, dict) and engine_args.hf_overrides:
        flags += ["--hf-overrides", json.dumps(engine_args.hf_overrides)]
    text = ["--text", *corpus.files] if corpus.files else []
    numbers = ["--tokens", str(options.num_tokens), "--length", str(options.length)]
    numbers += ["--min-prob", f"{options.min_prob:g}"]
    return shlex.join(["toptheta", "calibrate", name, *text, *numbers, "--", *flags])


def read_corpus(paths: list[Path] | None) -> Corpus:
    """The user's files, or the default corpus without any."""
    return Corpus.from_files(paths) if paths else Corpus.default()


def check_writable(path: Path) -> None:
    """Raise ValueError, before anything slow, where a file cannot be written; makes no folders."""
    try:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}") from error
