"""Runs a module of this repository as on a machine that has torch and triton but no vLLM.

`python bare_machine.py FOLDER MODULE ARGUMENT...`, from the repository's root: the only `vllm` that
can be imported lies in FOLDER, and what else vLLM would have installed is not there.
"""

import importlib.machinery
import runpy
import sys
from pathlib import Path
from typing import Any

MISSING = {"transformers", "safetensors", "pydantic", "fastapi", "flashinfer"}


class OnlyCarried:
    """Finds `vllm` in one folder, or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in MISSING:
            raise ModuleNotFoundError(f"{name} is not on this machine", name=name)
        if name != "vllm":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, [str(self.folder)])
        if spec is None:
            raise ModuleNotFoundError("vllm is not on this machine", name=name)
        return spec


def main() -> None:
    folder, module_name = Path(sys.argv[1]).resolve(), sys.argv[2]
    sys.meta_path.insert(0, OnlyCarried(folder))  # type: ignore[arg-type]
    sys.argv = sys.argv[2:]
    try:
        runpy.run_module(module_name, run_name="__main__", alter_sys=True)
    finally:
        for name, module in sys.modules.items():
            if name.split(".")[0] == "vllm":
                assert Path(str(module.__file__)).is_relative_to(folder), module


if __name__ == "__main__":
    main()
