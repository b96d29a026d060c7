"""Model config in, identity out: what decides whether a threshold table belongs to a model.

The identity is a hash over the fields of a transformers config that change attention scores. It is
the same for the config that `AutoConfig` loads and for vLLM's `model_config.hf_text_config`, and
does not depend on the path or dtype, nor on whether the output head shares the embedding.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, PositiveInt

_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "vocab_size",
    "hidden_act",
    "hidden_activation",
    "attention_bias",
    "attention_multiplier",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "sliding_window",
    "use_sliding_window",
    "attention_chunk_size",
    "num_local_experts",
    "num_experts",
)
"""Fields compared as they are; absent and None are the same."""


class ModelIdentity(BaseModel):
    """What a table was calibrated on; two identities match when their `config_hash` is equal.

    Attributes:
        name: model name for people, as "org/model"; never compared.
        architectures: class names for people; never compared.
        num_layers: decoder layers.
        num_heads: query heads per layer.
        num_kv_heads: kv heads per layer.
        head_dim: width of a head.
        fields: the canonical config fields the hash is made of.
        config_hash: sha256 over `fields`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    architectures: list[str]
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    fields: dict[str, JsonValue]
    config_hash: str

    @classmethod
    def from_config(cls, config: Any, name: str = "") -> "ModelIdentity":
        """Compute the identity of a model.

        Args:
            config: transformers `PreTrainedConfig` of the language model, or of a multimodal model
                that holds one.
            name: model name to record; the config's own by default.

        Raises:
            ValueError: the config lacks layers or heads, or its heads differ from layer to layer.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        num_layers = _count(text, "num_hidden_layers")
        num_heads = _count(text, "num_attention_heads")
        num_kv_heads = _count(text, "num_key_value_heads", default=num_heads)
        head_dim = _count(text, "head_dim", default=_count(text, "hidden_size") // num_heads)
        fields: dict[str, JsonValue] = {}
        for field in _FIELDS:
            if (value := getattr(text, field, None)) is not None:
                fields[field] = value
        fields["num_attention_heads"] = num_heads
        fields["num_key_value_heads"] = num_kv_heads
        fields["head_dim"] = head_dim
        for field in ("bos_token_id", "eos_token_id"):
            if (value := getattr(text, field, None)) is not None:
                fields[field] = sorted(value) if isinstance(value, list | tuple) else [value]
        if layer_types := getattr(text, "layer_types", None):
            fields["layer_types"] = list(layer_types)
        if rope := _rope(text):
            fields["rope"] = rope
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return cls(
            name=name or str(getattr(config, "_name_or_path", "") or ""),
            architectures=list(getattr(config, "architectures", None) or []),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            fields=json.loads(canonical),
            config_hash=hashlib.sha256(canonical.encode()).hexdigest(),
        )

    def matches(self, other: "ModelIdentity") -> bool:
        """Whether a table of the one model serves the other."""
        return self.config_hash == other.config_hash

    def differences(self, expected: "ModelIdentity") -> str:
        """Name the fields that differ, as "field: got X, expected Y; …"; empty when none does."""
        names = sorted(self.fields.keys() | expected.fields.keys())
        return "; ".join(
            f"{name}: got {self.fields.get(name)!r}, expected {expected.fields.get(name)!r}"
            for name in names
            if self.fields.get(name) != expected.fields.get(name)
        )


def _count(config: Any, field: str, default: int | None = None) -> int:
    value = getattr(config, field, None)
    if value is None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise ValueError(
            f"model config {type(config).__name__}: {field} is {value!r}, expected one positive "
            "number (models whose heads differ from layer to layer are not supported)"
        )
    return value


def _rope(config: Any) -> dict[str, JsonValue]:
    """Rotary parameters without the spellings that transformers and vLLM translate into one
    another.
    """
    parameters = (
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    if any(isinstance(value, Mapping) for value in parameters.values()):
        return {
            str(layer_type): _flat_rope(config, value)
            for layer_type, value in parameters.items()
            if isinstance(value, Mapping)
        }
    return _flat_rope(config, parameters)


def _flat_rope(config: Any, parameters: Mapping[str, Any]) -> dict[str, JsonValue]:
    rope = {str(key): value for key, value in parameters.items() if value is not None}
    legacy_type = rope.pop("type", "default")
    rope.setdefault("rope_type", legacy_type)
    for field in ("rope_theta", "partial_rotary_factor"):
        if (value := rope.get(field, getattr(config, field, None))) is not None:
            rope[field] = float(value)
    return rope if "rope_theta" in rope or len(rope) > 1 else {}
