"""The user's own questions: RULER's two question-answering tasks over files in SQuAD's or
HotpotQA's format, and any JSON lines of prompts and answers."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vllm_toptheta.evaluation.tasks.cases import (
    Case,
    Question,
    Source,
    Task,
    Unbuildable,
    contains_any,
)

_ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words."
)


@dataclass(frozen=True)
class _Asked:
    """A question, the documents it is about, and its possible answers."""

    question: str
    documents: Sequence[str]
    answers: Sequence[str]


def question_answering(path: Path) -> tuple[str, Task]:
    """RULER's qa_1 out of a file like SQuAD, or qa_2 out of one like HotpotQA.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict):
            name, asked = "qa_1", list(_squad(data))
        else:
            name, asked = "qa_2", list(_hotpot(data))
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is neither like SQuAD nor like HotpotQA ({error!r}): expected "
            '{"data": [{"paragraphs": [{"context", "qas"}]}]} or '
            '[{"question", "answer", "context"}]'
        ) from error
    every = list(dict.fromkeys(document for item in asked for document in item.documents))
    if not asked:
        raise ValueError(f"{path} has no question with an answer")

    def build(source: Source, units: int, index: int) -> Case:
        chance = source.chance(name, source.length, index)
        order = source.chance(name).sample(range(len(asked)), len(asked))
        item = asked[order[index % len(asked)]]
        others = [document for document in every if document not in item.documents]
        documents = [*item.documents, *chance.sample(others, min(units, len(others)))]
        chance.shuffle(documents)
        listed = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
        return Case(
            f"{_ASK}\n\nThe following are given documents.\n\n{listed}",
            [
                Question(
                    f"\n\n{_ASK}\n\nQuestion: {item.question}",
                    "\nAnswer:",
                    max_tokens=32,
                    score=contains_any(item.answers),
                    stop=("\n",),
                )
            ],
        )

    def cases(source: Source) -> Iterator[Case]:
        for index in itertools.count():
            yield source.fill(partial(build, source, index=index), smallest=0)

    return name, cases


def _squad(data: Any) -> Iterator[_Asked]:
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            for item in paragraph["qas"]:
                answers = list(dict.fromkeys(answer["text"] for answer in item["answers"]))
                if answers:
                    yield _Asked(item["question"], [paragraph["context"]], answers)


def _hotpot(data: Any) -> Iterator[_Asked]:
    for item in data:
        documents = [f"{title}\n{''.join(parts)}" for title, parts in item["context"]]
        yield _Asked(item["question"], documents, [item["answer"]])


def json_lines(path: Path) -> Task:
    """Questions of a file: `{"prompt", "answer"}` a line, the answer a text or a list of which one
    is enough; also "context", which comes first and is cached for the lines that share it, and
    "max_tokens".

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is something else.
    """
    lines: list[tuple[str, Question]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            item = json.loads(line)
            answers = [item["answer"]] if isinstance(item["answer"], str) else item["answer"]
            context, prompt = item.get("context"), item["prompt"]
            question = Question(
                text="" if context is None else prompt,
                lead="",
                max_tokens=int(item.get("max_tokens", 64)),
                score=contains_any(list(answers)),
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{path}, line {number}: {error!r}; expected {{"prompt": "...", "answer": "..."}}'
            ) from error
        lines.append((prompt if context is None else context, question))

    def cases(source: Source) -> Iterator[Case]:
        for context, group in itertools.groupby(lines, lambda line: line[0]):
            case = Case(context, [question for _, question in group])
            if (used := source.tokens(case)) > source.length:
                raise Unbuildable(
                    f"{path.name} has a question of {used} tokens; give a larger --lengths"
                )
            yield case

    return cases
