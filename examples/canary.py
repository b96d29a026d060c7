"""Sends each prompt of a file twice, dense and pruned, and compares the answers: to run on your
own traffic before pruning serves it.

    vllm serve MODEL --attention-backend toptheta
    python examples/canary.py prompts.txt       # one prompt a line
"""

import sys
from pathlib import Path

from openai import OpenAI

MAX_TOKENS = 128


def main() -> None:
    client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
    model = client.models.list().data[0].id
    same = tokens = read = scored = 0
    prompts = [line for line in Path(sys.argv[1]).read_text().splitlines() if line.strip()]
    for prompt in prompts:
        answers = []
        for xargs in ({"toptheta": "off"}, {}):
            done = client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=MAX_TOKENS,
                temperature=0,
                logprobs=1,
                extra_body={"vllm_xargs": xargs},
            )
            logprobs = done.choices[0].logprobs
            answers.append(logprobs.tokens or [] if logprobs else [])
            if not xargs and done.model_extra:
                read += done.model_extra["toptheta"]["v_rows_read"]
                scored += done.model_extra["toptheta"]["v_rows_scored"]
        dense, pruned = answers
        first = next(
            (i for i, (a, b) in enumerate(zip(dense, pruned, strict=False)) if a != b), len(dense)
        )
        same += first
        tokens += len(dense)
    print(f"{len(prompts)} prompts: {same / max(tokens, 1):.1%} of the tokens precede a difference")
    print(f"V rows read: {read / max(scored, 1):.1%} (rows of at most min_kv_len keys run dense)")


if __name__ == "__main__":
    main()
