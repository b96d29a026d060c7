"""Keeps serving alive when telemetry fails: an exception in, a count and one log line out."""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator

logger = logging.getLogger("vllm.toptheta")

listeners: list[Callable[[str], None]] = []
"""Called with the place of every failure of this process, in the process that has the metrics."""

_failures: Counter[str] = Counter()
_logged: set[str] = set()


@contextlib.contextmanager
def shielded(place: str) -> Iterator[None]:
    """Run a piece of telemetry; whatever it raises is counted, and logged the first time.

    Args:
        place: "worker", "engine" or "server", where the piece runs.
    """
    try:
        yield
    except Exception:
        _failures[place] += 1
        for listener in listeners:
            with contextlib.suppress(Exception):  # it would end what the shield is there for
                listener(place)
        if place not in _logged:
            _logged.add(place)
            logger.exception(
                "vllm-toptheta: telemetry failed in the %s process; serving goes on, counts are "
                "incomplete. Further failures are only counted, in "
                "vllm_toptheta_telemetry_errors_total",
                place,
            )


def take_failures(place: str) -> int:
    """Failures since the last call, for processes that tell them to another one."""
    return _failures.pop(place, 0)
