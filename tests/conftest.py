"""Shared fixtures: the real model, fetched once."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import triton_interpreter  # noqa: E402

triton_interpreter.load()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a normal checkpoint."""
    from fetch_model import fetch

    return fetch()
