"""The allowed imports of every module, enforced by walking the syntax trees; also what `import
vllm_toptheta` loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_toptheta

PACKAGE = Path(vllm_toptheta.__file__).parent
STANDARD = set(sys.stdlib_module_names)

# Longest matching prefix wins: (third-party packages, own modules).
RULES: dict[str, tuple[set[str], set[str]]] = {
    "__init__": (set(), {"backend.registration"}),
    "cli": (
        set(),
        {"", "calibration", "config", "evaluation", "doctor", "thresholds", "threshold_store"},
    ),
    "config": ({"pydantic"}, set()),
    "doctor": ({"vllm"}, {"", "backend.registration", "kernels.ops", "threshold_store"}),
    "model_identity": ({"pydantic"}, set()),
    "thresholds": ({"torch", "safetensors", "pydantic"}, {"kernels.layout", "model_identity"}),
    "threshold_store": (set(), {"model_identity", "thresholds"}),
    "kernels": ({"torch"}, {"kernels"}),
    "kernels.layout": ({"torch"}, set()),
    "kernels.reference": ({"torch"}, {"kernels.layout"}),
    "kernels.cpu": ({"torch"}, {"kernels"}),
    "kernels.triton": ({"torch", "triton"}, {"kernels.triton", "kernels.layout"}),
    "testing": ({"torch"}, {"kernels"}),
    "calibration": (
        {"torch", "transformers", "tqdm"},
        {
            "",
            "calibration",
            "config",
            "kernels.layout",
            "kernels.reference",
            "model_identity",
            "thresholds",
            "threshold_store",
        },
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
    "request_options": ({"pydantic"}, set()),
    "telemetry": (set(), {"telemetry", "request_options"}),
    "telemetry.carrier": ({"torch", "vllm"}, {"telemetry", "request_options"}),
    "telemetry.delivery": ({"vllm"}, {"telemetry", "request_options"}),
    "telemetry.prometheus": ({"prometheus_client"}, {"telemetry"}),
    "telemetry.ledger": ({"numpy"}, {"telemetry"}),
    "backend.gpu": (
        {"torch", "vllm"},
        {"backend", "config", "kernels", "model_identity", "telemetry", "thresholds"},
    ),
    "backend.gpu_tensors": (
        {"torch", "vllm"},
        {"backend", "kernels.layout", "kernels.triton", "request_options"},
    ),
    "backend.step": ({"torch", "vllm"}, {"backend", "kernels.triton", "telemetry"}),
    "backend": (
        {"numpy", "torch", "vllm"},
        {
            "backend",
            "config",
            "kernels.layout",
            "kernels.ops",
            "model_identity",
            "request_options",
            "telemetry",
            "thresholds",
            "threshold_store",
        },
    ),
    "backend.registration": ({"vllm"}, {"backend", "config", "serving.install", "telemetry"}),
    "serving": (
        {"fastapi", "numpy", "starlette", "vllm"},
        {"config", "model_identity", "request_options", "serving", "telemetry", "thresholds"},
    ),
}


def modules() -> list[str]:
    return [
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def matches(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def imports(module: str) -> set[str]:
    path = PACKAGE / (module.replace(".", "/") + ".py")
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            found.add(node.module or "")
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


def test_no_optimised_kernel_imports_the_reference() -> None:
    for module in modules():
        if module.startswith(("kernels.cpu.", "kernels.triton.")):
            assert "vllm_toptheta.kernels.reference" not in imports(module), module


@pytest.mark.parametrize("module", ["vllm_toptheta", "vllm_toptheta.cli"])
def test_import_is_light(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'triton', 'vllm', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
