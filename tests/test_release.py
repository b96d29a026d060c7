"""What a release is made of: one version, an sdist that builds the wheel, a wheel that serves."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import vllm_toptheta

ROOT = Path(__file__).parent.parent
VERSION = vllm_toptheta.__version__


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    pytest.importorskip("build", reason="pip install build")
    folder = tmp_path_factory.mktemp("dist")
    # Without isolation, because the build backend is installed and a download is not the point.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def test_the_version_stands_in_one_place() -> None:
    places = []
    for folder in ("vllm_toptheta", "benchmarks", "docker", "deploy", "scripts"):
        places += [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".so"]
    text = re.compile(rf"(?<![\d.]){re.escape(VERSION)}(?![\d.])")
    found = [
        path.relative_to(ROOT).as_posix()
        for path in (*places, ROOT / "pyproject.toml")
        if "__pycache__" not in path.parts and text.search(path.read_text(errors="replace"))
    ]
    assert found == ["vllm_toptheta/__init__.py"]


def test_the_changelog_knows_the_version_or_what_is_not_released() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" or VERSION in headings


def test_the_sdist_holds_sources_and_nothing_built(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    assert path.name == f"vllm_toptheta-{VERSION}.tar.gz"
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "build_hook.py",
        "docker/compose.yaml",
        "docker/entrypoint",
        "deploy/kubernetes/vllm-toptheta.yaml",
        "scripts/setup",
        "tests/test_release.py",
        "vllm_toptheta/kernels/cpu/src/decode_avx2.cpp",
        "vllm_toptheta/serving/page.html",
    ):
        assert name in names, name
    assert any(re.fullmatch(r"thresholds/.+\.safetensors", name) for name in names)
    strays = [n for n in names if re.search(r"\.(so|pyc)$|/\.|^\.(venv|models|ci|git/)", n)]
    assert not [name for name in strays if not name.endswith((".gitignore", ".dockerignore"))]


def test_the_wheel_holds_everything_that_serving_needs(wheel: Path) -> None:
    assert wheel.name == f"vllm_toptheta-{VERSION}-py3-none-linux_x86_64.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"vllm_toptheta-{VERSION}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    for name in (
        "vllm_toptheta/py.typed",
        "vllm_toptheta/kernels/cpu/libtoptheta_cpu.so",
        "vllm_toptheta/serving/page.html",
        f"{info}/licenses/LICENSE",
    ):
        assert name in names, name
    shipped = {
        p.relative_to(ROOT / "thresholds") for p in (ROOT / "thresholds").rglob("*.safetensors")
    }
    assert shipped
    assert {f"vllm_toptheta/_shipped_thresholds/{path}" for path in shipped} <= names
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "vllm_toptheta").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    assert not any(
        "vllm" in item and "extra ==" not in item for item in metadata.get_all("Requires-Dist", [])
    )
    for group in ("vllm.general_plugins", "vllm.endpoint_plugins", "console_scripts"):
        assert f"[{group}]" in entry_points


@pytest.fixture(scope="session")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel, and sees installed libraries but not
    this checkout.
    """
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # Paths out of a .pth file come last, and .pth files in them (a linked checkout) are not read.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    python = folder / "bin" / "python"
    # pip takes a linked checkout for an installed package, and must neither keep nor remove it.
    options = ["--no-index", "--no-deps", "--ignore-installed", "--no-warn-script-location"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *options, str(wheel)], check=True)
    return python


SAFE = {"PYTHONSAFEPATH": "1", "PYTHONPATH": ""}
"""The working folder, which is the checkout, is not importable."""


def test_the_installed_wheel_is_what_python_imports(clean: Path) -> None:
    code = "import vllm_toptheta as v; print(v.__file__, v.__version__)"
    done = subprocess.run(
        [clean, "-c", code], env={**os.environ, **SAFE}, capture_output=True, text=True, check=True
    )
    path, version = done.stdout.split()
    assert Path(path).is_relative_to(clean.parent.parent)
    assert version == VERSION


def test_an_index_page_of_wheels_can_offer_it(wheel: Path) -> None:
    tags = pytest.importorskip("packaging.tags")
    utils = pytest.importorskip("packaging.utils")
    assert utils.parse_wheel_filename(wheel.name)[3] & set(tags.sys_tags())


@pytest.mark.e2e
def test_the_installed_wheel_serves(clean: Path, smollm2: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="needs an installed vLLM")
    from openai import OpenAI
    from server import Server

    options = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    options += ["--kv-cache-memory-bytes", str(1 << 28)]
    with Server(
        smollm2,
        *options,
        toptheta={"k": 32, "min_kv_len": 64},
        log_path=tmp_path / "server.log",
        env={**SAFE, "VLLM_PLUGINS": "toptheta", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        program=[clean, "-m", "vllm.entrypoints.cli.main", "serve"],
    ) as server:
        client = OpenAI(base_url=server.url, api_key="none", timeout=600, max_retries=0)
        answer = client.completions.create(
            model=str(smollm2), prompt="one two three " * 60, max_tokens=8, temperature=0
        )
        assert 0 < answer.toptheta["keys_kept"] < answer.toptheta["keys_scored"]  # type: ignore[attr-defined]
        page = client.with_options(base_url=server.url.removesuffix("/v1")).get(
            "/toptheta/config", cast_to=object
        )
        assert isinstance(page, dict)
        log = server.log_path.read_text()
    # The table came out of the wheel.
    used = re.search(r"thresholds (\S+/_shipped_thresholds/\S+)", log)
    assert used is not None
    assert Path(used.group(1)).is_relative_to(clean.parent.parent)
