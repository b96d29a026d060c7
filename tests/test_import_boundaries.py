"""The allowed imports of every module, enforced by walking the syntax trees; also what `import
vllm_toptheta` loads."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vllm_toptheta

PACKAGE = Path(vllm_toptheta.__file__).parent
STANDARD = set(sys.stdlib_module_names)

# Longest matching prefix wins: (third-party packages, own modules).
RULES: dict[str, tuple[set[str], set[str]]] = {
    "__init__": (set(), {"registration"}),
    "cli": (
        set(),
        {"", "calibration", "config", "evaluation", "doctor", "thresholds", "threshold_store"},
    ),
    "config": ({"pydantic"}, set()),
    "doctor": ({"torch", "vllm"}, {"", "registration", "kernels.ops", "threshold_store"}),
    "model_identity": ({"pydantic"}, set()),
    "thresholds": ({"torch", "safetensors", "pydantic"}, {"kernels.layout", "model_identity"}),
    "threshold_store": (set(), {"model_identity", "thresholds"}),
    "kernels": ({"torch"}, {"kernels"}),
    "kernels.columns": (set(), set()),
    "kernels.layout": ({"torch"}, set()),
    "kernels.reference": ({"torch"}, {"kernels.layout"}),
    "kernels.cpu": ({"torch"}, {"kernels"}),
    "kernels.triton": (
        {"torch", "triton"},
        {"kernels.columns", "kernels.layout", "kernels.sketch", "kernels.triton"},
    ),
    "testing": ({"torch"}, {"kernels"}),
    "calibration": (
        {"torch", "transformers"},
        {"calibration", "kernels.layout", "kernels.reference", "thresholds"},
    ),
    "calibration.calibrate": (
        {"torch", "tqdm", "vllm"},
        {"", "calibration", "config", "thresholds"},
    ),
    "calibration.engine": (
        {"pydantic", "torch", "vllm"},
        {"backend.unsupported", "calibration.collect", "hooks.attention_backend", "model_identity"},
    ),
    "calibration.worker": ({"torch", "vllm"}, {"calibration"}),
    "calibration.at_start": (
        {"filelock", "vllm"},
        {"calibration", "config", "model_identity", "threshold_store"},
    ),
    "evaluation": (
        {"torch", "transformers", "tqdm", "vllm"},
        {
            "",
            "calibration",
            "config",
            "evaluation",
            "kernels",
            "model_identity",
            "telemetry",
            "thresholds",
            "threshold_store",
        },
    ),
    "evaluation.tasks.local": (
        {"torch", "transformers"},
        {"calibration", "config", "evaluation", "kernels.layout"},
    ),
    "evaluation.tasks.command": (set(), {"config", "evaluation"}),
    "evaluation.tasks": ({"httpx", "tqdm"}, {"evaluation.results", "evaluation.tasks"}),
    "requests": ({"pydantic"}, set()),
    "telemetry": (set(), {"kernels.columns", "requests", "telemetry"}),
    "telemetry.totals": ({"numpy", "torch"}, {"kernels.columns", "telemetry"}),
    "telemetry.prometheus": ({"prometheus_client"}, {"telemetry"}),
    "telemetry.ledger": ({"numpy"}, {"kernels.columns", "telemetry"}),
    "backend.gpu": (
        {"torch", "vllm"},
        {"backend", "config", "hooks", "kernels", "model_identity", "telemetry", "thresholds"},
    ),
    "backend.gpu_layer": ({"torch", "vllm"}, {"backend", "kernels.triton"}),
    "backend.gpu_tensors": (
        {"torch", "vllm"},
        {"backend", "kernels.columns", "kernels.layout", "kernels.triton", "requests"},
    ),
    "backend.step": ({"torch"}, {"backend", "kernels.columns", "kernels.triton"}),
    "backend": (
        {"numpy", "torch", "vllm"},
        {
            "backend",
            "config",
            "hooks",
            "kernels.columns",
            "kernels.decode",
            "kernels.layout",
            "kernels.ops",
            "kernels.sketch",
            "model_identity",
            "requests",
            "telemetry",
            "thresholds",
            "threshold_store",
        },
    ),
    "registration": ({"vllm"}, {"backend", "calibration.at_start", "hooks", "serving.served"}),
    "hooks": (
        {"torch", "vllm"},
        {"config", "hooks", "requests", "serving.served", "telemetry"},
    ),
    "serving": (
        {"fastapi", "msgspec", "numpy", "starlette", "vllm"},
        {"config", "model_identity", "requests", "serving", "telemetry", "thresholds"},
    ),
}


def modules() -> list[str]:
    return [
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def matches(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def is_module(name: str) -> bool:
    path = PACKAGE.parent / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def imports(module: str) -> set[str]:
    path = PACKAGE / (module.replace(".", "/") + ".py")
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            of_package = {name for name in names if is_module(name)}
            found |= of_package or {node.module or ""}
    return found


@pytest.mark.parametrize("module", modules())
def test_module_imports_only_what_its_place_allows(module: str) -> None:
    place = module.removesuffix(".__init__")
    rule = max((prefix for prefix in RULES if matches(place, prefix)), key=len, default=None)
    assert rule is not None, f"{module} has no rule: add one, or move the module"
    third_party, own = RULES[rule]
    for name in imports(module):
        top = name.split(".")[0]
        if top == "vllm_toptheta":
            rest = name.removeprefix("vllm_toptheta").removeprefix(".")
            allowed = rest in own or any(prefix and matches(rest, prefix) for prefix in own)
            assert allowed, f"{module} imports {name}"
        elif top not in STANDARD:
            assert top in third_party, f"{module} imports {name}"


def circle(group: Callable[[str], str]) -> list[str] | None:
    """Groups of modules that import each other, in order; None where there are none."""
    graph: dict[str, set[str]] = {}
    for module in modules():
        own = {name for name in imports(module) if matches(name, "vllm_toptheta")}
        places = {name.partition(".")[2] or "__init__" for name in own}
        this = group(module.removesuffix(".__init__"))
        graph.setdefault(this, set()).update({group(place) for place in places} - {this})
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [str(name) for name in error.args[1]]
    return None


def test_no_files_import_each_other() -> None:
    assert circle(lambda module: module) is None


def test_no_folders_import_each_other() -> None:
    assert circle(lambda module: module.partition(".")[0]) is None


def test_a_circle_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = imports
    back = {"telemetry.shield": {"vllm_toptheta.hooks.scheduler"}}
    monkeypatch.setitem(globals(), "imports", lambda module: real(module) | back.get(module, set()))
    for group in (lambda module: module, lambda module: module.partition(".")[0]):
        assert circle(group) is not None


def test_no_optimised_kernel_imports_the_reference() -> None:
    for module in modules():
        eager = module == "kernels.cpu.prefill"  # has the eager target of prompts, too
        if module.startswith(("kernels.cpu.", "kernels.triton.")) and not eager:
            assert "vllm_toptheta.kernels.reference" not in imports(module), module


@pytest.mark.parametrize("module", ["vllm_toptheta", "vllm_toptheta.cli"])
def test_import_is_light(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'triton', 'vllm', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
