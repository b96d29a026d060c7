"""Shared fixtures: the real model, fetched once. Tests compute on one thread."""

import difflib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_interpreter

triton_interpreter.load()
# Their tensors are tiny, so that two threads wait for each other most of the time: on a machine
# that does something else as well, fifty times as long as one computes. Kernels get threads where
# they are what is tested, servers have their own.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a normal checkpoint."""
    from fetch_model import fetch

    return fetch()


@pytest.fixture
def short_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only short words are compared with names: the time grows with the square of their length,
    and is not measured, because machines differ."""
    compare = difflib.get_close_matches

    def checked(word: str, *args: Any, **kwargs: Any) -> list[str]:
        assert len(word) <= 60
        return compare(word, *args, **kwargs)

    monkeypatch.setattr(difflib, "get_close_matches", checked)


@pytest.fixture(autouse=True)
def process_settings() -> Iterator[None]:
    """No test leaves its environment, or the log level that vLLM read from it, to the next ones."""
    environment = dict(os.environ)
    # Zero, where vLLM is imported by this test: its own default then.
    level = logging.getLogger("vllm").level or logging.INFO
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    logging.getLogger("vllm").setLevel(level)
