"""The dial from the openai client: one question at several settings, and what each of them read.

vllm serve MODEL --attention-backend toptheta
python examples/client.py
"""

from openai import OpenAI

SETTINGS: dict[str, dict[str, str | float]] = {
    "the server's": {},
    "more exact": {"toptheta_min_prob": 0.0002},
    "cheaper, with a floor": {"toptheta_min_prob": 0.005, "toptheta_min_mass": 0.7},
    "dense": {"toptheta": "off"},
}


def main() -> None:
    client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")
    model = client.models.list().data[0].id
    text = "The lighthouse keeper wrote down every ship that passed. " * 150
    for name, xargs in SETTINGS.items():
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"{text}\nWhat did he write down?"}],
            max_tokens=48,
            temperature=0,
            extra_body={"vllm_xargs": xargs},
        )
        cost = answer.model_extra["toptheta"] if answer.model_extra else {}
        read, scored = cost["v_rows_read"], cost["v_rows_scored"]
        print(f"{name}: {read} of {scored} V rows, kept mass {cost['kept_mass']}")
        print(f"  {(answer.choices[0].message.content or '').strip()[:100]}")


if __name__ == "__main__":
    main()
