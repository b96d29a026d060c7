"""The user's files: what becomes a question, what scores, what is refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from evaluation.tasks.stub import Stub

from vllm_toptheta import cli
from vllm_toptheta.evaluation.tasks import humaneval, sandbox, user_texts
from vllm_toptheta.evaluation.tasks.cases import Source, Unbuildable

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Town {n} has {n + 100} people. {'It rains. ' * 20}",
                    "qas": [
                        {
                            "question": f"How many live in town {n}?",
                            "answers": [{"text": str(n + 100)}],
                        },
                        {"question": "Why?", "answers": []},
                    ],
                }
                for n in range(40)
            ]
        }
    ]
}
HOTPOT = [
    {
        "question": f"Who wrote {n}?",
        "answer": f"Writer {n}",
        "context": [[f"Book {n}", [f"{n} is by Writer {n}.", " It is long."]], ["Other", ["No."]]],
    }
    for n in range(40)
]


def written(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(("data", "name"), [(SQUAD, "qa_1"), (HOTPOT, "qa_2")])
def test_questions_and_their_documents(stub: Stub, tmp_path: Path, data: Any, name: str) -> None:
    found, task = user_texts.question_answering(written(tmp_path / "qa.json", data))
    assert found == name
    case = next(task(Source(stub.server, 1500, 0, "")))
    (question,) = case.questions
    number = question.text.split()[-1].rstrip("?")
    if name == "qa_1":
        assert f"Town {number} has" in case.context
        assert question.score(f" {int(number) + 100}.") == 1
    else:
        number = question.text.split()[-1].rstrip("?")
        assert f"Book {number}\n{number} is by Writer {number}. It is long." in case.context
        assert question.score(f" writer {number}") == 1
    assert question.score("nobody") == 0
    assert 1000 < len(case.context) < 1500


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither like SQuAD nor like HotpotQA"):
        user_texts.question_answering(written(tmp_path / "qa.json", {"items": []}))


def test_lines_that_share_a_context_are_one_case(stub: Stub, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    lines = [
        {"context": "A long text.", "prompt": "What?", "answer": "This"},
        {"context": "A long text.", "prompt": "Who?", "answer": ["He", "she"], "max_tokens": 5},
        {"prompt": "1 + 1 =", "answer": "2"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    task = user_texts.json_lines(path)
    first, second = task(Source(stub.server, 200, 0, ""))
    assert (first.context, [q.text for q in first.questions]) == ("A long text.", ["What?", "Who?"])
    assert (second.context, second.questions[0].text) == ("1 + 1 =", "")
    assert [q.max_tokens for q in first.questions] == [64, 5]
    assert first.questions[1].score("It was She.") == 1
    assert first.questions[1].score("It was I.") == 0
    with pytest.raises(Unbuildable, match="mine.jsonl has a question of"):
        next(task(Source(stub.server, 40, 0, "")))
    path.write_text('{"prompt": "x"}')
    with pytest.raises(ValueError, match="line 1: KeyError"):
        user_texts.json_lines(path)


PROBLEMS = [
    {
        "task_id": f"Test/{n}",
        "prompt": f'def add_{n}(x):\n    """ Add {n}. """\n',
        "canonical_solution": f"    return x + {n}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
        "entry_point": f"add_{n}",
    }
    for n in range(20)
]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_humaneval_asks_half_after_the_solved_other_half(
    stub: Stub, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"HumanEval{suffix}"
    text = "\n".join(map(json.dumps, PROBLEMS)).encode()
    path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    (case,) = humaneval.humaneval(path)(Source(stub.server, 800, 0, ""))
    assert len(case.questions) == 10
    assert case.context.count("return x +") > 5
    question = case.questions[0]
    number = question.text.split("_")[1].split("(")[0]
    assert f"add_{number}(" not in case.context
    assert question.score(f"    return x + {number}") == 1
    assert question.score(f"    return x + {number}\n\nassert add_{number}(1) == 0") == 1
    assert len(question.stop) <= 4
    assert question.score(f"    return x - {number}") == 0
    assert question.score("    return x +") == 0


def test_code_runs_only_where_it_is_allowed(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "HumanEval.jsonl"
    path.write_text("\n".join(map(json.dumps, PROBLEMS)))
    command = ["evaluate", "tasks", "--url", "http://stub", "--humaneval", str(path)]
    assert cli.main(command) == 1
    assert "--allow-code-execution" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("assert 1 + 1 == 2", True),
        ("print('any\\noutput', flush=True)", True),
        ("assert 1 + 1 == 3", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("while True: pass", False),
        ("import time; time.sleep(60)", False),
        ("x = bytearray(3 << 30)", False),
        ("open('file', 'w')", False),
        ("import os; os.open('file', os.O_CREAT)", False),
        ("import subprocess; subprocess.run(['true'])", False),
        ("import os; os.fork()", False),
        ("import socket; socket.socket()", False),
        ("import collections, math, re, typing; math.pi", True),
        ("def (", False),
    ],
)
def test_sandbox(program: str, outcome: bool) -> None:
    assert sandbox.runs(program, seconds=2) is outcome
