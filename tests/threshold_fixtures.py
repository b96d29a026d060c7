"""Threshold tables out of nothing, for tests that need one without calibrating."""

import torch

from vllm_toptheta.kernels.layout import UNCALIBRATED_WEIGHTS
from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.thresholds import SCHEMA_VERSION, TableMetadata, ThresholdTable


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
        "min_prob": 0.001,
        "corpus": "made up",
        "num_tokens": 1,
        "length": 512,
        "versions": {},
        "created": "2026-01-01T00:00:00+00:00",
        "command": "none",
    }
    return TableMetadata(**(values | fields))


def make_table(identity: ModelIdentity | None = None, **tensors: torch.Tensor) -> ThresholdTable:
    """A row of n keys keeps exp(-log p) / sqrt(n / 128) of them, at least 1 and at most n: k keys
    at log p = -log k - log(n / 128) / 2. Knots at 128, 512 and 2048 keys, k from 1 to 256.
    """
    metadata = make_metadata(identity)
    of_model = metadata.identity
    lengths = torch.tensor([128.0, 512.0, 2048.0])
    log_probs = torch.linspace(-20, 0, 81)
    kept = (-log_probs - (lengths[:, None] / 128).log() / 2).exp()
    kept = kept.clamp(min=1).minimum(lengths[:, None])
    weights = torch.tensor(UNCALIBRATED_WEIGHTS)
    values = {
        "lengths": lengths,
        "log_probs": log_probs,
        "kept": kept.expand(of_model.num_layers, of_model.num_kv_heads, -1, -1).contiguous(),
        "weights": weights.expand(of_model.num_layers, of_model.num_heads, -1).contiguous(),
        "offsets": torch.zeros(of_model.num_layers, of_model.num_kv_heads),
    }
    return ThresholdTable(metadata, **(values | tensors))
