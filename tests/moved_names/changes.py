"""How a name of vLLM's may change, and what is to be seen of it."""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")


import vllm_toptheta  # noqa: E402
from vllm_toptheta.requests import (  # noqa: E402
    RequestPolicy,
    Target,
    Targets,
)

vllm_toptheta.register()

POLICY = RequestPolicy(
    Targets(Target(0.001), None), {"min_prob": (1e-6, 0.1), "k": (16.0, 64.0)}, allow_off=True
)
Change = Callable[[type], None]


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def more_parameters(name: str) -> Change:
    """The method gets a keyword, which its callers use."""

    def change(owner: type) -> None:
        old = getattr(owner, name)

        def changed(self: Any, *args: Any, new: int, **kwargs: Any) -> Any:
            return old(self, *args, **kwargs)

        signature = inspect.signature(old)
        added = inspect.Parameter("new", inspect.Parameter.KEYWORD_ONLY)
        parameters = [*signature.parameters.values(), added]
        vars(changed)["__signature__"] = signature.replace(parameters=parameters)
        setattr(owner, name, changed)

    return change


def without(name: str) -> Change:
    return lambda owner: setattr(owner, name, None) or delattr(owner, name)


def renamed_parameter(name: str) -> Change:
    def change(owner: type) -> None:
        old = getattr(owner, name)
        setattr(owner, name, lambda self, *moved: old(self, *moved))

    return change


def call(method: Any, *args: Any, **kwargs: Any) -> Any:
    """As vLLM calls its own method: with the new keyword, where there is one."""
    if "new" in inspect.signature(method).parameters:
        kwargs["new"] = 1
    return method(*args, **kwargs)


def copy_of(owner: type) -> type:
    """Another class of the same, to be changed and wrapped."""
    own = {name: value for name, value in vars(owner).items() if name not in _OF_EVERY_CLASS}
    return type(owner.__name__, (), own)


_OF_EVERY_CLASS = ("__dict__", "__weakref__")


def assert_left_alone(
    owner: type, change: Change, install: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    """A class that changed is not wrapped, and the log says so once."""
    change(owner)
    before = dict(vars(owner))
    install()
    assert dict(vars(owner)) == before
    assert len(errors(caplog)) == 1
