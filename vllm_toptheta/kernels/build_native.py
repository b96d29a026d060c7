"""Compiles the C++ kernels: sources in native/ in, one shared library out.

It needs a C++17 compiler with OpenMP, and neither torch nor Python headers.
"""

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARY_NAME = "libtoptheta_cpu.so"

_SOURCE_DIR = Path(__file__).resolve().parent / "native"
# Each file with the instruction set it may use; the library asks the CPU before it enters one.
_SOURCES = {
    "library.cpp": [],
    "decode_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "prefill_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "v_means_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
}
_FLAGS = ["-O3", "-std=c++17", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


def build_native(output_dir: Path) -> Path:
    """Compile the native kernels into a directory.

    The library is replaced atomically, so a process that has it loaded keeps its copy. The compiler
    is $CXX, or g++.

    Args:
        output_dir: existing directory that receives the library.

    Returns:
        The path of the library.

    Raises:
        RuntimeError: the machine is not x86-64, there is no compiler, or it failed (with its
            output).
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise RuntimeError(
            f"the native kernels need x86-64, this machine is {platform.machine()}; "
            'use impl="torch" here'
        )
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".build-native-") as scratch:
        objects = []
        for name, isa_flags in _SOURCES.items():
            target = str(Path(scratch) / f"{name}.o")
            _run([*compiler, *_FLAGS, *isa_flags, "-c", str(_SOURCE_DIR / name), "-o", target])
            objects.append(target)
        linked = Path(scratch) / LIBRARY_NAME
        _run([*compiler, "-shared", "-fopenmp", "-s", *objects, "-o", str(linked)])
        library = output_dir / LIBRARY_NAME
        linked.replace(library)
    return library


def _run(command: list[str]) -> None:
    line = shlex.join(command)
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except FileNotFoundError as error:
        raise RuntimeError(
            f"no C++ compiler: {command[0]!r} not found; install g++ or set CXX"
        ) from error
    if done.returncode:
        raise RuntimeError(f"compiling the native kernels failed: {line}\n{done.stdout}")


if __name__ == "__main__":
    try:
        print(build_native(Path(__file__).resolve().parent))
    except RuntimeError as error:
        sys.exit(str(error))
