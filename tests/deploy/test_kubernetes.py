"""The manifest: valid by Kubernetes' own schema, and in line with the images."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
MANIFEST = ROOT / "deploy/kubernetes/vllm-toptheta.yaml"
VERSIONS = ("1.30", "1.34")


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
        assert mount["mountPath"] == "/dev/shm" or f'"{mount["mountPath"]}"' in dockerfile
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"]["path"] == "/health"
    assert "value" not in server["env"][0], "the key comes from a secret"
