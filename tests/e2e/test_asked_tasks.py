"""`toptheta evaluate tasks` through a real server: forced questions are pruned rows, answers are
parsed, and stock vLLM takes the same command."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import serve

from vllm_toptheta import cli
from vllm_toptheta.evaluation.tasks.server import FORCING

QUESTIONS = 3


@pytest.mark.parametrize("rows", ["prompt", "decoded"])
def test_retrieval(smollm2: Path, tmp_path: Path, rows: str) -> None:
    report, answers = tmp_path / "report.json", tmp_path / "answers.jsonl"
    toptheta = {"min_kv_len": 128}
    with serve(smollm2, tmp_path, "--enforce-eager", *FORCING.split(), toptheta=toptheta) as server:
        command = ["evaluate", "tasks", "--url", server.url, "--lengths", "2000"]
        command += ["--questions", str(QUESTIONS), "--question-rows", rows]
        command += ["--records", str(answers), "--json", str(report), "--min-prob", "1e-6", "0.01"]
        assert cli.main(command) == 0
    exact, pruned = json.loads(report.read_text())
    records: list[dict[str, Any]] = list(map(json.loads, answers.read_text().splitlines()))
    assert len(records) == 3 * QUESTIONS
    assert sum(bool(re.match(r" \d+", record["text"])) for record in records) >= 2 * QUESTIONS
    assert exact["same_answers"] >= 2 / 3
    assert pruned["v_row_fraction"] < exact["v_row_fraction"] <= 1
    assert 0.3 < pruned["kept_mass"] < exact["kept_mass"] <= 1
    if rows == "decoded":
        assert pruned["pruned_row_share"] > 0.9
        # The question alone is longer than the answer may be.
        assert min(record["tokens"] for record in records) > 16
    else:
        assert 0 < pruned["pruned_row_share"] < 0.9
