"""What the page and the log line show of the recent past: counts in, windows and short lists out.

Everything is bounded: a minute of per-second totals and the last requests. No prompt is kept.
"""

import asyncio
import logging
import time
from collections import deque
from typing import Any

from vllm_toptheta.telemetry.counters import (
    DENSE_REASONS,
    PREFILL,
    Counts,
    Named,
    add,
    by_name,
    kept_mass,
    ratio,
    target_ratio,
    zeros,
)
from vllm_toptheta.telemetry.delivery import Choice, Sink

LOG_EVERY_S = 10.0
SECONDS_KEPT = 120
REQUESTS_KEPT = 50

logger = logging.getLogger("vllm.toptheta")


class Live(Sink):
    """Recent counts of this server process."""

    def __init__(self, *, log: bool) -> None:
        """Start empty.

        Args:
            log: write a line every 10 s while there is traffic.
        """
        self.total = zeros()
        self._log = log
        self._seconds: deque[tuple[int, Counts]] = deque(maxlen=SECONDS_KEPT)
        self._requests: deque[dict[str, Any]] = deque(maxlen=REQUESTS_KEPT)
        self._since_log = zeros()
        self._timer: asyncio.TimerHandle | None = None

    def counted(self, engine: int, counts: Counts) -> None:
        second = int(time.time())
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append((second, zeros()))
        for into in (self.total, self._seconds[-1][1], self._since_log):
            add(into, counts)
        if self._log and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(LOG_EVERY_S, self._write_log)

    def finished(self, choice: Choice) -> None:
        shown = choice.show()
        shown.pop("layers", None)
        head = {
            "time": time.time(),
            "request_id": choice.request_id,
            "index": choice.index,
            "setting": choice.setting,
        }
        self._requests.appendleft(head | shown)

    def requests(self) -> list[dict[str, Any]]:
        """The last finished sequences, newest first."""
        return list(self._requests)

    def v_rows_per_second(self) -> list[dict[str, Any]]:
        """V rows read and skipped in each of the last seconds, and the kept mass, oldest first,
        idle ones included."""
        by_second, now = dict(self._seconds), int(time.time())
        return [
            {
                "second": second,
                "read": named["v_rows_read"],
                "saved": named["v_rows_scored"] - named["v_rows_read"],
                "kept_mass": kept_mass(named),
            }
            for second in range(now - 60, now)
            for named in [by_name(by_second.get(second, zeros()))]
        ]

    def _write_log(self) -> None:
        self._timer = None
        named = by_name(self._since_log)
        self._since_log = zeros()
        if named["rows"] or named["prefill_rows"]:
            logger.info("%s", describe(named))


def describe(named: Named) -> str:
    """One line about some counts; of either phase what there is."""

    def share(part: int, whole: int) -> str:
        return f"{ratio(part, whole) or 0:.1%}"

    def cost(phase: str = "") -> str:
        kept = share(named[f"{phase}keys_kept"], named[f"{phase}keys_scored"])
        return f"keys kept: {kept}, kept mass: {kept_mass(named, phase) or 0:.1%}"

    parts = []
    if named["rows"]:
        dense = sum(named[f"dense_{reason}"] for reason in DENSE_REASONS if reason != "prefill")
        target = target_ratio(named)
        parts.append(
            f"{named['rows']} decode rows in the last {LOG_EVERY_S:g} s, "
            f"V rows read: {share(named['v_rows_read'], named['v_rows_scored'])}, {cost()}, "
            f"lifted rows: {share(named['rows_lifted'], named['rows'])}, "
            f"dense rows: {share(dense, named['rows'])}"
            + ("" if target is None else f", kept/target: {target:.2f}")
        )
    if named["prefill_rows"]:
        parts.append(
            f"{named['prefill_rows']} prompt rows in the last {LOG_EVERY_S:g} s, "
            f"{cost(PREFILL)}, dense rows: {share(named['dense_prefill'], named['prefill_rows'])}"
        )
    return f"Top-theta: {'; '.join(parts)}"
