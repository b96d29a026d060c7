"""Wraps of vLLM internals that survive a change of theirs: is the method still there, and not
wrapped already; where does an argument stand in a call; what goes on without a wrap."""

import contextlib
import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

logger = logging.getLogger("vllm.toptheta")

_Value = TypeVar("_Value")
_ours: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()


class Argument:
    """One argument of a method's calls, by position or by name.

    Wraps pass on whatever they are given and read what they need through this, so that a parameter
    that vLLM adds, moves or makes keyword-only changes nothing.
    """

    def __init__(self, method: Callable[..., Any], name: str) -> None:
        """Look up where the argument stands.

        Args:
            method: of a class, not bound.
            name: of the parameter; where the method has none, every call lacks the argument.
        """
        names = list(inspect.signature(method).parameters)
        self._name = name
        self._position = names.index(name) - 1 if name in names else -1  # self does not count

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


class Method:
    """A method of a class of vLLM's that a hook is going to wrap. Looking it up changes nothing.

    Attributes:
        original: what the class has now, not bound.
    """

    def __init__(self, owner: Any, name: str, *parameters: str) -> None:
        """Look a method up.

        Args:
            owner: the class.
            name: of a plain method or a class method.
            parameters: those that the wrap relies on.

        Raises:
            AttributeError: vLLM moved the method or a parameter.
        """
        self._owner, self._name = owner, name
        self._before = inspect.getattr_static(owner, name, None)
        self._of_class = isinstance(self._before, classmethod)
        self.original: Any = self._before.__func__ if self._of_class else self._before
        if not inspect.isfunction(self.original):
            raise AttributeError(f"{owner.__name__}.{name}")
        found = inspect.signature(self.original).parameters
        if moved := [parameter for parameter in parameters if parameter not in found]:
            raise AttributeError(f"{owner.__name__}.{name}({', '.join(moved)})")

    @property
    def is_wrapped(self) -> bool:
        """Whether a hook stands there already, be it below somebody else's."""
        inner = self.original
        while inner not in _ours and hasattr(inner, "__wrapped__"):
            inner = inner.__wrapped__
        return inner in _ours

    def argument(self, name: str) -> Argument:
        """One of its arguments."""
        return Argument(self.original, name)

    def by(self, replacement: Callable[..., Any]) -> "Method":
        """The same with what is to stand in its place, a function that calls `original`."""
        self._replacement = functools.update_wrapper(replacement, self.original)
        return self

    def wrap(self) -> None:
        """Change the class; does nothing where a hook stands there already."""
        if not self.is_wrapped:
            _ours.add(self._replacement)
            made = self._replacement
            setattr(self._owner, self._name, classmethod(made) if self._of_class else made)

    def unwrap(self) -> None:
        """Change it back."""
        if not self.is_wrapped:
            setattr(self._owner, self._name, self._before)


def check_fields(owner: str, present: Iterable[str], *names: str) -> None:
    """Raise AttributeError where a message or configuration of vLLM's has lost a field.

    Args:
        owner: what it is called.
        present: its fields.
        names: those that a hook relies on.
    """
    if missing := set(names) - set(present):
        raise AttributeError(f"{owner}.{' and '.join(sorted(missing))}")


class Beside(Generic[_Value]):
    """What a hook knows of objects of vLLM's: beside them, and gone with them."""

    def __init__(self) -> None:
        self._values: dict[int, _Value] = {}  # they need not be hashable

    def get(self, owner: Any) -> _Value | None:
        """What is known of an object."""
        return self._values.get(id(owner))

    def put(self, owner: Any, value: _Value) -> _Value:
        """Note something about an object, in place of what was known.

        Raises:
            TypeError: nobody can tell when the object is gone.
        """
        if id(owner) not in self._values:
            weakref.finalize(owner, self._values.pop, id(owner), None).atexit = False
        self._values[id(owner)] = value
        return value


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
