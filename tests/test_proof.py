"""The proof: which cells there are, that a cell is run once, and the page that is made of them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from benchmarks import plot, proof  # noqa: E402


def listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["proof", "--list", *arguments])
    assert proof.main() == 0
    return [line.split("] ")[1] for line in capsys.readouterr().out.splitlines()]


def test_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, longest in (("short", 4096), ("long", 65536)):
        (tmp_path / name).mkdir()
        config = json.dumps({"max_position_embeddings": longest})
        (tmp_path / name / "config.json").write_text(config)
    text = tmp_path / "text.txt"
    models = ["--models", str(tmp_path / "short"), str(tmp_path / "long"), "--text", str(text)]
    folders = ["--out", str(tmp_path / "out"), "--answers", str(tmp_path / "answers")]
    found = listed(monkeypatch, capsys, *models, *folders)
    assert len(set(found)) == len(found)
    assert "tasks-long-32768-ruler" in found
    assert "tasks-long-8192-kv_retrieval-rivals" in found
    assert not [name for name in found if "short-8192" in name or "humaneval" in name]
    (tmp_path / "out" / f"{found[0]}.json").write_text("{}")
    assert listed(monkeypatch, capsys, *models, *folders) == found[1:]
    quick = listed(monkeypatch, capsys, *models, *folders, "--quick")
    assert all("-2048-" in name for name in quick)


def test_commands_show_no_folders() -> None:
    command = [sys.executable, "-m", "vllm_toptheta.cli", "evaluate", "--text", "/some/where/a.txt"]
    shown = proof.shown([*command, "--url", proof.URL])
    assert shown == "toptheta evaluate --text a.txt --url http://localhost:8000/v1"


def test_the_page_has_every_figure_and_its_command(tmp_path: Path) -> None:
    common = {
        "model": "m",
        "length": 4096,
        "seconds": 61,
        "machine": "a CPU",
        "versions": {"v": "1"},
    }
    task: dict[str, Any] = {
        "length": 4096,
        "task": "kv_retrieval",
        "variant": "min_prob 0.001",
        "questions": 50,
        "dense_score": 0.9,
        "score": 0.88,
        "difference": -0.02,
        "difference_standard_error": 0.01,
        "v_row_fraction": 0.0123,
        "kept_mass": 0.91,
        "pruned_row_share": 0.96,
    }
    cell = {**common, "kind": "tasks", "what": "kv_retrieval", "command": "toptheta x"}
    (tmp_path / "a.json").write_text(json.dumps({**cell, "results": [task]}))
    page = plot.page(plot.read(tmp_path))
    row = "| m | 4096 | kv_retrieval | min_prob 0.001 | 50 | 90.0% | 88.0% | -2.0 ± 1.0 | 1.23% |"
    assert row in page
    assert "| `toptheta x` | 61 | a CPU | v 1 |" in page
    assert "Speed" not in page


def test_no_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"run python -m benchmarks\.proof first"):
        plot.read(tmp_path)
