"""Perplexity of prompts through a real vLLM engine: token ids and options in, perplexity and what
the engine counted out.

Prompt rows are teacher-forced, so an engine that prunes them shows what pruning does to a text it
did not write.
"""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vllm_toptheta.calibration.calibrate import read_corpus


@dataclass(frozen=True)
class EngineResult:
    """One engine's outcome over all documents.

    Attributes:
        perplexity: exp of the mean negative log likelihood per token.
        num_tokens: predicted tokens.
        prefill: the engine's counts of prompt rows, all documents together; empty where it does not
            count them.
    """

    perplexity: float
    num_tokens: int
    prefill: dict[str, int]

    @property
    def kept_fraction(self) -> float:
        """Kept over scored keys of prompt rows; NaN where nothing was counted."""
        scored = self.prefill.get("keys_scored", 0)
        return self.prefill["keys_kept"] / scored if scored else math.nan


def start_engine(
    model: str, options: Mapping[str, Any] | None, *, length: int, chunk: int, dtype: str
) -> Any:
    """A vLLM engine with Top-theta attention, or a stock one where options is None.

    Args:
        model: repository or folder.
        options: the `toptheta` entry of `--additional-config`.
        length: most tokens of a sequence.
        chunk: most prompt tokens of a step.
        dtype: torch dtype's name.
    """
    from vllm import LLM

    ours: dict[str, Any] = {}
    if options is not None:
        ours = {
            "attention_backend": "toptheta",
            "additional_config": {"toptheta": dict(options)},
        }
    return LLM(
        model,
        dtype=dtype,
        max_model_len=length,
        max_num_batched_tokens=chunk,
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
        enable_prefix_caching=False,
        **ours,
    )


def stop_engine(llm: Any) -> None:
    """End the engine's processes, so that the next one finds the cores and the memory free."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def prompt_perplexity(llm: Any, documents: Sequence[Tensor]) -> EngineResult:
    """Perplexity of documents that are the prompts of an engine.

    Args:
        llm: from `start_engine`.
        documents: token ids, [length] int64 each.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    total, num_tokens = 0.0, 0
    prefill: dict[str, int] = {}
    for document in documents:
        ids = document.tolist()
        answer = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0]
        for token, logprobs in zip(ids[1:], answer.prompt_logprobs[1:], strict=True):
            total -= logprobs[token].logprob
            num_tokens += 1
        counts = summary_of(answer).get("prefill") or {}
        for name, value in counts.items():
            if isinstance(value, int):
                prefill[name] = prefill.get(name, 0) + value
    return EngineResult(math.exp(total / num_tokens), num_tokens, prefill)


def summary_of(answer: Any) -> dict[str, Any]:
    """What the engine counted for one answer, as a response shows it; empty from a stock engine."""
    from vllm_toptheta.telemetry.carrier import KEY
    from vllm_toptheta.telemetry.counters import summarise

    told = (answer.kv_transfer_params or {}).get(KEY)
    if not told:
        return {}
    return summarise(None, told["total"]) if "total" in told else told


def compare_prompts(
    model: str,
    texts: list[Path],
    ks: Sequence[float],
    *,
    length: int,
    num_documents: int,
    min_kv_len: int,
    chunk: int,
    dtype: str,
    report: Callable[[str], object],
) -> list[EngineResult]:
    """Run the same prompts through a stock engine and through one per k that prunes them.

    Args:
        model: repository or folder.
        texts: text files.
        ks: mean keys a prompt row keeps.
        length: tokens per document.
        num_documents: documents.
        min_kv_len: rows of at most so many keys are dense.
        chunk: most prompt tokens of a step.
        dtype: torch dtype's name.
        report: told one line per engine as soon as it is known.

    Returns:
        Stock first, then every k.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    corpus = read_corpus(texts)
    documents = list(corpus.documents(tokenizer, length=length, num_tokens=num_documents * length))
    results: list[EngineResult] = []
    for k in (None, *ks):
        options = k and {"phases": "prefill", "prefill_k": k, "min_kv_len": min_kv_len}
        llm = start_engine(
            model, options or None, length=length + 1, chunk=min(chunk, length), dtype=dtype
        )
        try:
            result = prompt_perplexity(llm, documents)
        finally:
            stop_engine(llm)
        results.append(result)
        report(
            f"{'stock' if k is None else f'prefill_k {k:g}':14} perplexity {result.perplexity:.4f} "
            f"({result.perplexity / results[0].perplexity - 1:+.2%}), "
            f"elements kept {result.kept_fraction:.4f}, {result.num_tokens} tokens"
        )
    return results
