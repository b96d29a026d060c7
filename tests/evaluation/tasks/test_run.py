"""The run: pairs, settings, resuming, forced questions, counts, warnings and errors."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from evaluation.tasks.stub import Stub

from vllm_toptheta import cli
from vllm_toptheta.evaluation.tasks.server import FORCED_TOKENS


def look_up(body: dict[str, Any], prompt: str) -> str:
    """A perfect model, but for one digit where rows are pruned hard."""
    key = re.findall(r"What is the code of the ([a-z ]+)\?", prompt)[-1]
    code = re.findall(rf"The code of the {key} is (\d+)\.", prompt)[0]
    hard = body.get("vllm_xargs", {}).get("toptheta_min_prob", 0) > 0.01
    return f" {'0' if hard and key < 'm' else ''}{code}. And so on"


def run(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    report = tmp_path / "report.json"
    files = ["--records", str(tmp_path / "records.jsonl"), "--json", str(report)]
    size = ["--lengths", "12000", "--questions", "12", "--concurrency", "2"]
    command = ["evaluate", "tasks", "--url", "http://stub", *files, *size, *arguments]
    assert cli.main(command) == 0
    results: list[dict[str, Any]] = json.loads(report.read_text())
    return results


def test_settings_are_paired_with_dense(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.say = look_up
    easy, hard = run(tmp_path, "--min-prob", "0.002", "0.02", "--min-mass", "0.5")
    asked = [body.get("vllm_xargs") for body in stub.requests if body["max_tokens"] > 1]
    assert asked.count({"toptheta": "off"}) == 12
    assert asked.count({"toptheta_min_prob": 0.02, "toptheta_min_mass": 0.5}) == 12
    assert easy["variant"] == "min_prob 0.002 min_mass 0.5"
    assert (easy["questions"], easy["dense_score"], easy["score"]) == (12, 1, 1)
    assert 0 < hard["score"] < 1
    assert hard["difference"] == pytest.approx(hard["score"] - 1)
    n, p = 12, hard["score"]
    assert hard["difference_standard_error"] == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)
    assert hard["same_answers"] == pytest.approx(p)
    assert easy["v_row_fraction"] == pytest.approx(0.25, abs=0.01)
    assert easy["kept_mass"] == 0.5
    # Six tokens, the first of which the prompt's last row writes.
    assert easy["pruned_row_share"] == pytest.approx(5 / 6)
    assert "warning" not in capsys.readouterr().err


def test_a_second_run_asks_what_is_missing(stub: Stub, tmp_path: Path) -> None:
    stub.say = look_up
    first = run(tmp_path)
    lines = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(lines[:-4]) + lines[-4][:50])
    stub.requests.clear()
    assert run(tmp_path)[0]["score"] == first[0]["score"]
    assert len([body for body in stub.requests if body["max_tokens"] > 1]) == 4
    stub.requests.clear()
    run(tmp_path)
    assert [body["max_tokens"] for body in stub.requests] == [1]
    run(tmp_path, "--seed", "1")
    assert len(stub.requests) == 1 + 1 + 24


def test_one_context_is_one_prefill(stub: Stub, tmp_path: Path) -> None:
    stub.say = look_up
    run(tmp_path)
    prompts = ["".join(map(chr, b["prompt"])) for b in stub.requests if b["max_tokens"] > 1]
    assert len({prompt.rpartition("\n\nWhat is")[0] for prompt in prompts}) == 1
    assert len(set(prompts)) == 12


def test_decoded_questions_are_forced_and_cut_off(stub: Stub, tmp_path: Path) -> None:
    stub.say = look_up
    (result,) = run(tmp_path, "--question-rows", "decoded")
    asked = next(body for body in stub.requests if body["max_tokens"] > 1)
    question = "".join(map(chr, asked["vllm_xargs"][FORCED_TOKENS]))
    assert question.startswith("\n\nWhat is the code of the ")
    assert asked["max_tokens"] == len(question) + 8
    assert question not in "".join(map(chr, asked["prompt"]))
    assert result["score"] == 1
    record = json.loads((tmp_path / "records.jsonl").read_text().splitlines()[0])
    assert re.fullmatch(r" \d{5}", record["text"])
    assert result["pruned_row_share"] > 0.95


def test_a_server_that_does_not_force_is_refused(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.forces = False
    command = ["evaluate", "tasks", "--url", "http://stub", "--lengths", "12000"]
    command += ["--records", str(tmp_path / "r.jsonl"), "--question-rows", "decoded"]
    assert cli.main(command) == 1
    assert "--logits-processors" in capsys.readouterr().err


def test_few_pruned_rows_are_warned_about(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.say, stub.min_kv_len = look_up, 10**6
    (result,) = run(tmp_path)
    assert result["pruned_row_share"] == 0
    assert "0% of the rows that wrote the answers were pruned" in capsys.readouterr().err


def test_other_servers_need_a_dense_one(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.say, stub.pruned = look_up, False
    command = ["evaluate", "tasks", "--url", "http://stub", "--records", str(tmp_path / "r")]
    assert cli.main(command) == 1
    assert "--dense-url" in capsys.readouterr().err
    (result,) = run(tmp_path, "--dense-url", "http://stub")
    assert (result["variant"], result["score"], result["v_row_fraction"]) == ("served", 1, None)
    assert all("vllm_xargs" not in body for body in stub.requests)


def test_a_chat_asks_inside_the_template(stub: Stub, tmp_path: Path) -> None:
    stub.say = look_up
    run(tmp_path, "--chat")
    prompt = "".join(map(chr, stub.requests[-1]["prompt"]))
    assert prompt.startswith("rules ")
    assert "<user>" in prompt
    assert 11000 < len(prompt) <= 12000 - 8
    assert re.search(r"the code of the [a-z ]+\?<assistant> The code of the [a-z ]+ is$", prompt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "niah"], "no task 'niah'; give --tasks ruler niah_single_1"),
        (["--questions", "0"], "at least 1"),
        (["--model", "other"], "does not serve 'other'; give --model stub"),
    ],
)
def test_wrong_arguments(
    stub: Stub, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(["evaluate", "tasks", "--url", "http://stub", *arguments]) == 1
    assert message in capsys.readouterr().err
