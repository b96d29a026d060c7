"""What one request may ask for, and what it runs with.

The HTTP middleware checks the flat `toptheta*` keys of `vllm_xargs`, so that errors come before any
token. vLLM's input processor, which every request comes by, resolves them once; from there on
whoever plans or shows rows reads `Resolved` in the request.
"""

import difflib
import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
)

PREFIX = "toptheta"
EXAMPLE = '"vllm_xargs": {"toptheta_min_prob": 0.002}'
NUMBERS = ("min_prob", "min_mass", "k")
"""Fields of a request's options that are numbers."""

_SALT_PREFIX = "toptheta:"
_MAX_SHOWN = 3
_MAX_GUESSED = 60
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 60


class RequestOptions(BaseModel):
    """Options of one request.

    Attributes:
        min_prob: attention probability below which a key's V row is not read; None takes the
            server's.
        min_mass: share of a row's attention that is kept at least; None takes the server's.
        k: mean keys that rows keep per kv head, instead of min_prob; None takes the server's.
        pruning: False runs every row of the request without.
        layers: show counts per layer in the response.
        report: whether the response carries counts; None takes the server's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    min_prob: float | None = Field(default=None, alias="toptheta_min_prob")
    min_mass: float | None = Field(default=None, alias="toptheta_min_mass")
    k: float | None = Field(default=None, alias="toptheta_k")
    pruning: bool = Field(default=True, alias="toptheta")
    layers: bool = Field(default=False, alias="toptheta_layers")
    report: bool | None = Field(default=None, alias="toptheta_report")

    @field_validator("min_prob", mode="before")
    @classmethod
    def _probability(cls, value: Any) -> Any:
        if value is not None and not (_is_number(value) and 0 < value < 1):
            raise ValueError("must be a number between 0 and 1, as 0.001")
        return value

    @field_validator("min_mass", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        if value is not None and not (_is_number(value) and 0 <= value < 1):
            raise ValueError("must be a number from 0 to below 1, as 0.5")
        return value

    @field_validator("k", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if value is not None and not (_is_number(value) and 0 < value < math.inf):
            raise ValueError("must be a positive number")
        return value

    @field_validator("pruning", mode="before")
    @classmethod
    def _on_or_off(cls, value: Any) -> bool:
        # vLLM turns a JSON false into 0 on its way here.
        if value in ("off", False):
            return False
        if value in ("on", True):
            return True
        raise ValueError('must be "off" or "on"')

    @field_validator("layers", "report", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> bool:
        if value in (True, False):
            return bool(value)
        raise ValueError("must be true or false")

    @property
    def off(self) -> bool:
        """Whether the request runs without pruning."""
        return not self.pruning

    @property
    def asked(self) -> dict[str, float]:
        """The numbers that the request names, by field."""
        numbers = {name: getattr(self, name) for name in NUMBERS}
        return {name: number for name, number in numbers.items() if number is not None}

    @property
    def setting(self) -> str:
        """The class of the request: default, k, min_prob (also where it names min_mass alone) or
        off."""
        if self.off:
            return "off"
        if not self.asked:
            return "default"
        return "min_prob" if self.k is None else "k"

    @classmethod
    def parse(cls, xargs: object) -> "RequestOptions":
        """Read the options from a request's `vllm_xargs`, or `SamplingParams.extra_args`.

        Args:
            xargs: the mapping, or None; keys that do not start with "toptheta" are not ours.

        Raises:
            ValueError: one message naming every wrong option, what was given, and what to type
                instead.
        """
        if not isinstance(xargs, Mapping):
            return _DEFAULT
        ours = {key: value for key, value in xargs.items() if str(key).startswith(PREFIX)}
        if not ours:
            return _DEFAULT
        # Field names are not accepted from outside: only keys with the prefix get here. Clients may
        # send any number of keys of any length, so a message shows the first ones, shortened.
        known = {name: value for name, value in ours.items() if name in _names()}
        unknown = [str(name) for name in ours if name not in known]
        problems = [_unknown(name) for name in unknown[:_MAX_SHOWN]]
        try:
            options = cls.model_validate(known)
        except ValidationError as error:
            problems += [_explain(item) for item in error.errors()]
        if problems:
            raise ValueError(
                f"{'; '.join(problems)}. Options are {', '.join(_names())}; for example {EXAMPLE}"
            )
        named = [f"toptheta_{name}" for name in options.asked]
        if options.off and named:
            raise ValueError(
                f'{" and ".join(named)} have no meaning with "toptheta": "off": send one of both; '
                f"for example {EXAMPLE}"
            )
        if options.k is not None and options.min_prob is not None:
            raise ValueError(
                "toptheta_k and toptheta_min_prob exclude each other: k chooses a min_prob by the "
                f"length of a row. Send one of both; for example {EXAMPLE}"
            )
        if options.layers and options.report is False:
            raise ValueError(
                'toptheta_layers has no meaning with "toptheta_report": false, which leaves all '
                f"counts out of the response: send one of both; for example {EXAMPLE}"
            )
        return options


_DEFAULT = RequestOptions()


@dataclass(frozen=True)
class Target:
    """What rows run with.

    Attributes:
        min_prob: attention probability below which a key's V row is not read; None where k rules.
        min_mass: share of a row's attention that is kept at least; 0 for no floor.
        k: mean keys that rows keep per kv head; None where min_prob rules.
    """

    min_prob: float | None
    min_mass: float = 0.0
    k: float | None = None

    def of(self, options: RequestOptions) -> "Target":
        """The same with what a request asks for instead."""
        min_mass = self.min_mass if options.min_mass is None else options.min_mass
        if options.min_prob is None and options.k is None:
            return Target(self.min_prob, min_mass, self.k)
        return Target(options.min_prob, min_mass, options.k)


@dataclass(frozen=True)
class Targets:
    """What rows run with, by phase; None where the rows of a phase run dense.

    Attributes:
        decode: generated tokens.
        prefill: prompt tokens. They know no floor.
    """

    decode: Target | None
    prefill: Target | None

    def of(self, options: RequestOptions) -> "Targets":
        """What a request gets from a server with these: its own numbers wherever the server
        prunes."""
        if options.off:
            return Targets(None, None)
        prefill = self.prefill and replace(self.prefill.of(options), min_mass=0.0)
        return Targets(self.decode and self.decode.of(options), prefill)


@dataclass(frozen=True)
class Resolved:
    """What one request runs with: its options and the server's, put together.

    Attributes:
        setting: the class of the request, see `RequestOptions.setting`.
        targets: what its rows run with.
        layers: show counts per layer in the response.
        report: whether the response carries counts.
    """

    setting: str
    targets: Targets
    layers: bool = False
    report: bool = True

    @classmethod
    def of(cls, options: RequestOptions, server: Targets, *, report: bool = True) -> "Resolved":
        """Put a request's options and the server's together.

        Args:
            options: of the request.
            server: what rows run with where the request does not say.
            report: whether responses carry counts where the request does not say.
        """
        if options.report is not None:
            report = options.report
        return cls(options.setting, server.of(options), options.layers, report or options.layers)

    @property
    def is_default(self) -> bool:
        """Whether the request runs as any other that names no options."""
        return self.setting == "default" and not self.layers

    def write(self, params: Any) -> None:
        """Put this into a request, in place of the options that it came with.

        Args:
            params: vLLM's `SamplingParams`, the request's own.
        """
        others = (params.extra_args or {}).items()
        kept = {key: value for key, value in others if not str(key).startswith(PREFIX)}
        params.extra_args = {**kept, PREFIX: asdict(self)}

    @classmethod
    def read(cls, params: Any) -> "Resolved | None":
        """What `write` put into a request; None where nothing was, as for another backend's engine.

        Args:
            params: vLLM's `SamplingParams`, perhaps from another process; None of a request that
                generates nothing.

        Raises:
            ValueError: somebody else wrote something else.
        """
        found = (getattr(params, "extra_args", None) or {}).get(PREFIX)
        return _RESOLVED.validate_python(found) if isinstance(found, Mapping) else None


_RESOLVED = TypeAdapter(Resolved)


@dataclass(frozen=True)
class RequestPolicy:
    """What the server allows its clients.

    Attributes:
        server: what rows run with where their request does not say.
        ranges: smallest and largest number of a request, for "min_prob", "min_mass" and, where
            there is a table, "k".
        allow_off: whether a request may run without pruning.
        allow_layers: whether it may have its counts layer by layer.
        report: whether its response carries counts where it does not say.
    """

    server: Targets
    ranges: Mapping[str, tuple[float, float]]
    allow_off: bool
    allow_layers: bool = True
    report: bool = True

    def check(self, xargs: object) -> RequestOptions:
        """Parse a request's options and hold them against the policy.

        Returns:
            The options; numbers are None where the server does the same without them.

        Raises:
            ValueError: what is wrong, what is allowed.
        """
        options = RequestOptions.parse(xargs)
        if options.off and not self.allow_off:
            low, high = self.ranges["min_prob"]
            raise ValueError(
                'this server does not allow "toptheta": "off" (its option allow_off is false); '
                f"send toptheta_min_prob between {low:g} and {high:g} instead"
            )
        if options.layers and not self.allow_layers:
            raise ValueError(
                "this server does not show counts by layer (its option allow_layers is false): "
                "drop toptheta_layers"
            )
        for name in options.asked:
            without = options.model_copy(update={name: None})
            if self.server.of(without) == self.server.of(options):
                options = without
        for name, number in options.asked.items():
            if name not in self.ranges:
                low, high = self.ranges["min_prob"]
                raise ValueError(
                    f"this server has no threshold table, which toptheta_{name} needs: send "
                    f"toptheta_min_prob between {low:g} and {high:g}"
                )
            low, high = self.ranges[name]
            if not low <= number <= high:
                raise ValueError(
                    f"toptheta_{name} = {number:g} is outside what this server allows: "
                    f"send a {name} between {low:g} and {high:g}"
                )
        return options


def cache_salt(options: RequestOptions, salt: str | None) -> str | None:
    """The prefix-cache salt of a request: requests share KV only under the same settings.

    Blocks of pruned rows depend on what was pruned, and vLLM's block hashes do not know.

    Args:
        options: checked by `RequestPolicy.check`, so that numbers that change nothing are None.
        salt: the user's own salt.
    """
    if options.setting == "default" and not (salt or "").startswith(_SALT_PREFIX):
        return salt
    numbers = ",".join(f"{name}={float(number)!r}" for name, number in options.asked.items())
    setting = "off" if options.off else numbers or "default"
    return f"{_SALT_PREFIX}{setting}:{salt or ''}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _names() -> list[str]:
    return [str(field.alias) for field in RequestOptions.model_fields.values()]


def _unknown(name: str) -> str:
    # Its time grows with the length, and no misspelling is several times as long as the names.
    near = difflib.get_close_matches(name, _names(), n=1) if len(name) <= _MAX_GUESSED else []
    return f"unknown option {_SHOWN.repr(name)}" + (f" (did you mean {near[0]!r}?)" if near else "")


def _explain(item: Any) -> str:
    message = item["msg"].removeprefix("Value error, ")
    return f"option {str(item['loc'][0])!r}: {message}, got {_SHOWN.repr(item['input'])}"
