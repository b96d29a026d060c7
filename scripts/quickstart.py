"""Serves a model with Top-theta attention, asks it about a long text, and prints the answer and
what pruning saved and cost."""

import argparse
import os
import pydoc_data.topics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fetch_model import fetch
from openai import OpenAI
from server import Server, add_pruning_options, pruning_options

QUESTION = "In one paragraph, what does the text above explain?"


def setting(summary: dict[str, Any]) -> str:
    """What the rows ran with, as the response says."""
    shown = {name: summary[name] for name in ("min_prob", "min_mass", "k")}
    return ", ".join(f"{name} {number:g}" for name, number in shown.items() if number is not None)


def main() -> None:
    """Run it; everything is stopped again at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint (default: SmolLM2-135M-Instruct)")
    add_pruning_options(parser)
    parser.add_argument("--max-tokens", type=int, default=96)
    args = parser.parse_args()
    model = args.model or fetch()
    # vLLM keeps one core of a small machine for itself unless told otherwise.
    env = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"}
    options = ["--dtype", "float32", "--max-model-len", "4096", "--enforce-eager"]
    options += ["--kv-cache-memory-bytes", str(1 << 30)]
    shown = f"vllm serve {model.name} --attention-backend toptheta " + " ".join(options)
    print(f"Starting: {shown}", flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(
            model,
            *options,
            toptheta=pruning_options(args),
            log_path=Path(folder) / "server.log",
            env=env,
        ) as server,
    ):
        client = OpenAI(base_url=server.url, api_key="none", timeout=1800)
        text = pydoc_data.topics.topics["operator-summary"] + pydoc_data.topics.topics["exceptions"]
        text = (text + pydoc_data.topics.topics["naming"])[:9000]
        print("Asking about a long text (its prefill takes a while on a CPU) ...", flush=True)
        started = time.monotonic()
        answer = client.chat.completions.create(
            model=str(model),
            messages=[{"role": "user", "content": f"{text}\n\n{QUESTION}"}],
            max_tokens=args.max_tokens,
            temperature=0,
        )
        seconds = time.monotonic() - started
        summary = getattr(answer, "toptheta", None)
        usage = answer.usage
        print(f"\nAnswer ({seconds:.0f} s): {(answer.choices[0].message.content or '').strip()}\n")
        if usage is None or summary is None:
            sys.exit(f"The response carries no pruning summary. The server said:\n{server.tail()}")
        print(
            f"{usage.prompt_tokens} prompt tokens, {usage.completion_tokens} generated. "
            f"Decode read {summary['v_rows_read']:,} of {summary['v_rows_scored']:,} V rows "
            f"({summary['v_rows_read'] / summary['v_rows_scored']:.1%}); they hold "
            f"{summary['kept_mass']:.1%} of the attention ({setting(summary)})."
        )


if __name__ == "__main__":
    main()
