"""Text to documents: lengths, turns between sources, and the default corpus without a download."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_tokenizer

from vllm_toptheta.calibration.corpus import Corpus


def test_sources_take_turns_until_the_tokens_are_reached() -> None:
    corpus = Corpus("two", ["a" * 100, "b" * 100], [1, 2])
    documents = list(corpus.documents(tiny_tokenizer(), length=10, num_tokens=55))
    assert [chr(int(document[0])) for document in documents] == ["a", "b", "b", "a", "b", "b"]
    assert all(document.shape == (10,) and document.dtype == torch.int64 for document in documents)


def test_an_exhausted_source_leaves_the_rest_to_the_others() -> None:
    corpus = Corpus("two", ["a" * 10, "b" * 40], [1, 1])
    documents = list(corpus.documents(tiny_tokenizer(), length=10, num_tokens=1000))
    assert [chr(int(document[0])) for document in documents] == ["a", "b", "b", "b", "b"]


def test_a_tokenizer_with_a_first_token_gets_it_in_every_document() -> None:
    class WithFirstToken:
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> object:
            ids = tiny_tokenizer()(text).input_ids
            return type("Encoding", (), {"input_ids": [1, *ids] if add_special_tokens else ids})

    documents = list(
        Corpus("one", ["x" * 18], [1]).documents(WithFirstToken(), length=10, num_tokens=20)
    )
    assert [document.tolist() for document in documents] == [[1, *[ord("x")] * 9]] * 2


def test_text_shorter_than_a_document() -> None:
    with pytest.raises(ValueError, match="shorter than one document of 50 tokens"):
        list(Corpus("short", ["abc"], [1]).documents(tiny_tokenizer(), length=50, num_tokens=50))


def test_default_corpus_is_prose_and_code() -> None:
    corpus = Corpus.default()
    prose, code = corpus.streams
    assert len(prose) > 300_000
    assert len(code) > 1_000_000
    assert "def " in code
    assert "/" not in corpus.description


def test_files_are_named_without_their_folders(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("text", encoding="utf-8")
    corpus = Corpus.from_files([path])
    assert corpus.files == ["notes.txt"]
    assert str(tmp_path) not in corpus.description
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        Corpus.from_files([path])
