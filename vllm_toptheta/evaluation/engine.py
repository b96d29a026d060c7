"""Perplexity of prompts through a real vLLM engine: token ids and options in, perplexity and what the engine
counted out.

Prompt rows are teacher-forced, so an engine that prunes them shows what pruning does to a text it did
not write.
"""

import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class EngineResult:
    """One engine's outcome over all documents.

    Attributes:
        perplexity: exp of the mean negative log likelihood per token.
        num_tokens: predicted tokens.
        prefill: the engine's counts of prompt rows, summed over documents; empty where it ran dense.
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
