"""Checks before vLLM internals are wrapped: are the names still there, and not wrapped already?"""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("vllm.toptheta")

_MARK = "_toptheta_installed"


def mark_wrapped(owner: Any) -> None:
    """Remember that a class is wrapped."""
    setattr(owner, _MARK, True)


def is_wrapped(owner: Any) -> bool:
    """Whether a class is wrapped already."""
    return _MARK in vars(owner)


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
