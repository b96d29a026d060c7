"""Keeps serving alive when telemetry fails: an exception in, a count and one log line out."""

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("vllm.toptheta")

listeners: list[Callable[[str], None]] = []
"""Called with the place of every failure of this process, in the process that has the metrics."""

_failures: Counter[str] = Counter()
_logged: set[str] = set()


class _Shield:
    """Of one place. A class, and one for all uses, because outputs enter it by the hundred a step:
    a generator takes several times as long."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: Any) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        place = self._place
        _failures[place] += 1
        for listener in listeners:
            with contextlib.suppress(Exception):  # it would end what the shield is there for
                listener(place)
        if place not in _logged:
            _logged.add(place)
            logger.error(
                "vllm-toptheta: telemetry failed in the %s process; serving goes on, counts are "
                "incomplete. Further failures are only counted, in "
                "vllm_toptheta_telemetry_errors_total",
                place,
                exc_info=error,
            )
        return True


@functools.cache
def shielded(place: str) -> _Shield:
    """To run a piece of telemetry in; whatever it raises is counted, and logged the first time.

    Args:
        place: "worker", "engine" or "server", where the piece runs.
    """
    return _Shield(place)


def take_failures(place: str) -> int:
    """Failures since the last call, for processes that tell them to another one."""
    return _failures.pop(place, 0)
