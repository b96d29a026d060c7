"""The engine core's books: step counts of the worker in, what each output and client is told out.

Steps of one batch are booked together: when an output may be its request's last, when the batch
changes, and twice a second.

Every count is told exactly once as `new`, which the server adds to its metrics without keeping
state per request: all that came for a client's requests, with the next output that goes to it.
Where none is left to wait for (aborts, and steps that ran after a stop string was found), it goes
in a letter of its own.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_toptheta.kernels.columns import COLUMNS
from vllm_toptheta.telemetry.totals import Totals

KEY = "toptheta"
"""Of a step's record on vLLM's `ModelRunnerOutput`, and of the counts in `kv_transfer_params`."""

ENGINE_LETTER = "toptheta-engine"
"""Request id of letters that belong to no request."""

_LAYERS_EVERY_S = 1.0
_BOOK_EVERY_S = 0.5
_MAX_PENDING = 64
"""Steps, whose arrays are held until then."""


class Letter(NamedTuple):
    """Counts that have no output to travel with."""

    client: int
    request_id: str
    content: dict[str, Any]


@dataclass
class _Account:
    """Of a request; `total` is a row of the ledger's batch, or of one before it."""

    client: int
    total: NDArray[np.int64]
    layers: NDArray[np.int64] | None = None


class Ledger:
    """Accounts of all requests in the engine.

    Args:
        engine: index of the engine core, a label of the metrics.
    """

    def __init__(self, engine: int) -> None:
        self._engine = engine
        self._accounts: dict[str, _Account] = {}
        self._batch: list[str] = []
        self._totals = np.zeros((0, len(COLUMNS)), dtype=np.int64)
        self._rows_of_client: dict[int, list[int]] = {}
        self._new: dict[int, NDArray[np.int64]] = {}
        self._layers: NDArray[np.int64] | None = None
        self._pending: list[Totals] = []
        self._booked = 0.0
        self._failures = {"worker": 0, "engine": 0}
        self._layers_told = 0.0

    @property
    def waits(self) -> bool:
        """Whether steps wait to be booked."""
        return bool(self._pending)

    def add(self, totals: Totals, client_of: Callable[[str], int | None]) -> None:
        """Take in one step.

        Args:
            totals: from the worker.
            client_of: the client of a request that is in the engine; None for others.
        """
        self._failures["worker"] += totals.failures
        if not totals.request_ids:
            return
        if not (self._pending and totals.follows(self._pending[-1])):
            self.book()
            self._turn_to(totals.request_ids, client_of)
        self._pending.append(totals)
        since = time.monotonic() - self._booked
        if since >= _BOOK_EVERY_S or len(self._pending) == _MAX_PENDING:
            self.book()

    def book(self) -> None:
        """Book the steps that wait."""
        if not self._pending:
            return
        (first, *others), self._pending = self._pending, []
        self._booked = time.monotonic()
        record = first.together(others)
        self._totals += record.requests
        for client, rows in self._rows_of_client.items():
            new = record.requests[rows].sum(0)
            self._new[client] = new + self._new.get(client, 0)
        for request_id, detail in record.detail.items():
            account = self._accounts[request_id]
            account.layers = detail + (0 if account.layers is None else account.layers)
        self._layers = record.layers + (0 if self._layers is None else self._layers)

    def _turn_to(self, batch: list[str], client_of: Callable[[str], int | None]) -> None:
        """Bring the totals of these requests together, so that a step is one addition; most steps
        find them so."""
        accounts = self._accounts
        if batch == self._batch and all(map(accounts.__contains__, batch)):
            return
        for request_id in batch:
            if request_id not in accounts:
                zeros = np.zeros(len(COLUMNS), dtype=np.int64)
                accounts[request_id] = _Account(client_of(request_id) or 0, zeros)
        found = [accounts[request_id] for request_id in batch]
        self._batch, self._totals = batch, np.array([account.total for account in found])
        self._rows_of_client = {}
        for row, account in enumerate(found):
            account.total = self._totals[row]
            self._rows_of_client.setdefault(account.client, []).append(row)

    def note_failures(self, count: int) -> None:
        """Book telemetry failures of this process."""
        self._failures["engine"] += count

    def tell(self, request_id: str, *, last: bool = True) -> dict[str, Any] | None:
        """What an output of a request carries; None where nothing was counted.

        Args:
            request_id: the request.
            last: whether it may be its last one; others carry only what is new.
        """
        self.book()
        account = self._accounts.get(request_id)
        if account is None:
            return None
        new = self._new.pop(account.client, None)
        if new is None and not last:
            return None
        content: dict[str, Any] = {"engine": self._engine, "total": account.total.tolist()}
        if new is not None:
            content["new"] = new.tolist()
        if account.layers is not None:
            content["layers"] = account.layers.tolist()
        return content

    def close(self, is_live: Callable[[str], bool]) -> list[Letter]:
        """Drop requests that left, and hand out the letters of this step.

        Args:
            is_live: whether a request is still in the engine.
        """
        self.book()
        for request_id in [name for name in self._accounts if not is_live(name)]:
            del self._accounts[request_id]
        letters = []
        if self._new:
            waiting = {account.client for account in self._accounts.values()}
            for client in self._new.keys() - waiting:
                new = {"engine": self._engine, "new": self._new.pop(client).tolist()}
                letters.append(Letter(client, ENGINE_LETTER, new))
        if (content := self._engine_content()) is not None:
            letters.append(Letter(0, ENGINE_LETTER, content))
        return letters

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
