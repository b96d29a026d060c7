"""Every family of docs/models.md: a tiny checkpoint is served with rows pruned, and switched off it
answers as stock does; or it is refused by its configuration, before anything is started.

The families run one after the other in as many processes as there are cores, up to two.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import ENV
from tiny_families import REFUSED, SERVED, save_checkpoint

from vllm_toptheta.model_identity import ModelIdentity

HERE = Path(__file__).parent
ENGINE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What `families_run.py` wrote, by family, of the tests that are going to run."""
    folder = tmp_path_factory.mktemp("families")
    chosen = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == Path(__file__) and hasattr(item, "callspec")
    }
    jobs: list[tuple[Any, ...]] = []
    for name in sorted(chosen & SERVED.keys()):
        family = SERVED[name]
        if family.needs is None or find_spec(family.needs):
            jobs.append((name, str(save_checkpoint(family, folder / name)), family.arguments, True))
    for name in sorted(chosen & REFUSED.keys()):
        family, _ = REFUSED[name]
        if family.needs is not None and not find_spec(family.needs):
            continue
        path = folder / name
        config = family.config()
        config.architectures = config.architectures or [ARCHITECTURES[name]]
        config.save_pretrained(path)
        jobs.append((name, str(path), family.arguments, False))
    parts = [part for i in range(2) if (part := jobs[i::2])]
    processes = []
    for i, part in enumerate(parts):
        log = (folder / f"{i}.log").open("w")
        command = [sys.executable, str(HERE / "families_run.py"), str(folder / f"{i}.json")]
        processes.append(
            subprocess.Popen(
                [*command, json.dumps(part)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENV, **ENGINE},
            )
        )
    merged: dict[str, Any] = {}
    for i, process in enumerate(processes):
        code = process.wait(600)
        assert code == 0, (folder / f"{i}.log").read_text()[-4000:]
        merged |= json.loads((folder / f"{i}.json").read_text())
    return merged


ARCHITECTURES = {
    "deepseek-v2": "DeepseekV2ForCausalLM",
    "bloom": "BloomForCausalLM",
    "falcon-alibi": "FalconForCausalLM",
    "llama4-text": "Llama4ForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "bert": "BertModel",
    "gemma3-images": "Gemma3ForConditionalGeneration",
}


def test_the_documentation_has_every_family() -> None:
    text = (HERE.parent.parent / "docs" / "models.md").read_text()
    assert not [name for name in (*SERVED, *REFUSED) if f"`{name}`" not in text]


def test_both_formats_of_a_mistral_have_one_table(tmp_path: Path) -> None:
    from vllm.transformers_utils.config import get_config

    hf, params = (
        ModelIdentity.from_config(
            get_config(save_checkpoint(SERVED[name], tmp_path / name), trust_remote_code=False)
        )
        for name in ("mistral", "mistral-params-json")
    )
    assert params.differences(hf) == ""


@pytest.mark.parametrize("name", SERVED)
def test_a_family_is_pruned_and_off_is_stock(results: dict[str, Any], name: str) -> None:
    family = SERVED[name]
    if name not in results:
        pytest.skip(f"vLLM imports {family.needs} for it, which is not installed")
    ours, stock = results[name]["ours"], results[name]["stock"]
    assert stock["error"] is None
    assert ours["error"] is None
    off, pruned = ours["counts"]
    assert ours["ids"][0] == stock["ids"][0]
    # The first token comes from the prefill.
    rows = 7 * family.attending * 2
    assert off["dense_rows"]["off"] == off["rows"] == rows
    assert off["keys_kept"] == off["keys_scored"]
    assert pruned["rows"] == rows
    assert sum(pruned["dense_rows"].values()) - pruned["dense_rows"]["prefill"] < rows
    assert 0 < pruned["keys_kept"] < pruned["keys_scored"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_is_refused_by_its_configuration(results: dict[str, Any], name: str) -> None:
    family, words = REFUSED[name]
    if name not in results:
        pytest.skip(f"vLLM imports {family.needs} for it, which is not installed")
    result = results[name]["ours"]
    assert f"toptheta does not work with {words}" in result["error"]
    assert "\n" not in result["error"]
    assert " --" in result["error"]
    assert not result["worker_started"]
