"""Wraps of vLLM internals that survive a change of theirs: are the names still there, and not
wrapped already; where does an argument stand in a call; what goes on without a wrap."""

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

logger = logging.getLogger("vllm.toptheta")

_MARK = "_toptheta_installed"


def mark_wrapped(owner: Any) -> None:
    """Remember that a class is wrapped."""
    setattr(owner, _MARK, True)


def is_wrapped(owner: Any) -> bool:
    """Whether a class is wrapped already."""
    return _MARK in vars(owner)


class Argument:
    """One argument of a method's calls, by position or by name.

    Wraps pass on whatever they are given and read what they need through this, so that a parameter
    that vLLM adds, moves or makes keyword-only changes nothing.

    Attributes:
        found: whether the method has the parameter.
    """

    def __init__(self, method: Callable[..., Any], name: str) -> None:
        """Look up where the argument stands.

        Args:
            method: of a class, not bound.
            name: of the parameter; where the method has none, every call lacks the argument.
        """
        names = list(inspect.signature(method).parameters)
        self.found = name in names
        self._name = name
        self._position = names.index(name) - 1 if self.found else -1  # self does not count

    def get(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The argument of a call, None where it is left out.

        Args:
            args: positional arguments, without self.
            kwargs: the others.
        """
        if self._name in kwargs:
            return kwargs[self._name]
        return args[self._position] if 0 <= self._position < len(args) else None

    def replace(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> tuple[Any, ...]:
        """Put another value in its place: into `kwargs`, or into the returned `args`."""
        if self._name in kwargs or not 0 <= self._position < len(args):
            kwargs[self._name] = value
            return args
        return (*args[: self._position], value, *args[self._position + 1 :])


@contextlib.contextmanager
def optional(lost: str) -> Iterator[None]:
    """Run something that serving can do without; what it raises is one line in the log.

    Args:
        lost: what users lose then.
    """
    try:
        yield
    except Exception as error:
        logger.error(
            "vllm-toptheta: this vLLM has moved a name (%s: %s); serving goes on, but %s. Install "
            "a tested vLLM or a newer vllm-toptheta.",
            type(error).__name__,
            error,
            lost,
        )


def can_wrap(owner: Any, methods: Mapping[str, str | None], lost: str) -> bool:
    """Whether the methods are there, with the parameter each wrap relies on, and not wrapped yet.

    Args:
        owner: the class.
        methods: parameter relied on by method name; None relies on none.
        lost: what users lose when a name has moved; logged.
    """
    if is_wrapped(owner):
        return False
    for name, parameter in methods.items():
        method = getattr(owner, name, None)
        if method is None or (parameter and parameter not in inspect.signature(method).parameters):
            logger.error(
                "vllm-toptheta: vLLM moved %s.%s%s; serving goes on, but %s. Install a tested vLLM "
                "or a newer vllm-toptheta.",
                owner.__name__,
                name,
                f"({parameter})" if parameter else "",
                lost,
            )
            return False
    return True
