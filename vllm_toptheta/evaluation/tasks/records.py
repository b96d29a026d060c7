"""Answers in, a file of JSON lines that a stopped run goes on from out."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any


@dataclass(frozen=True)
class Record:
    """One answer.

    Attributes:
        model: who answered.
        task, length, index: which question, at how many tokens.
        question_rows: "prompt", or "decoded" where the question's rows were decode rows.
        variant: "dense", or the setting.
        prompt: hash of everything that was sent.
        text: the answer.
        score: its points, from 0 to 1.
        prompt_tokens: of context, and of the question where it is part of the prompt.
        tokens: generated, a decoded question's included.
        token_ids: of the answer, where a task looks at them.
        toptheta: the server's counts; None where it has none.
        seconds: from request to answer.
    """

    model: str
    task: str
    length: int
    index: int
    question_rows: str
    variant: str
    prompt: str
    text: str
    score: float
    prompt_tokens: int
    tokens: int
    token_ids: list[int]
    toptheta: dict[str, Any] | None
    seconds: float


Key = tuple[str, str, int, int, str, str]


def key_of(record: Record) -> Key:
    """What a record is the answer to."""
    return (
        record.model,
        record.task,
        record.length,
        record.index,
        record.variant,
        record.prompt,
    )


def digest(*parts: object) -> str:
    """A short hash of whatever JSON can write."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


class Records:
    """The file; every answer is on disk before the next question is asked."""

    def __init__(self, path: Path) -> None:
        """Open a file and read what is in it.

        Raises:
            OSError: it cannot be read or written.
            ValueError: it is something else.
        """
        self._path = path
        self._lock = Lock()
        self._found: dict[Key, Record] = {}
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # A run that was killed while it wrote leaves half a line.
        whole, _, half = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = Record(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is no answer of this version ({error}); give another "
                    "--records"
                ) from error
            self._found[key_of(record)] = record
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        if half:
            self._file.truncate(len((whole + "\n" if whole else "").encode()))

    def get(self, key: Key) -> Record | None:
        """The answer to a question, where there is one."""
        return self._found.get(key)

    def add(self, record: Record) -> None:
        """Write an answer; from any thread."""
        with self._lock:
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()
            self._found[key_of(record)] = record

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def ordered(records: Iterable[Record]) -> list[Record]:
    """Records by question."""
    return sorted(records, key=lambda record: (record.task, record.length, record.index))
