"""Runs the benchmarks for a machine with a GPU, where there is none."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CHECK = "benchmarks.gpu.check"
CARRY = "benchmarks.gpu.carry_vllm_triton"


def run_module(
    module: str, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A module, as users run it: from the repository's root, Triton compiling."""
    inherited = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=TESTS.parent,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_bare(folder: Path, module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A module in the interpreter, where no vLLM but the carried one can be imported."""
    return subprocess.run(
        [sys.executable, TESTS / "bare_machine.py", folder, module, *arguments],
        cwd=TESTS.parent,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(TESTS.parent),
            "OMP_NUM_THREADS": "1",  # tensors are tiny
        },
        capture_output=True,
        text=True,
        timeout=800,
    )
