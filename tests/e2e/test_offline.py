"""Offline `LLM.generate`, with both of vLLM's model runners and under preemption: outputs carry the
same object, and requests have the same dial."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import ENV

HERE = Path(__file__).parent
# An engine in a process of its own may begin with the first requests before the last one is there,
# and then another step preempts.
ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# The V2 runner's own kernels need Triton; see v2_runner.
RUNNERS = {
    "V1": {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    "V2": {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": str(HERE / "v2_runner"),
    },
}


@pytest.fixture(scope="module")
def results(smollm2: Path) -> dict[str, dict[str, Any]]:
    """What `offline_run` printed, by runner."""
    return {name: run(smollm2, env) for name, env in RUNNERS.items()}


def run(model: Path, env: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HERE / "offline_run.py"), str(model)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, **ENV, **ENGINE, **env},
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    result: dict[str, Any] = json.loads(lines[0].removeprefix("RESULT "))
    return result


@pytest.mark.parametrize("runner", RUNNERS)
def test_outputs_of_generate_carry_the_counts(
    results: dict[str, dict[str, Any]], runner: str
) -> None:
    result = results[runner]
    assert result["runner"] == runner
    assert result["preemptions"] == 1
    own, several, off = (shown["toptheta"] for shown in result["shown"])
    step = 30 * 9
    rows = 7 * step
    assert (own["min_prob"], own["rows"]) == (0.03, rows)
    assert sum(own["layers"]["keys_kept"]) == own["keys_kept"] < own["keys_scored"]
    assert "layers" not in several
    assert several["rows"] == 2 * rows
    assert [choice["rows"] for choice in several["choices"]] == [rows, rows]
    assert several["min_prob"] == 0.01
    assert off["k"] is off["min_prob"] is None
    # The last one gave way; when it came back, its prefill gave the next token.
    assert off["dense_rows"]["off"] == off["rows"] == rows - step
    assert off["keys_kept"] == off["keys_scored"] > 0
    assert "between 1e-06 and 0.1" in result["error"]


def close(found: Any, expected: Any) -> bool:
    """Whether two objects of a response are the same, but for what rounding may decide: the runners
    batch alike and yet round apart, so that a key at its threshold may fall on either side."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[k], expected[k]) for k in found)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    if isinstance(expected, (int, float)) and not isinstance(expected, bool):
        return bool(found == pytest.approx(expected, rel=2e-3))
    return bool(found == expected)


def test_both_runners_agree(results: dict[str, dict[str, Any]]) -> None:
    first, second = results["V1"], results["V2"]
    assert second["ids"] == first["ids"]
    assert close(second["shown"], first["shown"])
    for ours, theirs in zip(second["shown"], first["shown"], strict=True):
        assert ours["toptheta"]["rows"] == theirs["toptheta"]["rows"]
        assert ours["toptheta"]["keys_scored"] == theirs["toptheta"]["keys_scored"]
