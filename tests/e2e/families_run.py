"""Serves checkpoints, one after the other, by stock vLLM and with Top-theta, and writes down how
far each came; in one process, because vLLM takes longer to import than to start a tiny model.

Usage: python families_run.py OUTPUT JOBS_JSON; jobs are [name, checkpoint, arguments of `LLM`,
whether stock serves it too], and the output has an object for each name.
"""

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.models import registry
from vllm.v1.executor.uniproc_executor import UniProcExecutor

PROMPTS = [[14 + (i * 37 + i * i * 11) % 490 for i in range(n)] for n in (200, 190)]
SETTINGS = [
    SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, extra_args=extra)
    for extra in ({"toptheta": "off"}, None)
]
COMMON: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "kv_cache_memory_bytes": 1 << 23,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_num_seqs": 2,
}
OPTIONS = {"min_kv_len": 32, "min_prob": 0.01, "min_mass": 0.0}
OURS = {"attention_backend": "toptheta", "additional_config": {"toptheta": OPTIONS}}

workers: list[Any] = []
"""Executors that were started."""


def serve(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Start, generate, stop."""
    result: dict[str, Any] = {"error": None}
    llm = None
    workers.clear()
    try:
        llm = LLM(model, **{**COMMON, **arguments})
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = llm.generate(prompts, SETTINGS, use_tqdm=False)
        result["ids"] = [list(output.outputs[0].token_ids) for output in outputs]
        result["counts"] = [(output.kv_transfer_params or {}).get("toptheta") for output in outputs]
    except Exception as error:  # noqa: BLE001
        result["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
    result["worker_started"] = bool(workers)
    return result


def main() -> None:
    """Run all jobs."""
    # vLLM asks a process of its own what an architecture can do, and collects garbage often.
    registry._run_in_subprocess = lambda ask: ask()
    gc.collect = lambda *args: 0
    start = UniProcExecutor._init_executor
    UniProcExecutor._init_executor = lambda self: (workers.append(self), start(self))[1]
    results = {}
    for name, model, arguments, stock in json.loads(sys.argv[2]):
        results[name] = {"ours": serve(model, {**arguments, **OURS})}
        if stock:
            results[name]["stock"] = serve(model, arguments)
        Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
