"""A model in this process answers as the same model read from the start does, under every rule."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_documents, tiny_model, tiny_tokenizer
from transformers import DynamicCache

from vllm_toptheta import cli
from vllm_toptheta.evaluation.fidelity import read_prompt
from vllm_toptheta.evaluation.model import replaced_attention
from vllm_toptheta.evaluation.rules import TopK
from vllm_toptheta.evaluation.tasks.local import RULE, LocalModel
from vllm_toptheta.evaluation.tasks.server import Request


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("org") / "tiny"
    tiny_model().to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def expected(model: Any, prompt: list[int], forced: list[int], tokens: int, rule: Any) -> list[int]:
    """One row at a time, without any reuse."""
    cache: DynamicCache = read_prompt(model, torch.tensor(prompt), [])
    cache.crop(len(prompt) - 1)
    given, out = [prompt[-1], *forced], []
    with torch.inference_mode():
        logits = model(torch.tensor([given[:1]]), past_key_values=cache).logits[0, -1]
        for token in forced:
            with replaced_attention(model, rule):
                logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
        for _ in range(tokens):
            out.append(int(logits.argmax()))
            with replaced_attention(model, rule):
                logits = model(torch.tensor([[out[-1]]]), past_key_values=cache).logits[0, -1]
    return out


def test_answers_do_not_depend_on_what_was_read_before(checkpoint: Path) -> None:
    local = LocalModel(str(checkpoint), None)
    first, second = (ids.tolist() for ids in random_documents(2, 200))
    prompts = [first, first[:150] + second[:30], second]
    for prompt in prompts:
        for forced in ((), (5, 6, 7)):
            request = Request(6, forced=forced, ignore_eos=True)
            answer = local.complete(prompt, {RULE: "top_k:8"}, request)
            model = local._model
            assert answer.token_ids == expected(model, prompt, list(forced), 6, TopK(8))
            counts = answer.toptheta
            assert counts is not None
            assert answer.tokens == 6 + len(forced)
            config = model.config
            per_token = config.num_hidden_layers * config.num_attention_heads
            assert counts["rows"] == (answer.tokens - 1) * per_token
            assert 0 < counts["v_rows_read"] < counts["v_rows_scored"]
            assert counts["dense_rows"]["all_kept"] < counts["rows"] / 2  # small windows


def test_rivals_answer_beside_ours(checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    lines = tmp_path / "mine.jsonl"
    text = "some text of a tiny model " * 60
    lines.write_text(json.dumps({"context": text, "prompt": "x?", "answer": "y", "max_tokens": 4}))
    command = ["evaluate", "tasks", "--local", str(checkpoint), "--jsonl", str(lines)]
    command += ["--question-rows", "decoded", "--json", str(report), "--lengths", "2000"]
    command += ["--records", str(tmp_path / "r"), "--min-prob", "0.01", "--rivals", "top_k:4"]
    assert cli.main(command) == 0
    ours, theirs = json.loads(report.read_text())
    assert (ours["variant"], theirs["variant"]) == ("toptheta:0.01", "top_k:4")
    assert theirs["v_row_fraction"] < 0.01
    assert theirs["pruned_row_share"] > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--local", "nothing", "--rivals", "best:1"], "rival 'best:1'"),
        (["--local", "nothing", "--rivals", "paper:64"], "use evaluate fidelity"),
        (["--url", "http://nobody", "--rivals", "top_k:1"], "give --local"),
    ],
)
def test_wrong_rivals(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["evaluate", "tasks", *arguments]) == 1
    assert message in capsys.readouterr().err
