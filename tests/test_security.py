"""No data is executed, no path leaves its folder, and no client makes the server work for long."""

import ast
from pathlib import Path
from typing import Any

import pytest
from threshold_fixtures import make_identity

from vllm_toptheta.requests import RequestOptions, RequestPolicy, Target, Targets
from vllm_toptheta.threshold_store import ThresholdStore

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for folder in ("vllm_toptheta", "scripts", "benchmarks", "docker")
    for path in (ROOT / folder).rglob("*.py")
)
EXECUTES = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "runpy.run_path",
    "torch.load",
    "torch.jit.load",
    "numpy.load",
    "np.load",
    "yaml.load",
    "yaml.unsafe_load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "cloudpickle.loads",
}
ALLOWED = {
    # Reads back what it wrote in the line itself: that the backend's enum member survives.
    ("doctor.py", "pickle.loads(pickle.dumps(member))"),
}


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_code_executes_data(path: Path) -> None:
    for call in calls(path):
        text = ast.unparse(call)
        if ast.unparse(call.func) in EXECUTES:
            assert (path.name, text) in ALLOWED, text
        for keyword in call.keywords:
            on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            assert not (keyword.arg in ("shell", "trust_remote_code") and on), text
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in (
            "pickle",
            "marshal",
            "shelve",
            "dill",
        ):
            raise AssertionError(f"{path}: {ast.unparse(node)}")


def test_the_check_would_find_something() -> None:
    assert len(SOURCES) > 40
    assert {(path.name, ast.unparse(call)) for path in SOURCES for call in calls(path)} >= ALLOWED


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        "a/../../b",
        "org/model/../..",
        "",
        ".",
        "//",
        "a/./b",
    ],
)
def test_a_models_name_stays_inside_of_the_store(tmp_path: Path, name: str) -> None:
    store = ThresholdStore(shipped_dir=None, user_dir=tmp_path / "store")
    path = store.path_for(make_identity(name), "table")
    assert path.resolve().is_relative_to(store.user_dir.resolve())
    assert len(path.relative_to(store.user_dir).parts) == 2


def test_a_name_does_not_find_tables_outside_of_the_store(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "t.safetensors").write_bytes(b"not a table")
    store = ThresholdStore(shipped_dir=tmp_path / "shipped", user_dir=tmp_path / "store")
    for spec in ("../outside", "store/../outside", str(outside)):
        with pytest.raises((FileNotFoundError, ValueError)) as caught:
            store.find(spec, make_identity())
        assert "t.safetensors" not in str(caught.value)


@pytest.mark.parametrize(
    "xargs",
    [
        {"toptheta_k": 10**400},
        {"toptheta_k": float("nan")},
        {"toptheta_k": float("inf")},
        {"toptheta_k": -1},
        {"toptheta_k": True},
        {"toptheta_k": "128"},
        {"toptheta_k": [1] * 10**6},
        {"toptheta": "x" * 10**7},
        {"toptheta": {"a": {}}},
        {"toptheta_\ud800": 1},
        {"toptheta" + "y" * 10**6: 1},
        {f"toptheta_{i}": 1 for i in range(20000)},
    ],
    ids=lambda xargs: f"{str(xargs)[:30]!a}",
)
@pytest.mark.usefixtures("short_guesses")
def test_hostile_options_are_refused_at_once_and_in_few_words(xargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Options are toptheta_min_prob") as caught:
        RequestOptions.parse(xargs)
    assert len(str(caught.value)) < 1000


POLICY = RequestPolicy(Targets(Target(0.001), None), {"min_prob": (1e-6, 0.1)}, allow_off=True)


@pytest.mark.parametrize("length", [100, 10_000_000])
@pytest.mark.usefixtures("short_guesses")
def test_a_name_of_any_length_is_refused_at_once(length: int) -> None:
    with pytest.raises(ValueError, match="unknown option"):
        RequestOptions.parse({"toptheta_" + "k" * length: 1})


def test_brackets_a_hundred_thousand_deep_are_left_to_vllm() -> None:
    pytest.importorskip("vllm", reason="needs an installed vLLM")
    from vllm_toptheta.serving.endpoints import problem_of

    body = b'{"toptheta_k": ' + b"[" * 100_000
    assert problem_of("/v1/completions", body, POLICY) is None


def test_options_outside_of_their_place_are_told_in_few_words() -> None:
    pytest.importorskip("vllm", reason="needs an installed vLLM")
    from vllm_toptheta.serving.endpoints import problem_of

    fields = ", ".join(f'"toptheta_{"z" * 50}{i}": 1' for i in range(10_000))
    problem = problem_of("/v1/completions", b"{" + fields.encode() + b"}", POLICY)
    assert problem is not None
    assert len(problem) < 400
