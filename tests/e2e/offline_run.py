"""Runs `LLM.generate` in a process of its own and prints what its outputs carry, as JSON."""

import json
import sys
from typing import Any

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

TEXT = "Rivers carry water from the mountains to the sea, and towns grow beside them. " * 8


def main() -> None:
    """Generate with several settings in one batch."""
    llm = LLM(
        sys.argv[1],
        dtype="float32",
        max_model_len=512,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,
        attention_backend="toptheta",
        additional_config={"toptheta": {"k": 32, "min_kv_len": 64}},
    )
    common: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True}
    settings = [
        SamplingParams(**common, extra_args={"toptheta_k": 48, "toptheta_layers": True}),
        SamplingParams(**common, n=2),
        SamplingParams(**common, extra_args={"toptheta": "off"}),
    ]
    answers = llm.generate([TEXT] * len(settings), settings, use_tqdm=False)
    result: dict[str, Any] = {"shown": [answer.kv_transfer_params for answer in answers]}
    try:
        llm.generate([TEXT], SamplingParams(extra_args={"toptheta_k": 1}), use_tqdm=False)
    except VLLMValidationError as error:
        result["error"] = str(error)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
