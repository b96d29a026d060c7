"""Loads and runs the scripts for a machine with a GPU, where there is none."""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).resolve().parent
SCRIPTS = TESTS.parent / "scripts"


def load_script(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(name, str(SCRIPTS / name))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def run_bare(folder: Path, script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A script in the interpreter, where no vLLM but the carried one can be imported."""
    return subprocess.run(
        [sys.executable, TESTS / "bare_machine.py", folder, SCRIPTS / script, *arguments],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",  # tensors are tiny
        },
        capture_output=True,
        text=True,
        timeout=800,
    )
