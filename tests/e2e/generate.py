"""Runs prompts of token ids through `LLM` and writes the generated ids and summaries as JSON; a
process of its own, because vLLM keeps global state.

Usage: python generate.py OUTPUT MODEL PROMPTS_JSON MAX_TOKENS [TOPTHETA_OPTIONS_JSON]
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def main() -> None:
    """Generate greedily."""
    output_path, model, prompts, max_tokens, *rest = sys.argv[1:]
    ours: dict[str, Any] = {}
    if rest:
        options = json.loads(rest[0])
        ours = {"attention_backend": "toptheta", "additional_config": {"toptheta": options}}
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_num_seqs=4,
        **ours,
    )
    params = SamplingParams(
        temperature=0, max_tokens=int(max_tokens), ignore_eos=True, detokenize=False
    )
    ids = json.loads(prompts)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in ids], params)
    answers = [
        {"ids": list(output.outputs[0].token_ids), "summary": output.kv_transfer_params}
        for output in outputs
    ]
    Path(output_path).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
