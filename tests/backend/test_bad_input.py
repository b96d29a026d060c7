"""Bad input gives one clear error when the engine is configured, before any process is spawned."""

import copy
import functools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

from tables import flat_table, save_flat_table  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from vllm.config import KVTransferConfig, SpeculativeConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402

from vllm_toptheta.backend.plan import Plan  # noqa: E402
from vllm_toptheta.model_identity import ModelIdentity  # noqa: E402


def configure(model: Path, **kwargs: Any) -> Any:
    options = kwargs.pop("options", {})
    args = EngineArgs(
        model=str(model),
        dtype="float32",
        max_model_len=256,
        attention_backend="toptheta",
        additional_config={"toptheta": options},
        **kwargs,
    )
    return args.create_engine_config()


def test_the_shipped_table_is_found(smollm2: Path) -> None:
    assert configure(smollm2).attention_config.backend.name == "TOPTHETA"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kk": 64}, ["unknown option 'kk'", "--additional-config"]),
        ({"k": 5000}, ["k = 5000", "outside the table's range"]),
        ({"k": 1}, ["k = 1 ", "outside the table's range"]),
        ({"layers": {"0": {"k": 9999}}}, ["k = 9999", "outside the table's range"]),
        ({"layers": {"30": {"dense": True}}}, ["layer 30", "layers 0 to 29"]),
        ({"thresholds": "nobody--nothing"}, ["nobody--nothing", "toptheta calibrate"]),
    ],
)
def test_wrong_options(smollm2: Path, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        configure(smollm2, options=options)
    for word in words:
        assert word in str(caught.value)


def test_a_model_without_a_table(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.from_pretrained(smollm2)
    config.num_hidden_layers = 29
    config.save_pretrained(tmp_path / "other")
    monkeypatch.setenv("TOPTHETA_HOME", str(tmp_path / "home"))
    with pytest.raises(FileNotFoundError, match="toptheta calibrate"):
        configure(tmp_path / "other", skip_tokenizer_init=True)


def test_a_table_of_another_model(smollm2: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(smollm2)
    config.num_hidden_layers = 29
    path = tmp_path / "foreign.safetensors"
    flat_table(ModelIdentity.from_config(config, name="other"), -1e30).save(path)
    with pytest.raises(ValueError, match="num_hidden_layers: got 29, expected 30"):
        configure(smollm2, options={"thresholds": str(path), "k": 16})


def test_a_broken_table(smollm2: Path, tmp_path: Path) -> None:
    path = save_flat_table(smollm2, -1e30, tmp_path / "broken.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a safetensors file"):
        configure(smollm2, options={"thresholds": str(path), "k": 16})


def test_a_group_size_that_does_not_divide_the_block(smollm2: Path) -> None:
    with pytest.raises(ValueError, match="group_size 128 does not divide the block size 64"):
        configure(smollm2, options={"group_size": 128}, block_size=64)


@pytest.fixture(scope="module")
def served(smollm2: Path) -> Any:
    return configure(smollm2)


def draft(served: Any, method: str, backend: str | None = None) -> SpeculativeConfig:
    """vLLM's configuration of speculation, with the served model as its own draft."""
    if method == "ngram":
        return SpeculativeConfig(method="ngram", num_speculative_tokens=2)
    config = SpeculativeConfig(
        model=served.model_config.model,
        method="draft_model",
        num_speculative_tokens=2,
        attention_backend=backend,
        target_model_config=served.model_config,
        target_parallel_config=served.parallel_config,
    )
    config.method = method
    return config


def offloading() -> KVTransferConfig:
    return KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")


ANYWHERE = [
    ("model_config.attention_chunk_size", 64, "another --attention-backend"),
    ("cache_config.kv_sharing_fast_prefill", True, "Drop --kv-sharing-fast-prefill"),
    ("parallel_config.decode_context_parallel_size", 2, "--decode-context-parallel-size"),
    ("parallel_config.prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
]
GPU_ONLY = [
    ("parallel_config.enable_dbo", True, "Drop --enable-dbo"),
    ("parallel_config.ubatch_size", 2, "and --ubatch-size"),
    ("cache_config.mamba_cache_mode", "align", "Pass --no-enable-prefix-caching"),
    ("kv_transfer_config", offloading(), "Drop --kv-transfer-config and --kv-offloading-size"),
]


def changed(served: Any, name: str, value: Any) -> Any:
    """A copy of a configuration with one of its values changed."""
    config = copy.deepcopy(served)
    *path, last = name.split(".")
    owner = functools.reduce(getattr, path, config)
    if path:
        owner = copy.copy(owner)
        setattr(config, path[0], owner)
    setattr(owner, last, value)
    return config


def be_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setattr("vllm_toptheta.backend.unsupported.current_platform", platform)


@pytest.mark.parametrize(("name", "value", "words"), ANYWHERE + GPU_ONLY)
def test_what_would_be_wrong_ends_the_start(
    served: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: Any, words: str
) -> None:
    config = changed(served, name, value)
    if (name, value, words) in GPU_ONLY:
        Plan.from_vllm_config(config)  # harmless on a CPU
    be_a_gpu(monkeypatch)
    Plan.from_vllm_config(served)
    with pytest.raises(ValueError, match="toptheta does not work with") as caught:
        Plan.from_vllm_config(config)
    assert words in str(caught.value)


def test_batch_invariance_ends_the_start(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="Unset VLLM_BATCH_INVARIANT"):
        Plan.from_vllm_config(served)


@pytest.mark.parametrize(
    ("v2", "per_kind", "method", "backend", "words"),
    [
        (True, False, "ngram", None, None),
        (True, True, "ngram", None, None),
        (True, False, "draft_model", None, '"method": "ngram"'),
        (True, False, "draft_model", "TRITON_ATTN", '"method": "ngram"'),
        (True, False, "eagle3", None, '"attention_backend": "TRITON_ATTN"'),
        (True, False, "mtp", None, '"attention_backend": "TRITON_ATTN"'),
        (True, False, "eagle3", "TRITON_ATTN", None),
        (True, False, "dflash", None, None),
        (True, False, "dflash", "TOPTHETA", '"attention_backend": "TRITON_ATTN"'),
        (True, True, "eagle3", "TRITON_ATTN", '"method": "ngram"'),
        (False, False, "draft_model", None, None),
        (False, False, "eagle3", None, None),
        (False, False, "eagle3", "TOPTHETA", '"attention_backend": "TRITON_ATTN"'),
        (False, True, "draft_model", None, '"method": "ngram"'),
    ],
)
def test_draft_models_keep_to_their_own_backend(
    served: Any,
    monkeypatch: pytest.MonkeyPatch,
    v2: bool,
    per_kind: bool,
    method: str,
    backend: str | None,
    words: str | None,
) -> None:
    monkeypatch.setattr(type(served), "use_v2_model_runner", v2)
    config = changed(served, "speculative_config", draft(served, method, backend))
    if per_kind:
        kinds = {"full_attention": served.attention_config.backend}
        config = changed(config, "attention_config.backend_per_kind", kinds)
    if words is None:
        Plan.from_vllm_config(config)
        return
    with pytest.raises(ValueError, match="thresholds") as caught:
        Plan.from_vllm_config(config)
    assert words in str(caught.value)


def test_quantised_caches_and_unknown_dtypes_are_refused_by_the_backend() -> None:
    from vllm_toptheta.backend.cpu import TopThetaCPUBackend

    assert not TopThetaCPUBackend.supports_kv_cache_dtype("fp8")
    assert TopThetaCPUBackend.supports_kv_cache_dtype("auto")


@pytest.mark.e2e
def test_the_real_command_ends_with_the_one_error(smollm2: Path) -> None:
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(smollm2)]
    command += ["--attention-backend", "TopTheta", "--additional-config", '{"toptheta": {"kk": 1}}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "unknown option 'kk'" in last
    assert "--additional-config" in last
