"""An adapter on q and k, which changes scores: what its requests keep is in metrics of its own."""

import json
from pathlib import Path

import torch
from e2e.asking import complete, summary
from e2e.conftest import ONE_THREAD, OPTIONS, client_of
from e2e.scrape import read_metrics
from safetensors.torch import save_file
from server import Server
from tiny_families import SERVED, save_checkpoint
from tiny_models import tiny_tokenizer
from transformers import AutoConfig

PROMPT = [7 + (i * 37 + i * i * 11) % 400 for i in range(300)]


def save_adapter(model: Path, folder: Path) -> Path:
    """An adapter with large weights, so that attention is more peaked."""
    config = AutoConfig.from_pretrained(model)
    rank = 8
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    widths = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for name, heads in widths.items():
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}_proj"
            out = heads * config.head_dim
            tensors[f"{place}.lora_A.weight"] = torch.randn(
                rank, config.hidden_size, generator=generator
            )
            tensors[f"{place}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none"}
    about |= {"target_modules": ["q_proj", "k_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return folder


def test_the_kept_mass_of_an_adapter_is_a_series_of_its_own(tmp_path: Path) -> None:
    model = save_checkpoint(SERVED["llama"], tmp_path / "llama")
    tiny_tokenizer().save_pretrained(model)
    adapter = save_adapter(model, tmp_path / "adapter")
    lora = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"peaked={adapter}"]
    server = Server(
        model,
        *OPTIONS[:2],
        *["--max-model-len", "1024", "--kv-cache-memory-bytes", str(1 << 28), "--enforce-eager"],
        *lora,
        toptheta={"thresholds": "none", "min_prob": 0.02, "min_mass": 0.0, "min_kv_len": 32},
        log_path=tmp_path / "server.log",
        env=ONE_THREAD,
    )
    with server:
        client, base = client_of(server), str(model)
        answers = {
            (name, off): complete(
                client, PROMPT, 12, {"toptheta": "off"} if off else None, model=name
            )
            for name in (base, "peaked")
            for off in (False, True)
        }
        texts = [answers[name, True].choices[0].text for name in (base, "peaked")]
        assert texts[0] != texts[1]
        kept = [summary(answers[name, False])["kept_mass"] for name in (base, "peaked")]
        assert 0 < kept[0] < 1
        assert 0 < kept[1] < 1
        assert kept[0] != kept[1]
        found = read_metrics(server.url.removesuffix("/v1"))
        assert {own for name, own in found if name == "kept_mass_count"} == {"", "peaked"}
        for adapter, mass in zip(("", "peaked"), kept, strict=True):
            assert found["kept_mass_count", adapter] == 2
            total = found["kept_mass_sum", adapter]
            assert abs(total - mass - 1) < 1e-5, "the other one ran dense"
