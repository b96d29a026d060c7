"""`toptheta doctor` names the cause where vLLM does not see the plug-in."""

import sys
from pathlib import Path

import pytest

from vllm_toptheta import doctor


@pytest.mark.parametrize(
    ("allowed", "status", "words"),
    [
        (None, "ok", "visible"),
        ("toptheta", "ok", "visible"),
        ("other,toptheta", "ok", "visible"),
        ("other", "FAIL", "add toptheta to it"),
        ("", "FAIL", "add toptheta to it"),
        ("other, toptheta", "FAIL", "because blanks count: VLLM_PLUGINS=other,toptheta"),
    ],
)
def test_plug_ins_that_may_load(
    monkeypatch: pytest.MonkeyPatch, allowed: str | None, status: str, words: str
) -> None:
    if allowed is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    finding = doctor.check_plugin()
    assert finding.status == status
    assert words in finding.text


def test_a_stale_installation_that_comes_first_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stale = tmp_path / "vllm_toptheta.egg-info"
    stale.mkdir()
    (stale / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: vllm-toptheta\nVersion: 0.0.1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    finding = doctor.check_plugin()
    assert finding.status == "FAIL"
    assert f"vllm-toptheta 0.0.1 in {tmp_path} comes first" in finding.text


def test_a_missing_installation_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    finding = doctor.check_plugin()
    assert finding.status == "FAIL"
    assert "pip install vllm-toptheta" in finding.text
