"""Every knob of the plug-in: the `toptheta` entry of vLLM's `--additional-config` in, one frozen
object out."""

import difflib
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

CONFIG_KEY = "toptheta"
EXAMPLE = """--additional-config '{"toptheta": {"min_prob": 0.002}}'"""

_REMOVED = {
    "prefill_k": "prompts take prefill_min_prob, or the k of all rows",
    "group_size": "groups of tokens follow --block-size",
    "layers.k": 'a layer takes min_prob, or "dense": true',
}
"""Options of earlier versions, and what stands for them."""

_MAX_GUESSED = 60
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 200

Prob = Annotated[float, Field(gt=0, lt=1)]
Mass = Annotated[float, Field(ge=0, lt=1)]
_FromList = BeforeValidator(lambda pair: tuple(pair) if isinstance(pair, list) else pair)


class LayerOverride(BaseModel):
    """What one layer does differently.

    Attributes:
        min_prob: attention probability below which this layer reads no V row; None takes that of
            the other layers.
        dense: run the layer without pruning.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    min_prob: Prob | None = None
    dense: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> "LayerOverride":
        if self.dense and self.min_prob is not None:
            raise ValueError("a dense layer takes no min_prob")
        return self


class TopThetaConfig(BaseModel):
    """Options of Top-theta attention.

    Attributes:
        thresholds: "auto" (find a table by model identity, or do without), "calibrate" (find one,
            or make it at the first start), "none" (do without), a shipped name, or a path to a
            table.
        min_prob: attention probability below which a key's V row is not read.
        min_mass: share of a row's attention that the kept keys have at least; None becomes 0.5
            without a table, and no floor with one.
        k: mean keys that rows keep per kv head, instead of min_prob; needs a table.
        phases: which rows are pruned: generated tokens, prompt tokens, or both.
        prefill_min_prob: min_prob of prompt rows, where prompts are pruned; None does as for
            generated tokens.
        min_kv_len: rows that see at most this many keys run dense.
        k_sketch: keep an 8-bit copy of K beside it, which generated tokens scan in K's place; takes
            a quarter more KV memory. "auto" does so where it was measured to be faster: on CPUs.
        compensation: give the lost mass to the mean V of its neighbourhood, not to the kept keys.
        layers: overrides by layer index, for example
            {"0": {"min_prob": 0.0001}, "7": {"dense": true}}.
        min_prob_range, min_mass_range: what a request may ask for.
        min_k: smallest k a request may ask for; None allows the table's smallest.
        max_k: largest k a request may ask for; None allows the table's largest.
        allow_off: whether a request may switch pruning off for itself.
        allow_layers: whether a request may have its counts layer by layer.
        report: whether responses carry counts where their request does not say; metrics do anyway.
        telemetry: count what is pruned, and show it in responses and metrics.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    thresholds: str = "auto"
    min_prob: Prob = 0.001
    min_mass: Mass | None = None
    k: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    phases: Literal["decode", "prefill", "both"] = "decode"
    prefill_min_prob: Prob | None = None
    min_kv_len: int = Field(default=1024, ge=0, lt=1 << 31)
    k_sketch: Literal["auto"] | bool = "auto"
    compensation: bool = True
    layers: dict[int, LayerOverride] = Field(default_factory=dict)
    min_prob_range: Annotated[tuple[Prob, Prob], _FromList] = (1e-6, 0.1)
    min_mass_range: Annotated[tuple[Mass, Mass], _FromList] = (0.0, 0.95)
    min_k: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_k: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    allow_off: bool = True
    allow_layers: bool = True
    report: bool = True
    telemetry: bool = True

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_indices(cls, value: Any) -> Any:
        # JSON objects have string keys only.
        if not isinstance(value, Mapping):
            return value
        return {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in value.items()}

    @field_validator("min_prob_range", "min_mass_range")
    @classmethod
    def _ascending(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError("the first number must not be above the second")
        return value

    @model_validator(mode="after")
    def _one_dial(self) -> "TopThetaConfig":
        if self.k is not None and "min_prob" in self.model_fields_set:
            raise ValueError(
                "options 'k' and 'min_prob' exclude each other: k chooses a min_prob by the length "
                "of a row"
            )
        return self

    @property
    def needs_means(self) -> bool:
        """Whether any row reads the V means of token groups; pruned prompts always do."""
        return self.compensation or self.phases != "decode"

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
    place = [str(part) for part in item["loc"]]
    name, message = ".".join(place), item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        removed = _REMOVED.get(".".join((place[0], *place[2:])))
        if removed:
            return f"option {name!r} is gone: {removed}"
        fields = (TopThetaConfig if len(place) == 1 else LayerOverride).model_fields
        near = difflib.get_close_matches(place[-1][:_MAX_GUESSED], fields, n=1)
        return f"unknown option {_SHOWN.repr(name)}" + (
            f" (did you mean {near[0]!r}?)" if near else ""
        )
    if not place:  # about options that do not go together
        return str(message)
    return f"option {_SHOWN.repr(name)}: {message}, got {_SHOWN.repr(item['input'])}"
