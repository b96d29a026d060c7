"""Text in, documents of token ids out; without files, the text that every Python carries."""

import itertools
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_CODE_MODULES = (
    "argparse", "ast", "asyncio/base_events", "asyncio/tasks", "calendar", "codecs",
    "collections/__init__", "concurrent/futures/thread", "configparser", "contextlib", "csv",
    "dataclasses", "datetime", "decimal", "difflib", "dis", "doctest", "email/message", "enum",
    "fractions", "functools", "heapq", "http/client", "http/server", "inspect", "ipaddress",
    "json/decoder", "logging/__init__", "mailbox", "optparse", "pathlib", "pickle", "random",
    "shutil", "socketserver", "statistics", "string", "subprocess", "tarfile", "tempfile",
    "textwrap", "threading", "tokenize", "traceback", "typing", "unittest/case",
    "unittest/mock", "urllib/parse", "urllib/request", "uuid", "weakref",
    "xml/etree/ElementTree", "zipfile",
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Documents' text and where it comes from.

    Attributes:
        description: for the table's provenance; holds no paths.
        streams: independent sources that take turns, each a stream of text.
        shares: relative number of documents each source contributes.
        files: names of the files, without folders; empty for the default corpus.
    """

    description: str
    streams: Sequence[str]
    shares: Sequence[int]
    files: Sequence[str] = ()

    @classmethod
    def from_files(cls, paths: Sequence[Path]) -> "Corpus":
        """A corpus of the user's own text files, a document from each in turn.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is not UTF-8 text.
        """
        texts = []
        for path in paths:
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text: {error}") from error
        names = [path.name for path in paths]
        return cls("files: " + ", ".join(names), texts, [1] * len(texts), names)

    @classmethod
    def default(cls) -> "Corpus":
        """English prose and code out of the running Python's own standard library; nothing is
        downloaded.
        """
        version = ".".join(str(part) for part in sys.version_info[:3])
        return cls(
            f"pydoc_data.topics (prose) and standard library sources (code) of CPython {version}",
            [_prose(), _code()],
            [1, 1],
        )

    def documents(self, tokenizer: Any, *, length: int, num_tokens: int) -> Iterator[Tensor]:
        """Cut the text into documents.

        Args:
            tokenizer: a tokenizer of transformers or vLLM; where it puts a first token before a
                text, documents get one.
            length: tokens per document.
            num_tokens: tokens altogether, rounded up to whole documents.

        Yields:
            [length] int64.

        Raises:
            ValueError: the text is too short for a single document.
        """
        streams = [_cut(tokenizer, text, length) for text in self.streams]
        turns = itertools.chain.from_iterable(
            [stream] * share for stream, share in zip(streams, self.shares, strict=True)
        )
        wanted = max(1, -(-num_tokens // length))
        produced = 0
        exhausted: set[int] = set()
        for stream in itertools.cycle(list(turns)):
            if produced == wanted or len(exhausted) == len(streams):
                break
            document = next(stream, None)
            if document is None:
                exhausted.add(id(stream))
                continue
            produced += 1
            yield document
        if not produced:
            raise ValueError(
                f"the text is shorter than one document of {length} tokens; give more text or a "
                "smaller --length"
            )


def _cut(tokenizer: Any, text: str, length: int) -> Iterator[Tensor]:
    prefix = [token for token in tokenizer("a").input_ids[:1] if token == tokenizer.bos_token_id]
    body = length - len(prefix)
    # No warning about texts longer than the model's positions; vLLM's own tokenizers have none.
    quiet = {"verbose": False} if isinstance(tokenizer, PreTrainedTokenizerBase) else {}
    ids: list[int] = []
    # Tokenising piecewise keeps the time before the first document short; 2^16 characters always
    # end within a word's
    # reach of a boundary that does not matter.
    for start in range(0, len(text), 1 << 16):
        ids += tokenizer(
            text[start : start + (1 << 16)], add_special_tokens=False, **quiet
        ).input_ids
        while len(ids) >= body:
            yield torch.tensor(prefix + ids[:body])
            ids = ids[body:]


def _prose() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _code() -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [folder / f"{module}.py" for module in _CODE_MODULES]
    return "\n\n".join(path.read_text(encoding="utf-8") for path in files if path.is_file())
