"""Minutes of mixed load on a server of its own: no count, no request and no memory is lost."""

import os
from pathlib import Path

import torch
from e2e.conftest import ONE_THREAD
from tables import save_table
from tiny_models import CONFIGS, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.soak import run

REQUESTS = os.environ.get("TOPTHETA_SOAK")
"""Instead of 100 seconds, so many requests."""


def test_nothing_is_lost_under_mixed_load(tmp_path: Path) -> None:
    model = tmp_path / "model"
    torch.manual_seed(0)
    config = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "head_dim": 32})
    LlamaForCausalLM(config).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    result = run(
        model,
        minutes=26 if REQUESTS else 100 / 60,
        requests=float(REQUESTS or "inf"),
        longest=1500,
        env=ONE_THREAD,
        thresholds=str(save_table(model, tmp_path / "table.safetensors")),
    )
    print(result)
    assert result["problems"] == []
    assert len(result["by kind"]) == 5
    assert result["counted"]["rows"] > 0
