"""Offline inference with pruning, and what every answer cost.

python examples/offline.py MODEL
"""

import sys

from vllm import LLM, SamplingParams


def main() -> None:
    llm = LLM(
        sys.argv[1],
        attention_backend="toptheta",
        additional_config={"toptheta": {"min_prob": 0.001, "min_kv_len": 256}},
        max_model_len=4096,
    )
    text = "The lighthouse keeper wrote down every ship that passed. " * 60
    questions = [f"{text}\nWho wrote?", f"{text}\nWhat did he write down?"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    sampling = SamplingParams(max_tokens=32, temperature=0, extra_args={"toptheta_min_prob": 0.002})
    for answer in llm.chat(chats, sampling):
        cost = answer.kv_transfer_params["toptheta"]  # where vLLM lets a plug-in add to an output
        print(answer.outputs[0].text.strip())
        print(f"  {cost['v_rows_read']} of {cost['v_rows_scored']} V rows read")


if __name__ == "__main__":
    main()
