"""What one request may ask for: the flat `toptheta*` keys of `vllm_xargs` in, checked options out.

The same parser serves the HTTP middleware, vLLM's input processor and the worker, so that all of
them agree on what a request means.
"""

import difflib
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

PREFIX = "toptheta"
EXAMPLE = '"vllm_xargs": {"toptheta_k": 128}'
_SALT_PREFIX = "toptheta:"
_MAX_SHOWN = 3
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 60


class RequestOptions(BaseModel):
    """Options of one request.

    Attributes:
        k: mean keys a row keeps; None takes the server's.
        pruning: False runs every row of the request without.
        layers: show counts per layer in the response.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    k: float | None = Field(default=None, alias="toptheta_k")
    pruning: bool = Field(default=True, alias="toptheta")
    layers: bool = Field(default=False, alias="toptheta_layers")

    @field_validator("k", mode="before")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
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

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> bool:
        if value in (True, False):
            return bool(value)
        raise ValueError("must be true or false")

    @property
    def off(self) -> bool:
        """Whether the request runs without pruning."""
        return not self.pruning

    @property
    def setting(self) -> str:
        """The class of the request: default, k or off."""
        return "off" if self.off else "default" if self.k is None else "k"

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
        if options.off and options.k is not None:
            raise ValueError(
                'toptheta_k has no meaning with "toptheta": "off": send one of both; '
                f"for example {EXAMPLE}"
            )
        return options


_DEFAULT = RequestOptions()


@dataclass(frozen=True)
class TargetK:
    """Mean keys a row is to keep, by phase; None where the rows of a phase run dense.

    Attributes:
        decode: of generated tokens.
        prefill: of prompt tokens.
    """

    decode: float | None
    prefill: float | None

    def of(self, options: RequestOptions) -> "TargetK":
        """What a request gets from a server with these: its own k wherever the server prunes."""

        def choose(ours: float | None) -> float | None:
            if ours is None or options.off:
                return None
            return ours if options.k is None else options.k

        return TargetK(choose(self.decode), choose(self.prefill))


@dataclass(frozen=True)
class RequestPolicy:
    """What the server allows its clients.

    Attributes:
        server: what rows keep where their request does not say.
        min_k, max_k: smallest and largest k, both within the threshold table.
        allow_off: whether a request may run without pruning.
    """

    server: TargetK
    min_k: float
    max_k: float
    allow_off: bool

    def check(self, xargs: object) -> RequestOptions:
        """Parse a request's options and hold them against the policy.

        Returns:
            The options; their k is None where the server does the same without it.

        Raises:
            ValueError: what is wrong, what is allowed.
        """
        options = RequestOptions.parse(xargs)
        if options.off and not self.allow_off:
            raise ValueError(
                'this server does not allow "toptheta": "off" (its option allow_off is false); '
                f"send toptheta_k between {self.min_k:g} and {self.max_k:g} instead"
            )
        if options.k is None:
            return options
        if self.server.of(options) == self.server:
            return options.model_copy(update={"k": None})
        if not self.min_k <= options.k <= self.max_k:
            raise ValueError(
                f"toptheta_k = {options.k:g} is outside what this server allows: "
                f"send a k between {self.min_k:g} and {self.max_k:g}"
            )
        return options


def cache_salt(options: RequestOptions, salt: str | None) -> str | None:
    """The prefix-cache salt of a request: requests share KV only under the same settings.

    Blocks of pruned rows depend on what was pruned, and vLLM's block hashes do not know.

    Args:
        options: checked by `RequestPolicy.check`, so that a k that changes nothing is None.
        salt: the user's own salt.
    """
    if options.setting == "default" and not (salt or "").startswith(_SALT_PREFIX):
        return salt
    setting = "off" if options.off else "default" if options.k is None else repr(options.k)
    return f"{_SALT_PREFIX}{setting}:{salt or ''}"


def _names() -> list[str]:
    return [str(field.alias) for field in RequestOptions.model_fields.values()]


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _names(), n=1)
    return f"unknown option {_SHOWN.repr(name)}" + (f" (did you mean {near[0]!r}?)" if near else "")


def _explain(item: Any) -> str:
    message = item["msg"].removeprefix("Value error, ")
    return f"option {str(item['loc'][0])!r}: {message}, got {_SHOWN.repr(item['input'])}"
