"""Model config in, identity out: what decides whether a threshold table belongs to a model.

Two models match where attention scores are computed alike: the same architecture, heads, windows
and rotary embedding. The path, the dtype, quantisation, the vocabulary and its special tokens may
differ. The identity is the same for the config that `AutoConfig` loads and for vLLM's
`model_config.hf_text_config`.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveInt, model_validator

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
    "num_kv_shared_layers",
    "no_rope_layers",
    "num_local_experts",
    "num_experts",
)
"""Fields compared as they are; absent and None are the same."""

_TOLD = ("vocab_size", "final_logit_softcapping", "bos_token_id", "eos_token_id")
"""Fields that do not change attention scores: a table of a model that differs in them is used, and
the log says so."""

_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "num_attention_groups")
"""The same number in configs of different families."""


class ModelIdentity(BaseModel):
    """What a table was calibrated on.

    Attributes:
        name: model name for people, as "org/model"; never compared.
        architectures: class names for people; never compared.
        num_layers: decoder layers.
        num_heads: query heads per layer.
        num_kv_heads: kv heads per layer; the most where layers differ.
        head_dim: width of a head; the largest where layers differ.
        fields: the canonical config fields; where layers differ in heads, with a list by layer.
        config_hash: sha256 over the fields that decide, for people; never compared.
        max_len: keys that a row sees at most, where that is known; not stored.
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
    max_len: PositiveInt | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _one_number_of_kv_heads(self) -> "ModelIdentity":
        found = self.fields.get("num_key_value_heads")
        if found != self.num_kv_heads and not (
            isinstance(found, list) and len(found) == self.num_layers
        ):
            raise ValueError(
                f"fields.num_key_value_heads is {found!r}, expected {self.num_kv_heads} or one "
                "number per layer"
            )
        return self

    @classmethod
    def from_config(
        cls, config: Any, name: str = "", max_len: int | None = None
    ) -> "ModelIdentity":
        """Compute the identity of a model.

        Args:
            config: transformers `PreTrainedConfig` of the language model, or of a multimodal model
                that holds one.
            name: model name to record; the config's own by default.
            max_len: keys that a row sees at most; all that the model has positions for by default.

        Raises:
            ValueError: the config lacks layers or heads, or its layers differ in query heads.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        num_layers = _count(text, "num_hidden_layers")
        layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
        num_heads = [_count(layer, "num_attention_heads") for layer in layers]
        if len(set(num_heads)) > 1:
            raise ValueError(
                f"model config {type(text).__name__}: num_attention_heads is {num_heads}, expected "
                "the same in all layers"
            )
        kv_heads = [_kv_heads(layer, num_heads[0]) for layer in layers]
        head_dims = [_head_dim(layer, num_heads[0]) for layer in layers]
        fields: dict[str, JsonValue] = {}
        for field in _FIELDS:
            if (value := getattr(text, field, None)) is not None:
                fields[field] = value
        if fields.get("model_type") == "transformer":  # what vLLM makes of Mistral's params.json
            is_moe = "MixtralForCausalLM" in (getattr(text, "architectures", None) or [])
            fields["model_type"] = "mixtral" if is_moe else "mistral"
        fields["num_attention_heads"] = num_heads[0]
        fields["num_key_value_heads"] = _one_or_all(kv_heads)
        fields["head_dim"] = _one_or_all(head_dims)
        for field in ("bos_token_id", "eos_token_id"):
            if (value := getattr(text, field, None)) is not None:
                fields[field] = sorted(value) if isinstance(value, list | tuple) else [value]
        if layer_types := getattr(text, "layer_types", None):
            fields["layer_types"] = list(layer_types)
        if rope := _rope(text, max_len):
            fields["rope"] = rope
        decisive = json.dumps(_decisive(fields, None), sort_keys=True, separators=(",", ":"))
        return cls(
            name=name or str(getattr(config, "_name_or_path", "") or ""),
            architectures=list(getattr(config, "architectures", None) or []),
            num_layers=num_layers,
            num_heads=num_heads[0],
            num_kv_heads=max(kv_heads),
            head_dim=max(head_dims),
            fields=json.loads(json.dumps(fields)),
            config_hash=hashlib.sha256(decisive.encode()).hexdigest(),
            max_len=max_len,
        )

    def kv_heads_of(self, layer: int) -> int:
        """The kv heads of one layer."""
        kv_heads = self.fields["num_key_value_heads"]
        return kv_heads[layer] if isinstance(kv_heads, list) else self.num_kv_heads  # type: ignore[return-value]

    @property
    def uniform(self) -> bool:
        """Whether all layers have as many kv heads, as a table takes them to have."""
        return not isinstance(self.fields["num_key_value_heads"], list)

    def matches(self, other: "ModelIdentity") -> bool:
        """Whether a table of the one model serves the other: attention scores are computed
        alike."""
        max_len = self.max_len or other.max_len
        return _decisive(self.fields, max_len) == _decisive(other.fields, max_len)

    def fits(self, other: "ModelIdentity") -> bool:
        """Whether a table of the one model can be read for the other: layers and heads are as
        many."""
        mine, theirs = (
            (one.num_layers, one.num_heads, one.fields["num_key_value_heads"])
            for one in (self, other)
        )
        return mine == theirs

    def differences(self, expected: "ModelIdentity", *, decisive: bool = True) -> str:
        """Name the fields that differ, as "field: got X, expected Y; …"; empty when none does.

        Args:
            expected: the other model.
            decisive: only the fields by which `matches` goes, not all.
        """
        max_len = self.max_len or expected.max_len
        got, wanted = (
            _decisive(identity.fields, max_len) if decisive else identity.fields
            for identity in (self, expected)
        )
        return "; ".join(
            f"{name}: got {got.get(name)!r}, expected {wanted.get(name)!r}"
            for name in sorted(got.keys() | wanted.keys())
            if got.get(name) != wanted.get(name)
        )


def _decisive(fields: Mapping[str, JsonValue], max_len: int | None) -> dict[str, JsonValue]:
    """The fields that change attention scores of rows with at most max_len keys."""
    result = {name: value for name, value in fields.items() if name not in _TOLD}
    layer_types, window = result.get("layer_types"), result.get("sliding_window")
    windowed = result.pop("use_sliding_window", True) and isinstance(window, int)
    if isinstance(layer_types, list) and "sliding_attention" not in layer_types:
        windowed = False
    if not windowed or (max_len is not None and isinstance(window, int) and max_len <= window):
        result.pop("sliding_window", None)
        rope = result.get("rope")
        by_type = isinstance(rope, dict) and any(isinstance(v, dict) for v in rope.values())
        if isinstance(layer_types, list) and not by_type:
            names = ["full_attention" if t == "sliding_attention" else t for t in layer_types]
            result["layer_types"] = layer_types = list(names)
    if isinstance(layer_types, list) and all(t == layer_types[0] for t in layer_types):
        del result["layer_types"]
    return result


def _one_or_all(values: list[int]) -> JsonValue:
    return values[0] if len(set(values)) == 1 else list(values)


def _count(config: Any, field: str, default: int | None = None) -> int:
    value = getattr(config, field, None)
    if value is None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise ValueError(
            f"model config {type(config).__name__}: {field} is {value!r}, expected one positive "
            "number"
        )
    return value


def _head_dim(config: Any, num_heads: int) -> int:
    if getattr(config, "head_dim", None):
        return _count(config, "head_dim")
    return _count(config, "hidden_size") // num_heads


def _kv_heads(config: Any, num_heads: int) -> int:
    # Falcon and GPT-BigCode.
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1
    for field in _KV_HEADS:
        if getattr(config, field, None) is not None:
            return _count(config, field)
    return num_heads


def _rope(config: Any, max_len: int | None) -> dict[str, JsonValue]:
    """Rotary parameters without the spellings that transformers and vLLM translate into one
    another.
    """
    parameters = (
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    if any(isinstance(value, Mapping) for value in parameters.values()):
        return {
            str(layer_type): _flat_rope(config, value, max_len)
            for layer_type, value in parameters.items()
            if isinstance(value, Mapping)
        }
    return _flat_rope(config, parameters, max_len)


def _flat_rope(
    config: Any, parameters: Mapping[str, Any], max_len: int | None
) -> dict[str, JsonValue]:
    rope = {str(key): value for key, value in parameters.items() if value is not None}
    legacy_type = rope.pop("type", "default")
    rope.setdefault("rope_type", legacy_type)
    for field in ("rope_theta", "partial_rotary_factor"):
        if (value := rope.get(field, getattr(config, field, None))) is not None:
            rope[field] = float(value)
    if "long_factor" in rope:
        # LongRoPE has two sets of factors, of which an engine uses one.
        positions = getattr(config, "max_position_embeddings", None)
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", positions
        )
        longest = max_len or positions
        is_long = isinstance(longest, int) and isinstance(original, int) and longest > original
        rope.pop("short_factor" if is_long else "long_factor", None)
    return rope if "rope_theta" in rope or len(rope) > 1 else {}
