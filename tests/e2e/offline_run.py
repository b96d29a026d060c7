"""Runs `LLM.generate` in a process of its own and prints what its outputs carry, as JSON."""

import json
import sys
from typing import Any

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

TEXT = "Rivers carry water from the mountains to the sea, and towns grow beside them. " * 8
PROMPT_TOKENS = 126
"""Every sequence outgrows its first block of 128 tokens after the second token."""
NUM_BLOCKS = 7
"""Of four sequences, one has to give way when they grow; one block is vLLM's own."""


def main() -> None:
    """Generate with several settings in one batch."""
    llm = LLM(
        sys.argv[1],
        dtype="float32",
        max_model_len=512,
        kv_cache_memory_bytes=1 << 28,
        num_gpu_blocks_override=NUM_BLOCKS,
        enforce_eager=True,
        disable_log_stats=False,
        attention_backend="toptheta",
        additional_config={"toptheta": {"min_prob": 0.01, "min_kv_len": 64}},
    )
    # As good as greedy, which vLLM refuses for n > 1.
    common: dict[str, Any] = {"max_tokens": 8, "ignore_eos": True, "temperature": 0.01}
    settings = [
        SamplingParams(**common, extra_args={"toptheta_min_prob": 0.03, "toptheta_layers": True}),
        SamplingParams(**common, n=2),
        SamplingParams(**common, extra_args={"toptheta": "off"}),
    ]
    ids = llm.get_tokenizer().encode(TEXT)[:PROMPT_TOKENS]
    answers = llm.generate([{"prompt_token_ids": ids}] * len(settings), settings, use_tqdm=False)
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    result: dict[str, Any] = {
        "shown": [answer.kv_transfer_params for answer in answers],
        "ids": [[list(out.token_ids) for out in answer.outputs] for answer in answers],
        "preemptions": metrics["vllm:num_preemptions"].value,
        "runner": "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1",
    }
    try:
        llm.generate([TEXT], SamplingParams(extra_args={"toptheta_min_prob": 0.5}), use_tqdm=False)
    except VLLMValidationError as error:
        result["error"] = str(error)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
