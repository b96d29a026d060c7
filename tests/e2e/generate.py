"""Runs prompts of token ids through one `LLM` after the other and writes the generated ids and
summaries as JSON; a process of its own, because vLLM keeps global state.

Usage: python generate.py OUTPUT MODEL PROMPTS_JSON MAX_TOKENS ENGINES_JSON; engines are a list of
arguments of `LLM`, and the output has a list of answers for each.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def generate(model: str, prompts: list[list[int]], max_tokens: int, engine: dict[str, Any]) -> Any:
    """Generate greedily; every answer has the `heads` of all, as the page of a server asks for
    them."""
    common = {
        "dtype": "float32",
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 1 << 28,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_num_seqs": 4,
    }
    llm = LLM(model, **{**common, **engine})
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    heads = llm.collective_rpc("toptheta_heads") if engine.get("attention_backend") else None
    llm.llm_engine.engine_core.shutdown()
    gc.collect()
    return [
        {
            "ids": list(output.outputs[0].token_ids),
            "summary": output.kv_transfer_params,
            "heads": heads,
        }
        for output in outputs
    ]


def main() -> None:
    """Ask every engine."""
    output_path, model, prompts, max_tokens, engines = sys.argv[1:]
    answers = [
        generate(model, json.loads(prompts), int(max_tokens), engine)
        for engine in json.loads(engines)
    ]
    Path(output_path).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
