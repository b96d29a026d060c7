"""Threshold tables out of nothing, for tests that need one without calibrating."""

import torch

from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.thresholds import KEEP_ALL, SCHEMA_VERSION, TableMetadata, ThresholdTable


class FakeConfig:
    """The attributes of a transformers config that an identity reads."""

    def __init__(self, **fields: object) -> None:
        self.model_type = "llama"
        self.num_hidden_layers = 2
        self.num_attention_heads = 4
        self.num_key_value_heads = 2
        self.hidden_size = 64
        self.vocab_size = 100
        self.architectures = ["LlamaForCausalLM"]
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        self.__dict__.update(fields)


def make_identity(name: str = "org/model", **fields: object) -> ModelIdentity:
    return ModelIdentity.from_config(FakeConfig(**fields), name)


def make_metadata(identity: ModelIdentity | None = None, **fields: object) -> TableMetadata:
    identity = identity or make_identity()
    values: dict[str, object] = {
        "schema_version": SCHEMA_VERSION,
        "identity": identity,
        "windows": [None] * identity.num_layers,
        "allocation": "uniform",
        "group_size": 16,
        "tac_k": 0,
        "corpus": "made up",
        "num_tokens": 1,
        "length": 512,
        "versions": {},
        "created": "2026-01-01T00:00:00+00:00",
        "command": "none",
    }
    return TableMetadata(**(values | fields))


def make_table(identity: ModelIdentity | None = None, **tensors: torch.Tensor) -> ThresholdTable:
    """Levels 16 and 64 of 2 layers and 4 heads; theta(n) = 2 log2(n) - log2(k) + layer + head /
    10.
    """
    metadata = make_metadata(identity)
    num_layers, num_heads = metadata.identity.num_layers, metadata.identity.num_heads
    levels = torch.tensor([16.0, 64.0])
    lengths = torch.tensor([32.0, 128.0, 512.0])
    offset = torch.arange(num_layers)[:, None] + torch.arange(num_heads) / 10
    theta = 2 * lengths.log2() - levels.log2()[:, None, None, None] + offset[..., None]
    theta = theta.masked_fill(lengths <= levels[:, None, None, None], KEEP_ALL)
    values = {
        "levels": levels,
        "lengths": lengths,
        "theta": theta,
        "slope": torch.full((2, num_layers, num_heads), 2.0),
        "head_k": levels[:, None, None].expand(2, num_layers, num_heads).clone(),
        "lost_mass": torch.full((2, num_layers, num_heads), 0.1),
    }
    return ThresholdTable(metadata, **(values | tensors))
