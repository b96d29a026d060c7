"""The GPU backend in the real engine, with vLLM's V2 runner and its Triton kernels, all interpreted
on the CPU: it says and counts what the CPU backend does.
"""

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")
pytest.importorskip("triton")

import torch  # noqa: E402
from e2e.conftest import ONE_THREAD, generate, toptheta  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from vllm_toptheta.model_identity import ModelIdentity  # noqa: E402
from vllm_toptheta.serving.routes import merge_heads  # noqa: E402

pytestmark = pytest.mark.e2e

RUNNER = Path(__file__).parent.parent / "e2e" / "v2_runner"
GPU = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "TOPTHETA_TEST_GPU_BACKEND": "1",
    "PYTHONPATH": os.pathsep.join([str(RUNNER), *filter(None, [os.environ.get("PYTHONPATH")])]),
}
CPU = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
TOKENS, LAYERS, HEADS = 5, 2, 4
LENGTHS = (70, 45, 33, 70)
"""The last prompt is the first one again, most of which the prefix cache holds by then."""
ROUNDING = 1e-3
"""A key that lies at its threshold may fall on either side, and with it its mass."""
TILES = 0.05
"""Prompt rows meet K in tiles of 128 keys on a CPU and of 64 on a GPU, so that the running
denominators of rows behind the first 64 differ a little, and with them a few kept keys."""

Answers = list[list[dict[str, Any]]]


CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=256,
    intermediate_size=128,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    head_dim=64,
    # Large weights make attention peaked, so that thresholds have something to separate.
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, Answers]:
    """What a tiny model says with the CPU backend and with the GPU backend: with dense prompts, and
    with prompts that are pruned in chunks.
    """
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(folder / "model")
    options = {"thresholds": "none", "min_prob": 0.02, "min_mass": 0.95, "min_kv_len": 32}
    without = {**options, "k_sketch": False}
    common = {"dtype": "float16", "block_size": 32, "max_num_seqs": 3}
    engines = [
        {**common, **toptheta(**without)},
        {**common, **toptheta(**without, phases="both"), "max_num_batched_tokens": 48},
        {**common, **toptheta(**options, k_sketch=True), "block_size": 64},
    ]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in LENGTHS[:3]]
    found = []
    for env in (CPU, GPU):
        found.append(
            generate(
                folder / "model", [*prompts, prompts[0]], TOKENS, engines, {**ONE_THREAD, **env}
            )
        )
    return found[0], found[1]


def test_the_same_tokens_follow(answers: tuple[Answers, Answers]) -> None:
    cpu, gpu = ([[answer["ids"] for answer in engine] for engine in found] for found in answers)
    assert gpu == cpu
    assert gpu[0][3] == gpu[0][0]


def test_counts_are_the_same(answers: tuple[Answers, Answers]) -> None:
    cpu, gpu = answers
    for expected, found in zip(cpu[0], gpu[0], strict=True):
        wanted, shown = (answer["summary"]["toptheta"] for answer in (expected, found))
        assert shown.pop("kept_mass") == pytest.approx(wanted.pop("kept_mass"), rel=ROUNDING)
        assert shown == wanted
    shown = gpu[0][0]["summary"]["toptheta"]
    assert shown["rows"] == (TOKENS - 1) * LAYERS * HEADS
    assert shown["keys_kept"] < 0.6 * shown["keys_scored"]
    assert shown["rows_lifted"] > 0


def test_the_page_shows_the_same_heads(answers: tuple[Answers, Answers]) -> None:
    model = ModelIdentity.from_config(CONFIG)
    for number in range(2):
        (((expected,),), ((found,),)) = (device[number][0]["heads"] for device in answers)
        exact = number == 0  # of pruned prompts K and V differ a little
        for name in ("layers", "first_head", "rows", "scored", *(["kept"] if exact else [])):
            assert found[name] == expected[name], name
        assert found["rows"] == [len(LENGTHS) * (TOKENS - 1)] * LAYERS
        grids = [merge_heads([[part]], model) for part in (expected, found)]
        shares, wanted = (torch.tensor(grid["kept_mass"]) for grid in reversed(grids))
        assert shares.shape == (LAYERS, HEADS)
        torch.testing.assert_close(shares, wanted, rtol=ROUNDING if exact else TILES, atol=0)
        read = sum(cell[0] for layer in grids[1]["v_rows"] for cell in layer)
        answered = (answer["summary"]["toptheta"] for answer in answers[1][number])
        assert read == sum(answer["v_rows_read"] for answer in answered)


def test_counts_of_pruned_prompts_are_the_same(answers: tuple[Answers, Answers]) -> None:
    for expected, found in zip(answers[0][1], answers[1][1], strict=True):
        wanted, shown = (answer["summary"]["toptheta"]["prefill"] for answer in (expected, found))
        assert shown.keys() == wanted.keys()
        for name, value in wanted.items():
            expected_value = None if value is None else pytest.approx(value, rel=TILES)
            assert shown[name] == expected_value, name
    longest = answers[1][1][0]["summary"]["toptheta"]["prefill"]
    assert longest["keys_kept"] < 0.6 * longest["keys_scored"]


def test_a_sketch_of_k_counts_alike(answers: tuple[Answers, Answers]) -> None:
    """A key next to its threshold may be decided otherwise: on a CPU every key has a scale, on a
    GPU every group."""
    for expected, found in zip(answers[0][2], answers[1][2], strict=True):
        wanted, shown = (answer["summary"]["toptheta"] for answer in (expected, found))
        assert shown["keys_scored"] == wanted["keys_scored"]
        assert shown["keys_kept"] == pytest.approx(wanted["keys_kept"], rel=TILES)
        assert shown["kept_mass"] == pytest.approx(wanted["kept_mass"], rel=TILES)
