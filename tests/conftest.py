"""Shared fixtures: the real model, fetched once."""

from pathlib import Path

import pytest
import triton_interpreter

triton_interpreter.load()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a normal checkpoint."""
    from fetch_model import fetch

    return fetch()
