"""The engine core's books: step counts of the worker in, what each output and client is told out.

Every count is told exactly once as `new`, which the server adds to its metrics without keeping
state per request. Counts of requests that vanish (aborts, and steps that ran after a stop string
was found) are told in letters of their own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta.telemetry.counters import Counts, add, zeros

ENGINE_LETTER = "toptheta-engine"
"""Request id of letters that belong to no request."""

_LAYERS_EVERY_S = 1.0


@dataclass
class StepRecord:
    """What a worker tells about one engine step.

    Attributes:
        request_ids: requests of the batch.
        requests: counts of each.
        layers: [num_layers, len(FIELDS)] counts of each layer, all requests together; None in a
            record without counts. An array, because it is added up every step and told once a
            second.
        detail: counts of each layer, of requests that asked for them.
        failures: telemetry failures in the worker since the last record.
    """

    request_ids: list[str]
    requests: list[Counts]
    layers: NDArray[np.int64] | None
    detail: dict[str, list[Counts]]
    failures: int = 0


class Letter(NamedTuple):
    """Counts that have no output to travel with."""

    client: int
    request_id: str
    content: dict[str, Any]


@dataclass
class _Account:
    client: int
    total: Counts = field(default_factory=zeros)
    new: Counts = field(default_factory=zeros)
    layers: list[Counts] | None = None


class Ledger:
    """Accounts of all requests in the engine.

    Args:
        engine: index of the engine core, a label of the metrics.
    """

    def __init__(self, engine: int) -> None:
        self._engine = engine
        self._accounts: dict[str, _Account] = {}
        self._layers: NDArray[np.int64] | None = None
        self._failures = {"worker": 0, "engine": 0}
        self._layers_told = 0.0

    def add(self, record: StepRecord, client_of: Callable[[str], int | None]) -> None:
        """Book one step.

        Args:
            record: from the worker.
            client_of: the client of a request that is in the engine; None for others.
        """
        for request_id, counts in zip(record.request_ids, record.requests, strict=True):
            account = self._accounts.get(request_id)
            if account is None:
                account = self._accounts[request_id] = _Account(client_of(request_id) or 0)
            add(account.total, counts)
            add(account.new, counts)
            if (detail := record.detail.get(request_id)) is not None:
                account.layers = account.layers or [zeros() for _ in detail]
                for into, more in zip(account.layers, detail, strict=True):
                    add(into, more)
        if record.layers is not None:
            self._layers = record.layers + (0 if self._layers is None else self._layers)
        self._failures["worker"] += record.failures

    def note_failures(self, count: int) -> None:
        """Book telemetry failures of this process."""
        self._failures["engine"] += count

    def tell(self, request_id: str) -> dict[str, Any] | None:
        """What an output of a request carries; None where nothing was counted."""
        account = self._accounts.get(request_id)
        return None if account is None else self._content(account)

    def close(self, is_live: Callable[[str], bool]) -> list[Letter]:
        """Drop requests that left, and hand out the letters of this step.

        Args:
            is_live: whether a request is still in the engine.
        """
        letters = []
        for request_id in [name for name in self._accounts if not is_live(name)]:
            account = self._accounts.pop(request_id)
            if any(account.new):
                letters.append(Letter(account.client, request_id, self._content(account)))
        if (content := self._engine_content()) is not None:
            letters.append(Letter(0, ENGINE_LETTER, content))
        return letters

    def _content(self, account: _Account) -> dict[str, Any]:
        content: dict[str, Any] = {
            "engine": self._engine,
            "total": list(account.total),
            "new": account.new,
        }
        if account.layers is not None:
            content["layers"] = [list(counts) for counts in account.layers]
        account.new = zeros()
        return content

    def _engine_content(self) -> dict[str, Any] | None:
        """Counts per layer, once a second and when the engine runs empty; failures at once."""
        now = time.monotonic()
        due = not self._accounts or now - self._layers_told >= _LAYERS_EVERY_S
        layers = self._layers if due else None
        failures = {place: count for place, count in self._failures.items() if count}
        if layers is None and not failures:
            return None
        if layers is not None:
            self._layers, self._layers_told = None, now
        self._failures = dict.fromkeys(self._failures, 0)
        new_layers = [] if layers is None else layers.tolist()
        return {"engine": self._engine, "new_layers": new_layers, "failures": failures}
