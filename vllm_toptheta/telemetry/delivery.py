"""Counts in the server process: of every choice of an HTTP request, and where they go.

An HTTP request finds its choices through a context variable, which reaches every task that serves
it; request ids, which clients may choose and repeat, play no part.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm_toptheta.requests import Targets
from vllm_toptheta.telemetry.counters import Counts, add, summarise, summarise_layers, zeros
from vllm_toptheta.telemetry.shield import shielded


@dataclass
class Choice:
    """One generated sequence.

    Attributes:
        request_id: as given to the engine; ends in "-<number of the prompt>" for completions.
        index: which of the n sequences of its prompt.
        setting: the class of the request, a label of the metrics.
        targets: what its rows run with.
        counts: so far, columns as in COLUMNS.
        layers: the same for each layer, where the request asked for it.
        finished: whether the last token has been seen.
        engine: index of the engine core it runs in.
        report: whether the response carries the counts.
        adapter: name of the LoRA adapter, "" without one.
    """

    request_id: str
    index: int
    setting: str
    targets: Targets
    counts: Counts = field(default_factory=zeros)
    layers: list[Counts] | None = None
    finished: bool = False
    engine: int = 0
    report: bool = True
    adapter: str = ""

    def show(self) -> dict[str, Any]:
        """The object a response carries."""
        shown = summarise(self.targets, self.counts)
        if self.layers is not None:
            shown["layers"] = summarise_layers(self.layers)
        return shown


def show_all(choices: list[Choice]) -> dict[str, Any] | None:
    """The object of a response with these choices: totals, and one entry per choice if several.

    Beam search makes a sequence per beam and token, none of which is a choice of the response: it
    has totals only.

    Args:
        choices: in the order of the response.
    """
    if len(choices) <= 1:
        return choices[0].show() if choices else None
    total = zeros()
    for choice in choices:
        add(total, choice.counts)
    shown = summarise(choices[0].targets, total)
    if _BEAM in choices[0].request_id:
        return shown
    entries = [{"index": index, **choice.show()} for index, choice in enumerate(choices)]
    return {**shown, "choices": entries}


@dataclass
class Collector:
    """The choices of one HTTP request, in the order in which they reached the engine.

    Tasks that outlive the request keep it for good, as the loop does that the first request of an
    engine starts; so it is closed, and holds nothing, when the response is out.
    """

    choices: list[Choice] = field(default_factory=list)
    closed: bool = False

    def close(self) -> None:
        """Let go of the choices, and take no more."""
        self.choices, self.closed = [], True


CURRENT: ContextVar[Collector | None] = ContextVar("toptheta_collector", default=None)
"""The HTTP request that is being served."""


class Sink:
    """Where counts go; takes what it has a method for, and ignores the rest."""

    def counted(self, engine: int, counts: Counts) -> None:
        """New counts of a request, told once."""

    def layers_counted(self, engine: int, layers: list[Counts]) -> None:
        """New counts of each layer, told once."""

    def failed(self, engine: int, failures: dict[str, int]) -> None:
        """Telemetry failures in the engine's processes."""

    def finished(self, choice: Choice) -> None:
        """A sequence has its last token."""

    def reported(self, engine: int, counts: Counts) -> None:
        """Counts were put into a response."""


_sinks: list[Sink] = []
_BEAM = "-beam-"


def add_sink(sink: Sink) -> None:
    """Send all further counts of this process to a sink."""
    _sinks.append(sink)


def report(choices: list[Choice]) -> None:
    """Note that the counts of these choices are in a response now."""
    for choice in choices:
        tell("reported", choice.engine, choice.counts)


def tell(event: str, *values: Any) -> None:
    """Tell every sink; one that fails keeps nothing from the others."""
    for sink in _sinks:
        with shielded("server"):
            getattr(sink, event)(*values)
