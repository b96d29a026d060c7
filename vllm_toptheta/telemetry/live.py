"""What the page and the log line show of the recent past: counts in, windows and short lists out.

Everything is bounded: a minute of per-second totals and the last requests. No prompt is kept.
"""

import asyncio
import logging
import time
from collections import deque
from typing import Any

from vllm_toptheta.telemetry.counters import FIELDS, Counts, add, ratio, zeros
from vllm_toptheta.telemetry.delivery import Choice

LOG_EVERY_S = 10.0
SECONDS_KEPT = 120
REQUESTS_KEPT = 50

logger = logging.getLogger("vllm.toptheta")


class Live:
    """Recent counts of this server process; a sink of `delivery.py`."""

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
        """See `delivery.Sink`."""
        second = int(time.time())
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append((second, zeros()))
        for into in (self.total, self._seconds[-1][1], self._since_log):
            add(into, counts)
        if self._log and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(LOG_EVERY_S, self._write_log)

    def layers_counted(self, engine: int, layers: list[Counts]) -> None:
        """See `delivery.Sink`."""

    def failed(self, engine: int, failures: dict[str, int]) -> None:
        """See `delivery.Sink`."""

    def finished(self, choice: Choice, engine: int) -> None:
        """See `delivery.Sink`."""
        shown = choice.show()
        shown.pop("layers", None)
        head = {
            "time": time.time(),
            "request_id": choice.request_id,
            "index": choice.index,
            "setting": choice.options.setting,
        }
        self._requests.appendleft(head | shown)

    def reported(self, counts: Counts) -> None:
        """See `delivery.Sink`."""

    def requests(self) -> list[dict[str, Any]]:
        """The last finished sequences, newest first."""
        return list(self._requests)

    def v_rows_per_second(self) -> list[dict[str, int]]:
        """V rows read and skipped in each of the last seconds, oldest first, idle ones included."""
        by_second = {
            second: dict(zip(FIELDS, counts, strict=True)) for second, counts in self._seconds
        }
        now = int(time.time())
        return [
            {
                "second": second,
                "read": named["v_rows_read"] if named else 0,
                "saved": named["v_rows_scored"] - named["v_rows_read"] if named else 0,
            }
            for second in range(now - 60, now)
            for named in [by_second.get(second)]
        ]

    def _write_log(self) -> None:
        self._timer = None
        named = dict(zip(FIELDS, self._since_log, strict=True))
        self._since_log = zeros()
        if named["rows"] or named["prefill_rows"]:
            logger.info("%s", describe(named))


def describe(named: dict[str, int]) -> str:
    """One line about some counts, by name; of either phase what there is."""

    def share(part: int, whole: int) -> str:
        return f"{ratio(part, whole) or 0:.1%}"

    parts = []
    if named["rows"]:
        dense = sum(named[f"dense_{reason}"] for reason in ("short", "window", "layer", "off"))
        target = ratio(named["keys_kept"] - named["keys_dense"], named["keys_target"])
        parts.append(
            f"{named['rows']} decode rows in the last {LOG_EVERY_S:g} s, "
            f"keys kept: {share(named['keys_kept'], named['keys_scored'])}, "
            f"V rows read: {share(named['v_rows_read'], named['v_rows_scored'])}, "
            f"dense rows: {share(dense, named['rows'])}, "
            f"kept/target: {'-' if target is None else f'{target:.2f}'}"
        )
    if named["prefill_rows"]:
        parts.append(
            f"{named['prefill_rows']} prompt rows in the last {LOG_EVERY_S:g} s, "
            f"keys kept: {share(named['prefill_keys_kept'], named['prefill_keys_scored'])}, "
            f"dense rows: {share(named['dense_prefill'], named['prefill_rows'])}"
        )
    return f"Top-theta: {'; '.join(parts)}"
