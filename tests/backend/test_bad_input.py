"""Bad input gives one clear error when the engine is configured, before any process is spawned."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

from tables import flat_table, save_flat_table  # noqa: E402
from transformers import AutoConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402

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
