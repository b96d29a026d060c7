"""Offline `LLM.generate`: outputs carry the same object, and requests have the same dial."""

import json
import os
import subprocess
import sys
from pathlib import Path

from e2e.conftest import ENV


def test_outputs_of_generate_carry_the_counts(smollm2: Path) -> None:
    script = Path(__file__).with_name("offline_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(smollm2)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, **ENV},
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    own, several, off = (shown["toptheta"] for shown in result["shown"])
    rows = 7 * 30 * 9
    assert (own["k"], own["rows"]) == (48, rows)
    assert sum(own["layers"]["keys_kept"]) == own["keys_kept"] < own["keys_scored"]
    assert "layers" not in several
    assert several["rows"] == 2 * rows
    assert [choice["rows"] for choice in several["choices"]] == [rows, rows]
    assert off["k"] is None
    assert off["dense_rows"]["off"] == off["rows"] == rows
    assert off["keys_kept"] == off["keys_scored"] == own["keys_scored"]
    assert "between 16 and 1024" in result["error"]
