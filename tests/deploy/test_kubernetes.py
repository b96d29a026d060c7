"""The manifest: valid by Kubernetes' own schema, and in line with the images."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
MANIFEST = ROOT / "deploy/kubernetes/vllm-toptheta.yaml"
VERSIONS = ("1.30", "1.34")


def home(dockerfile: str) -> str:
    """The home of an image's user."""
    found = re.search(r"^WORKDIR (\S+)$", dockerfile, re.MULTILINE)
    assert found is not None
    return found.group(1)


def pod() -> dict[str, Any]:
    """The specification of the server's pod."""
    deployment = next(document for document in documents() if document["kind"] == "Deployment")
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(MANIFEST.read_text()))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_schema_accepts_every_object_and_finds_a_mistake(version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for document in documents():
        validator.validate(document, version, strict=True)
    deployment = next(document for document in documents() if document["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["livnessProbe"] = {}
    with pytest.raises(Exception, match="livnessProbe"):
        validator.validate(deployment, version, strict=True)


def test_it_names_what_it_defines_and_what_the_image_has() -> None:
    by_kind = {document["kind"]: document for document in documents()}
    spec = by_kind["Deployment"]["spec"]["template"]["spec"]
    server = spec["containers"][0]
    labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert by_kind["Service"]["spec"]["selector"].items() <= labels.items()
    claims = {
        v["persistentVolumeClaim"]["claimName"]
        for v in spec["volumes"]
        if "persistentVolumeClaim" in v
    }
    names = {d["metadata"]["name"] for d in documents() if d["kind"] == "PersistentVolumeClaim"}
    assert claims == names
    assert {m["name"] for m in server["volumeMounts"]} == {v["name"] for v in spec["volumes"]}
    dockerfile = (ROOT / "docker/Dockerfile.gpu").read_text()
    assert f"USER {spec['securityContext']['runAsUser']}\n" in dockerfile
    for mount in server["volumeMounts"]:
        in_image = f'"{mount["mountPath"]}"' in dockerfile
        assert in_image or mount["mountPath"] in ("/dev/shm", "/tmp", home(dockerfile))
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"]["path"] == "/health"
    secrets = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in server["env"]}
    assert not secrets["VLLM_API_KEY"].get("optional"), "never open because a secret is missing"
    assert secrets["HF_TOKEN"]["optional"]


def test_nothing_but_volumes_is_written() -> None:
    spec = pod()
    server = spec["containers"][0]
    assert spec["securityContext"]["runAsNonRoot"]
    assert server["securityContext"]["readOnlyRootFilesystem"]
    empty = {volume["name"] for volume in spec["volumes"] if "emptyDir" in volume}
    written = {m["mountPath"] for m in server["volumeMounts"] if m["name"] in empty}
    for path in sorted((ROOT / "docker").glob("Dockerfile.*")):
        assert written == {"/tmp", "/dev/shm", home(path.read_text())}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_an_image_runs_as_any_user_of_group_0(name: str) -> None:
    text = (ROOT / f"docker/Dockerfile.{name}").read_text()
    folders = {"/models", "/var/lib/toptheta", home(text)}
    made = re.search(r"install -d -o toptheta -g 0 -m 2775 ([^\n\\]*)", text)
    assert made is not None
    assert set(made.group(1).split()) == folders
    for variable in (f"HOME={home(text)}", "USER=toptheta"):
        assert variable in text, "a user without an entry in passwd has none otherwise"


def test_only_clients_and_prometheus_reach_the_server() -> None:
    by_kind = {document["kind"]: document for document in documents()}
    policy = by_kind["NetworkPolicy"]["spec"]
    labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    ports = [port["name"] for port in pod()["containers"][0]["ports"]]
    for rule in policy["ingress"]:
        assert all(one.values() for one in rule["from"]), "an empty selector is everybody"
        assert [port["port"] for port in rule["ports"]] == ports
    for rule in policy["egress"]:
        assert rule["ports"], "without ports it is any"
