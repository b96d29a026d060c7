"""Copies vLLM's Triton attention out of an installed vLLM, so that check.py can time it on a
machine that has torch and triton only.

`python -m benchmarks.gpu.carry_vllm_triton [FOLDER]` writes FOLDER/vllm, by default
build/vllm_triton, which git ignores. The kernel's modules are copied unchanged, with vLLM's
license; what they import from the rest of vLLM is replaced by the stand-ins below. It ends with an
error, and without a folder, where the copied modules want anything from vLLM that is neither copied
nor stood in for.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "build" / "vllm_triton"
COPIED = (
    "vllm.v1.attention.ops.triton_unified_attention",
    "vllm.v1.attention.ops.triton_attention_helpers",
)
LEFT_OUT = ("vllm.v1.attention.ops.int4_per_token_head",)
"""May be imported inside functions: not reached with caches of 16 or 8 bits."""

NOTICE = "# SPDX-License-Identifier: Apache-2.0\n# Stands in for vLLM's module of this name.\n\n"
STAND_INS = {
    "vllm.envs": "VLLM_BATCH_INVARIANT = False\n",
    "vllm.logger": "from logging import getLogger as init_logger\n",
    "vllm.triton_utils": "import triton\nimport triton.language as tl\n",
    "vllm.platforms": """\
import torch


class current_platform:
    @staticmethod
    def fp8_dtype():
        if torch.version.hip and torch.cuda.is_available():
            if "gfx94" in torch.cuda.get_device_properties(0).gcnArchName:
                return torch.float8_e4m3fnuz
        return torch.float8_e4m3fn

    @staticmethod
    def is_device_capability_family(capability):
        if torch.version.hip or not torch.cuda.is_available():
            return False
        return torch.cuda.get_device_capability()[0] == capability // 10
""",
}
CUT_OUT = {"vllm.v1.kv_cache_interface": ("from enum import IntEnum", "KVQuantMode")}
"""Modules of which one class is enough, and what that class needs."""


def path_of(root: Path, module: str) -> Path:
    return root.joinpath(*module.split(".")).with_suffix(".py")


def cut_out(path: Path, name: str) -> str:
    """Source of one class of a module."""
    text = path.read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return ast.get_source_segment(text, node) or ""
    raise ValueError(f"{path} has no class {name}; see CUT_OUT in carry_vllm_triton.py")


def check_imports(module: str, text: str, load: Callable[[str], Any]) -> None:
    """Everything a copied module takes from vLLM is there, attributes of stand-ins included.

    Args:
        text: source of the module.
        load: imports a module that was written.

    Raises:
        ValueError: something is not there; says what.
    """
    tree = ast.parse(text)
    taken: dict[str, Any] = {}  # what the module took, by the name that it has there

    def loaded(name: str) -> Any:
        try:
            return load(name)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{module} imports {name}, which is neither copied nor stood in for"
            ) from error

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    taken[alias.asname or "vllm"] = loaded(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            if node.module in LEFT_OUT and node not in tree.body:
                continue
            source = loaded(str(node.module))
            for alias in node.names:
                if not hasattr(source, alias.name):
                    raise ValueError(
                        f"{module} imports {alias.name} from {node.module}, which the stand-in of "
                        "carry_vllm_triton.py does not have"
                    )
                taken[alias.asname or alias.name] = getattr(source, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = node.value.id
            if owner in taken and not hasattr(taken[owner], node.attr):
                raise ValueError(
                    f"{module} uses {owner}.{node.attr}, which the stand-in of "
                    "carry_vllm_triton.py does not have"
                )


def license_of_vllm() -> Path:
    """vLLM's license text as installed."""
    for name in importlib.metadata.packages_distributions().get("vllm", []):
        for file in importlib.metadata.files(name) or []:
            if file.name == "LICENSE" and "licenses" in file.parts:
                return Path(str(file.locate()))
    raise ValueError("the installed vLLM has no license file, and must not be copied without it")


def write(package: Path, version: str, folder: Path) -> None:
    """Write FOLDER/vllm from an installed `vllm` folder of this version.

    Raises:
        ValueError: a class that is cut out, or the license, is not where it was.
    """
    files = {module: NOTICE + text for module, text in STAND_INS.items()}
    for module, (header, name) in CUT_OUT.items():
        text = cut_out(path_of(package.parent, module), name)
        files[module] = f"{NOTICE}{header}\n\n\n{text}\n"
    files |= {module: path_of(package.parent, module).read_text() for module in COPIED}
    license_text = license_of_vllm()
    for module, text in files.items():
        path = path_of(folder, module)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").write_text("")
    (folder / "vllm" / "__init__.py").write_text(f'{NOTICE}__version__ = "{version}"\n')
    shutil.copyfile(license_text, folder / "vllm" / "LICENSE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder = parser.parse_args().folder.resolve()
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        print(f"no vLLM in {sys.executable}; run this where vLLM is installed", file=sys.stderr)
        return 1
    names = importlib.metadata.packages_distributions()["vllm"]
    version = importlib.metadata.version(names[0])
    shutil.rmtree(folder / "vllm", ignore_errors=True)
    try:
        write(Path(spec.origin).parent, version, folder)
        sys.path.insert(0, str(folder))  # from here on this is vLLM
        for module in COPIED:
            text = path_of(folder, module).read_text()
            check_imports(module, text, importlib.import_module)
            importlib.import_module(module)
    except ValueError as error:
        shutil.rmtree(folder / "vllm", ignore_errors=True)
        print(f"vLLM {version}: {error}", file=sys.stderr)
        return 1
    print(f"vLLM {version}'s Triton attention is in {folder}; copy this folder along")
    return 0


if __name__ == "__main__":
    sys.exit(main())
