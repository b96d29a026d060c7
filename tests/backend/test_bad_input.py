"""Bad input gives one clear error when the engine is configured, before any process is spawned."""

import copy
import functools
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

from tables import save_table  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from vllm.config import KVTransferConfig, SpeculativeConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase  # noqa: E402

from vllm_toptheta.backend.plan import Plan  # noqa: E402


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


@pytest.fixture(scope="module")
def table(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_table(smollm2, tmp_path_factory.mktemp("tables") / "table.safetensors"))


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of tables, empty."""
    monkeypatch.setenv("TOPTHETA_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "thresholds"


@pytest.fixture
def unknown(smollm2: Path, tmp_path: Path) -> Path:
    """A model that has no table."""
    config = AutoConfig.from_pretrained(smollm2)
    config.num_hidden_layers = 29
    config.save_pretrained(tmp_path / "unknown")
    return tmp_path / "unknown"


def test_the_shipped_table_is_found(smollm2: Path, own_tables: Path) -> None:
    config = configure(smollm2)
    assert config.attention_config.backend.name == "TOPTHETA"
    plan = Plan.from_vllm_config(config)
    assert plan.table is not None
    assert plan.no_table is None
    assert f"thresholds {plan.table_path}" in plan.describe()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kk": 64}, ["unknown option 'kk'", "--additional-config"]),
        ({"group_size": 16}, ["'group_size' is gone", "--block-size"]),
        ({"k": 5000}, ["k = 5000", "outside the table's range"]),
        ({"k": 0.5}, ["k = 0.5 ", "outside the table's range"]),
        ({"k": 64, "min_prob": 0.01}, ["'k' and 'min_prob' exclude each other"]),
        ({"k": 64, "thresholds": "none"}, ["needs a threshold table", "use min_prob"]),
        ({"min_k": 5000}, ["'min_k' = 5000 is above 'max_k'"]),
        ({"layers": {"30": {"dense": True}}}, ["layer 30", "layers 0 to 29"]),
        ({"thresholds": "nobody--nothing"}, ["nobody--nothing", "toptheta calibrate"]),
        ({"thresholds": "missing/file.safetensors"}, ["file.safetensors", "toptheta calibrate"]),
    ],
)
def test_wrong_options(
    smollm2: Path, table: str, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        configure(smollm2, options={"thresholds": table, **options})
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the plug-in logs."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, "vllm.toptheta")
    return lambda: [
        record.getMessage() for record in caplog.records if record.name == "vllm.toptheta"
    ]


def test_a_model_without_a_table_is_served_with_defaults(
    unknown: Path, own_tables: Path, lines: Any
) -> None:
    configure(unknown, skip_tokenizer_init=True)
    told, why = lines()
    assert "min_prob 0.001, min_mass 0.5, " in told
    assert "no threshold table" in told
    assert f"toptheta calibrate {unknown}" in why


def test_nobody_is_told_to_calibrate_who_wants_no_table(smollm2: Path, lines: Any) -> None:
    configure(smollm2, options={"thresholds": "none"})
    assert len(lines()) == 1
    assert "no threshold table" in lines()[0]


def test_a_k_needs_a_table(unknown: Path, own_tables: Path) -> None:
    with pytest.raises(ValueError, match="'k' = 64 needs a threshold table") as caught:
        configure(unknown, options={"k": 64}, skip_tokenizer_init=True)
    assert f"toptheta calibrate {unknown}" in str(caught.value)


def test_a_near_miss_is_told_and_served_without(
    smollm2: Path, unknown: Path, own_tables: Path, lines: Any
) -> None:
    folder = own_tables / "--".join(unknown.parts[-2:])
    save_table(unknown, folder / "broken.safetensors")
    broken = folder / "broken.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    configure(unknown, skip_tokenizer_init=True)
    skipped, _, served = lines()[:3]
    for line in (skipped, served):
        assert f"{broken}: not a safetensors file" in line


def test_a_table_of_another_model(smollm2: Path, unknown: Path, tmp_path: Path) -> None:
    path = save_table(unknown, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="num_hidden_layers: got 29, expected 30"):
        configure(smollm2, options={"thresholds": str(path), "k": 16})


def edited(model: Path, folder: Path, **fields: Any) -> Path:
    """The configuration of a checkpoint with some fields changed."""
    config = AutoConfig.from_pretrained(model)
    for name, value in fields.items():
        setattr(config, name, value)
    config.save_pretrained(folder)
    return folder


def test_a_sibling_is_served_with_the_table_and_told_what_differs(
    smollm2: Path, own_tables: Path, tmp_path: Path, lines: Any
) -> None:
    tuned = edited(smollm2, tmp_path / "tuned", eos_token_id=3, vocab_size=49160)
    configure(tuned, skip_tokenizer_init=True)
    told, note = lines()
    assert "thresholds " in told
    assert "a sibling's: " in note
    assert "vocab_size: got 49152, expected 49160" in note


YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8192}


def test_another_rope_is_served_with_defaults(smollm2: Path, own_tables: Path, lines: Any) -> None:
    configure(smollm2, hf_overrides={"rope_parameters": {**YARN, "rope_theta": 100000.0}})
    told, why = lines()
    assert "no threshold table" in told
    assert "rope: got {'rope_theta': 100000.0, 'rope_type': 'default'}, expected" in why
    assert "with the same --hf-overrides: flags of vllm serve go after --" in why


def test_a_named_table_is_taken_with_a_warning(smollm2: Path, table: str, lines: Any) -> None:
    overrides = {"rope_parameters": {**YARN, "rope_theta": 100000.0}}
    config = configure(smollm2, hf_overrides=overrides, options={"thresholds": table, "k": 64})
    assert Plan.from_vllm_config(config).table is not None
    assert "calibrated for other attention scores" in lines()[1]
    assert "'rope_type': 'yarn'" in lines()[1]


def test_a_window_that_is_switched_off_keeps_the_table(
    smollm2: Path, own_tables: Path, tmp_path: Path
) -> None:
    windowed = edited(smollm2, tmp_path / "windowed", sliding_window=64)
    save_table(windowed, own_tables / "windowed" / "table.safetensors")
    args = EngineArgs(
        model=str(windowed),
        attention_backend="toptheta",
        disable_sliding_window=True,
        skip_tokenizer_init=True,
    )
    assert Plan.from_vllm_config(args.create_engine_config()).table is not None


@pytest.mark.parametrize(
    ("fields", "kwargs", "words"),
    [
        ({"head_dim": 72}, {}, "this head size on a CPU"),
        ({}, {"kv_cache_dtype": "fp8"}, "an fp8 KV cache on a CPU.*Drop --kv-cache-dtype"),
    ],
)
def test_layers_that_cannot_run_end_the_start(
    smollm2: Path, tmp_path: Path, fields: dict[str, Any], kwargs: dict[str, Any], words: str
) -> None:
    model = edited(smollm2, tmp_path / "model", **fields)
    with pytest.raises(ValueError, match=words):
        configure(model, skip_tokenizer_init=True, **kwargs)


def test_a_broken_table(smollm2: Path, tmp_path: Path) -> None:
    path = save_table(smollm2, tmp_path / "broken.safetensors")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a safetensors file"):
        configure(smollm2, options={"thresholds": str(path), "k": 16})


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
    monkeypatch.setattr(AttentionLayerBase, "is_draft_layer", False, raising=False)
    monkeypatch.setattr(type(served), "use_v2_model_runner", v2)
    config = changed(served, "speculative_config", draft(served, method, backend))
    if per_kind:
        kinds = {"full_attention": served.attention_config.backend}
        config = changed(config, "attention_config.backend_per_kind", kinds)
    if words is None:
        Plan.from_vllm_config(config)
        return
    with pytest.raises(ValueError, match="draft model") as caught:
        Plan.from_vllm_config(config)
    assert words in str(caught.value)


def test_without_marked_layers_no_draft_model_runs(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(AttentionLayerBase, "is_draft_layer", raising=False)  # vLLM 0.30
    Plan.from_vllm_config(changed(served, "speculative_config", draft(served, "ngram")))
    config = changed(served, "speculative_config", draft(served, "eagle3", "TRITON_ATTN"))
    with pytest.raises(ValueError, match=r"draft models on vLLM 0\.30.*0\.31 or newer.*ngram"):
        Plan.from_vllm_config(config)


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
