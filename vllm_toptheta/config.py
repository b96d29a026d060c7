"""Every knob of the plug-in: the `toptheta` entry of vLLM's `--additional-config` in, one frozen
object out."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

CONFIG_KEY = "toptheta"
EXAMPLE = """--additional-config '{"toptheta": {"k": 128}}'"""


class LayerOverride(BaseModel):
    """What one layer does differently.

    Attributes:
        k: mean keys a row keeps in this layer; None takes the global k.
        dense: run the layer without pruning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    k: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    dense: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "LayerOverride":
        if self.dense and self.k is not None:
            raise ValueError("a dense layer takes no k")
        return self


class TopThetaConfig(BaseModel):
    """Options of Top-theta attention.

    Attributes:
        thresholds: "auto" (find a table by model identity), a shipped name, or a path to a table.
        k: mean keys a row keeps over all layers and heads; within the levels of the table.
        phases: which rows are pruned: generated tokens, prompt tokens, or both.
        prefill_k: mean keys a prompt row keeps where prompts are pruned; None becomes k.
        min_kv_len: rows that see at most this many keys run dense.
        compensation: add the lost mass times the mean V of its token group.
        group_size: tokens per compensation group; divides vLLM's block size.
        layers: overrides by layer index, for example {"0": {"k": 512}, "7": {"dense": true}}.
        min_k: smallest k a request may ask for; None allows the table's smallest.
        max_k: largest k a request may ask for; None allows the table's largest.
        allow_off: whether a request may switch pruning off for itself.
        telemetry: count what is pruned, and show it in responses and metrics.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    thresholds: str = "auto"
    k: float = Field(default=128.0, gt=0, allow_inf_nan=False)
    phases: Literal["decode", "prefill", "both"] = "decode"
    prefill_k: float = Field(default=None, validate_default=True, gt=0, allow_inf_nan=False)
    min_kv_len: int = Field(default=1024, ge=0)
    compensation: bool = True
    group_size: Literal[16, 32, 64, 128] = 16
    layers: dict[int, LayerOverride] = Field(default_factory=dict)
    min_k: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_k: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    allow_off: bool = True
    telemetry: bool = True

    @field_validator("prefill_k", mode="before")
    @classmethod
    def _same_as_k(cls, value: Any, info: ValidationInfo) -> Any:
        # Here alone, so that nobody after this asks again what None stands for. A wrong k is not
        # there; its own error is enough.
        return info.data.get("k", cls.model_fields["k"].default) if value is None else value

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_indices(cls, value: Any) -> Any:
        # JSON objects have string keys only.
        if not isinstance(value, Mapping):
            return value
        return {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in value.items()}

    @classmethod
    def from_additional_config(cls, additional_config: object) -> "TopThetaConfig":
        """Read the options from vLLM's `additional_config`.

        Args:
            additional_config: the value of `VllmConfig.additional_config`; options stand under
                "toptheta".

        Raises:
            ValueError: one message naming every wrong option, what was given, and what to type
                instead.
        """
        options = (
            additional_config.get(CONFIG_KEY, {}) if isinstance(additional_config, Mapping) else {}
        )
        if not isinstance(options, Mapping):
            raise ValueError(
                f"toptheta: options must be a JSON object, got {type(options).__name__}; "
                f"write {EXAMPLE}"
            )
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            problems = "; ".join(_explain(item) for item in error.errors())
            raise ValueError(
                f"toptheta: {problems}. Options are {', '.join(cls.model_fields)}; "
                f"for example {EXAMPLE}"
            ) from None


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        fields = (TopThetaConfig if len(item["loc"]) == 1 else LayerOverride).model_fields
        near = difflib.get_close_matches(str(item["loc"][-1]), fields, n=1)
        return f"unknown option {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
    return f"option {name!r}: {item['msg']}, got {item['input']!r}"
