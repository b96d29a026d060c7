"""A vLLM that is not the tested one: every name of it that is wrapped or read is changed, one at a
time. Serving then goes on without telemetry, with an error in the log, or the start refuses."""

import logging
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

import vllm.v1.attention.backends.registry as registry  # noqa: E402
from vllm.config import VllmConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402

from vllm_toptheta import registration  # noqa: E402
from vllm_toptheta.hooks import attention_backend  # noqa: E402
from vllm_toptheta.telemetry import delivery, shield  # noqa: E402


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(shield, "_logged", set())
    monkeypatch.setattr(shield, "_failures", type(shield._failures)())
    monkeypatch.setattr(delivery, "_sinks", [])


@pytest.fixture
def as_new(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A name that is not registered yet; what registering wraps is put back."""
    monkeypatch.setattr(attention_backend, "NAME", "TOPTHETA_MOVED")
    monkeypatch.setattr(attention_backend, "_failed", [])
    monkeypatch.setattr(registration, "backend_path", lambda: "moved.Backend")
    for owner, name in (
        (CpuPlatform, "get_attn_backend_cls"),
        (EngineArgs, "create_engine_config"),
        (EngineArgs, "from_cli_args"),
        (VllmConfig, "compute_hash"),
    ):
        monkeypatch.setattr(owner, name, vars(owner)[name])
    yield "TOPTHETA_MOVED"
    members = registry.AttentionBackendEnum
    if (member := members._member_map_.pop("TOPTHETA_MOVED", None)) is not None:
        members._member_names_.remove("TOPTHETA_MOVED")
        members._value2member_map_.pop(member.value, None)
        delattr(members, "TOPTHETA_MOVED")
