"""A model with sliding windows in every other layer, soft caps and wide heads, weights in 8 bits,
and n-gram drafts: the engine answers as stock does, and layers whose window is not above min_kv_len
run dense."""

import json
from pathlib import Path

import pytest
import torch
from e2e.conftest import KEEP_ALL, ONE_THREAD, generate, toptheta
from safetensors.torch import load_file, save_file
from tiny_families import SERVED, save_checkpoint
from transformers import Gemma2Config, Gemma2ForCausalLM

WINDOW, LAYERS, HEADS, TOKENS = 96, 4, 4, 12
PROMPTS = [
    [7 + (i * 37 + j * j * 11) % 400 for j in range(n)] for i, n in enumerate((60, 200, 333))
]


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Gemma2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("gemma2")
    Gemma2ForCausalLM(config).save_pretrained(path)
    return path


def test_windows_and_soft_caps_through_the_engine(gemma2: Path) -> None:
    options = {"thresholds": "none", "min_prob": KEEP_ALL, "min_kv_len": WINDOW}
    stock, ours = generate(gemma2, PROMPTS, TOKENS, [{}, toptheta(**options)], ONE_THREAD)
    assert [answer["ids"] for answer in ours] == [answer["ids"] for answer in stock]
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        summary = answer["summary"]["toptheta"]
        # The first token comes from the prefill; half of the layers have a window.
        lengths = [len(prompt) + i for i in range(1, TOKENS)]
        rows = len(lengths) * HEADS
        assert summary["dense_rows"]["window"] == rows * LAYERS // 2
        assert (
            summary["dense_rows"]["short"]
            == sum(n <= WINDOW for n in lengths) * HEADS * LAYERS // 2
        )
        seen = sum(lengths) + sum(min(n, WINDOW) for n in lengths)
        assert summary["keys_scored"] == seen * HEADS * LAYERS // 2


def quantise(model: Path) -> None:
    """Weights of a saved Llama in 8 bits, activations by token, as llm-compressor writes them."""
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].float().abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (model / "config.json").write_text(json.dumps(config))


def test_weights_in_8_bits_are_served_and_pruned(tmp_path: Path) -> None:
    llama = save_checkpoint(SERVED["llama"], tmp_path / "llama")
    quantise(llama)
    all_keys = toptheta(min_prob=KEEP_ALL, min_mass=0.0, min_kv_len=32, k_sketch=False)
    few_keys = toptheta(min_prob=0.01, min_kv_len=32)
    stock, whole, pruned = generate(llama, PROMPTS, TOKENS, [{}, all_keys, few_keys], ONE_THREAD)
    assert [answer["ids"] for answer in whole] == [answer["ids"] for answer in stock]
    for answer in pruned:
        summary = answer["summary"]["toptheta"]
        assert summary["rows"] > 0
        assert summary["v_rows_read"] < summary["v_rows_scored"]


def test_drafts_by_ngram_change_no_token(tmp_path: Path) -> None:
    llama = save_checkpoint(SERVED["llama"], tmp_path / "llama")
    prompts = [[20 + i % 9 for i in range(200)]]  # whose continuation repeats it
    drafts = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4}}
    drafts["speculative_config"] |= {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
    # Keys that K itself scores, as stock does.
    ours = toptheta(min_prob=KEEP_ALL, min_mass=0.0, min_kv_len=32, k_sketch=False)
    env = {**ONE_THREAD, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    stock, drafted = generate(llama, prompts, 24, [{}, {**drafts, **ours}], env)
    assert drafted[0]["ids"] == stock[0]["ids"]
    counts = drafted[0]["summary"]["toptheta"]
    # Rows that verify drafts count as prompt rows; of the others, all but the first are ours.
    assert counts["dense_rows"]["prefill"] > len(prompts[0]) * 2 * 2
    assert counts["rows"] + counts["dense_rows"]["prefill"] >= (len(prompts[0]) + 23) * 2 * 2
