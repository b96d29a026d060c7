"""vLLM's Triton kernel carried as files: what is copied, and that it runs without vLLM."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu_scripts import CARRY, CHECK, run_bare, run_module
from triton_interpreter import needs_interpreter

pytestmark = needs_interpreter


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("there is no vLLM to carry the kernel out of")
    folder = tmp_path_factory.mktemp("vllm_triton")
    done = run_module(CARRY, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_kernel_is_copied_unchanged_and_stand_ins_agree(carried: Path) -> None:
    from benchmarks.gpu import carry_vllm_triton as script

    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    site = Path(spec.origin).parent.parent
    for module in script.COPIED:
        path = script.path_of(site, module)
        assert path.read_bytes() == script.path_of(carried, module).read_bytes()
        assert "SPDX-License-Identifier: Apache-2.0" in path.read_text()
    assert "Apache License" in (carried / "vllm" / "LICENSE").read_text()

    # Their defaults, and the enumeration's members.
    names = "import vllm.envs as m; print(m.VLLM_BATCH_INVARIANT)"
    modes = "from vllm.v1.kv_cache_interface import KVQuantMode as k; print([*k])"
    for command in (names, modes):
        outputs = [
            subprocess.run(
                [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; {command}"],
                env={n: t for n, t in os.environ.items() if n != "VLLM_BATCH_INVARIANT"},
                capture_output=True,
                text=True,
                timeout=300,
                check=True,
            ).stdout.splitlines()[-1]
            for paths in ([], [str(carried)])
        ]
        assert outputs[0] == outputs[1]


SOURCE = """
import torch
import vllm.envs as envs
from vllm.platforms import current_platform
dtype, is_invariant = current_platform.fp8_dtype(), envs.VLLM_BATCH_INVARIANT
def packed():
    from vllm.v1.attention.ops.int4_per_token_head import unified_attention_int4
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from vllm.new import thing", "imports vllm.new, which is neither copied nor stood in"),
        ("from vllm.platforms import CpuArch", "imports CpuArch from vllm.platforms"),
        ("import vllm.envs as e\nx = e.VLLM_NEW", "uses e.VLLM_NEW, which the stand-in"),
        (
            "from vllm.platforms import current_platform as p\ndef f():\n  return p.is_new()",
            "uses p.is_new, which the stand-in",
        ),
        (
            "from vllm.v1.attention.ops.int4_per_token_head import unified_attention_int4",
            "neither copied nor stood in",
        ),
    ],
)
def test_another_vllm_that_needs_more_is_refused(source: str, message: str) -> None:
    from benchmarks.gpu import carry_vllm_triton as script

    platform = SimpleNamespace(fp8_dtype=None)
    there = {
        "vllm.envs": SimpleNamespace(VLLM_BATCH_INVARIANT=False),
        "vllm.platforms": SimpleNamespace(current_platform=platform),
    }

    def load(name: str) -> SimpleNamespace:
        if name not in there:
            raise ModuleNotFoundError(name)
        return there[name]

    script.check_imports("some.module", SOURCE, load)
    with pytest.raises(ValueError, match=message):
        script.check_imports("some.module", f"{SOURCE}\n{source}", load)


def test_a_folder_without_the_kernel_is_refused(tmp_path: Path) -> None:
    done = run_bare(tmp_path, CHECK, "--vllm-triton", tmp_path)
    assert done.returncode == 2
    assert f"benchmarks.gpu.carry_vllm_triton {tmp_path}" in done.stderr


def test_the_carried_kernel_and_all_benchmarks_run_without_vllm(
    carried: Path, tmp_path: Path
) -> None:
    """Every kernel is compared with float64 before it is timed, so this is the carried kernel's
    test as well: decode and whole prompts, float16 and float8.
    """
    path = tmp_path / "report.json"
    done = run_bare(carried, CHECK, "--vllm-triton", carried, "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads(path.read_text())
    assert found["rival"].endswith(str(carried)), found["rival"]
    assert found["skipped"] == []
    kinds = ["speed", "dense speed", "mixed speed", "prompt speed"]
    records = found["records"]
    names = ["decode", "sketched", "prompts", "determinism", *kinds, *kinds]
    assert [record["check"] for record in records] == names
    assert all(record["ok"] for record in records)
    for record in records[4:]:
        assert record["left_out"] == {}, record
        assert "vllm triton" in record["ms"], record
        assert all(points == [None] * 3 for points in record["ms"].values()), "a time of nothing"
        assert ("sdpa math" in record["ms"]) == (
            record["cache"] == "float16" and record["check"] != "mixed speed"
        )
    assert [record["cache"] for record in records[4:]] == ["float16"] * 4 + ["float8_e4m3fn"] * 4
    assert all(record["kept"] < 1 for record in records[4:] if "min_prob" in record)
    assert "| 1 x 70 | 2 | float8_e4m3fn | 0.02 | toptheta dense | – | – | – |" in done.stdout


def test_nothing_is_written_from_a_vllm_that_does_not_fit(tmp_path: Path) -> None:
    from benchmarks.gpu import carry_vllm_triton as script

    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("there is no vLLM to carry the kernel out of")
    another, folder = tmp_path / "another", tmp_path / "carried"
    for module in (*script.COPIED, *script.CUT_OUT):
        path = script.path_of(another, module)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(script.path_of(Path(spec.origin).parent.parent, module).read_bytes())
    (another / "vllm" / "__init__.py").write_text("")
    kernel = script.path_of(another, script.COPIED[0])
    kernel.write_text(kernel.read_text() + "\nis_new = current_platform.is_new()\n")
    done = run_module(CARRY, folder, PYTHONPATH=str(another))
    assert done.returncode == 1, done.stdout
    assert "triton_unified_attention uses current_platform.is_new" in done.stderr
    assert not (folder / "vllm").exists()
