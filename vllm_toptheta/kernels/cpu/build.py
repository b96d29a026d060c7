"""Compiles the C++ kernels: sources in src/ in, one shared library out.

It needs a C++17 compiler with OpenMP, and neither torch nor Python headers.
"""

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARY_NAME = "libtoptheta_cpu.so"

_SOURCE_DIR = Path(__file__).resolve().parent / "src"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
# Each file with the instruction set it may use; the library asks the CPU before it enters one.
_SOURCES = {
    "library.cpp": (),
    "decode_avx2.cpp": _AVX2,
    "prefill_avx2.cpp": _AVX2,
    "side_data_avx2.cpp": _AVX2,
}
# Without contraction a multiplication and an addition stay two roundings: which pairs the compiler
# would fuse differs between instruction sets, and kept keys must not.
_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-fopenmp", "-fPIC", "-fvisibility=hidden")
_WARNINGS = ("-Wall", "-Wextra")


def build_native(output_dir: Path, extra_flags: Sequence[str] = ()) -> Path:
    """Compile the native kernels into a directory.

    The library is replaced atomically, so a process that has it loaded keeps its copy. The compiler
    is $CXX, or g++.

    Args:
        output_dir: existing directory that receives the library.
        extra_flags: of the compiler, behind the others.

    Returns:
        The path of the library.

    Raises:
        RuntimeError: the machine is not x86-64, there is no compiler, or it failed (with its
            output).
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise RuntimeError(
            f"the native kernels need x86-64, this machine is {platform.machine()}; "
            'use target="eager" here'
        )
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".build-native-") as scratch:
        objects = {name: str(Path(scratch) / f"{name}.o") for name in _SOURCES}
        with ThreadPoolExecutor(max_workers=2) as pool:
            commands = [
                [*compiler, *_FLAGS, *_WARNINGS, *isa_flags, *extra_flags]
                + ["-c", str(_SOURCE_DIR / name), "-o", objects[name]]
                for name, isa_flags in _SOURCES.items()
            ]
            list(pool.map(_run, commands))
        linked = Path(scratch) / LIBRARY_NAME
        _run([*compiler, "-shared", "-fopenmp", "-s", *objects.values(), "-o", str(linked)])
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
