"""Build hook: compiles the native CPU kernel into the wheel; without a compiler the wheel is pure
and says so."""

import platform
import runpy
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("vllm_toptheta") / "kernels" / "cpu"


class NativeKernelHook(BuildHookInterface):
    """Adds the compiled kernel and tags the wheel py3-none-<platform>: the library needs no Python
    ABI."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        kernels = Path(self.root) / KERNELS
        # Run by path: importing the package would need its run-time dependencies at build time.
        build = runpy.run_path(str(kernels / "build.py"))
        try:
            library = build["build_native"](kernels)
        except RuntimeError as error:
            print(
                f"vllm-toptheta: building without the native CPU kernel: {error}", file=sys.stderr
            )
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform.system().lower()}_{platform.machine()}"
        build_data["artifacts"].append(str(KERNELS / library.name))
