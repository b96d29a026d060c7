"""Takes counts out of engine outputs in the server process: a wrap on vLLM's output processor in;
metrics, and the counts of every choice of an HTTP request, out.

The wrap sees each engine output before outputs of one request are merged, so n > 1 and stop strings
(found in this process) are exact. Counts of a choice hang on vLLM's own state of the request and
are gone with it. An HTTP request finds its choices through a context variable, which reaches every
task that serves it; request ids, which clients may choose and repeat, play no part.
"""

import functools
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm_toptheta.request_options import Targets
from vllm_toptheta.telemetry.carrier import KEY
from vllm_toptheta.telemetry.counters import (
    Counts,
    add,
    summarise,
    summarise_layers,
    zeros,
)
from vllm_toptheta.telemetry.shield import shielded
from vllm_toptheta.telemetry.wrapping import Argument, can_wrap, mark_wrapped, optional


@dataclass
class Choice:
    """One generated sequence.

    Attributes:
        request_id: as given to the engine; ends in "-<number of the prompt>" for completions.
        index: which of the n sequences of its prompt.
        setting: the class of the request, a label of the metrics.
        targets: what its rows run with.
        counts: so far, columns as in FIELDS.
        layers: the same for each layer, where the request asked for it.
        finished: whether the last token has been seen.
        engine: index of the engine core it runs in.
    """

    request_id: str
    index: int
    setting: str
    targets: Targets
    counts: Counts = field(default_factory=zeros)
    layers: list[Counts] | None = None
    finished: bool = False
    engine: int = 0

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
_ATTRIBUTE, _OVER_HTTP, _CHOICES = "toptheta_choice", "toptheta_over_http", "toptheta_choices"
_RESOLVED = "toptheta_resolved"
_BEAM = "-beam-"


def add_sink(sink: Sink) -> None:
    """Send all further counts of this process to a sink."""
    _sinks.append(sink)


def report(choices: list[Choice]) -> None:
    """Note that the counts of these choices are in a response now."""
    for choice in choices:
        _tell("reported", choice.engine, choice.counts)


def resolve(request: Any, setting: str, targets: Targets) -> None:
    """Note what a request runs with, for its choices; processes have several engines.

    Args:
        request: vLLM's `EngineCoreRequest`, before it is given to the output processor.
        setting: the class of the request.
        targets: what its rows run with.
    """
    if request.sampling_params is not None:
        vars(request.sampling_params)[_RESOLVED] = (setting, targets)


def install_on_output_processor() -> None:
    """Make vLLM's output processor take counts out of engine outputs; does nothing the second
    time."""
    lost = "responses and metrics show nothing of what was pruned"
    methods = {"add_request": "request", "process_outputs": "engine_core_outputs"}
    with optional(lost):
        from vllm.v1.engine.output_processor import OutputProcessor

        if can_wrap(OutputProcessor, methods, lost):
            _wrap_output_processor(OutputProcessor)


def _wrap_output_processor(processor_class: Any) -> None:
    add_request, process_outputs = processor_class.add_request, processor_class.process_outputs
    added = Argument(add_request, "request")
    arrived = Argument(process_outputs, "engine_core_outputs")

    @functools.wraps(add_request)
    def add_and_open(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = add_request(self, *args, **kwargs)
        with shielded("server"):
            _open(self, added.get(args, kwargs))
        return result

    @functools.wraps(process_outputs)
    def take_and_process(self: Any, *args: Any, **kwargs: Any) -> Any:
        touched: list[tuple[str, Choice]] = []
        with shielded("server"):
            rest = _take(self, arrived.get(args, kwargs), touched)
            args = arrived.replace(args, kwargs, rest)
        result = process_outputs(self, *args, **kwargs)
        with shielded("server"):
            for request_id, choice in touched:
                if request_id not in self.request_states and not choice.finished:
                    choice.finished = True
                    _tell("finished", choice)
        return result

    processor_class.add_request = add_and_open
    processor_class.process_outputs = take_and_process
    mark_wrapped(processor_class)


def _open(processor: Any, request: Any) -> None:
    state = processor.request_states.get(request.request_id)
    if state is None or hasattr(state, _ATTRIBUTE) or request.sampling_params is None:
        return
    # Those of a sequence among n are a copy, without what was noted.
    params = (state.parent_req or request).sampling_params
    if (resolved := vars(params).get(_RESOLVED)) is None:
        return  # of another engine in this process, with another backend
    choice = Choice(state.external_req_id, state.request_index, *resolved)
    setattr(state, _ATTRIBUTE, choice)
    collector = CURRENT.get()
    if collector is not None and not collector.closed:
        collector.choices.append(choice)
        setattr(state, _OVER_HTTP, True)
    elif state.parent_req is not None:
        vars(state.parent_req).setdefault(_CHOICES, {})[state.request_index] = choice


def _take(processor: Any, outputs: list[Any], touched: list[tuple[str, Choice]]) -> list[Any]:
    """Read the counts of every output; letters are taken out of the list."""
    rest = []
    new: dict[int, Counts] = {}
    for output in outputs:
        content = (output.kv_transfer_params or {}).get(KEY)
        if content is None:
            rest.append(output)
            continue
        with shielded("server"):
            _tell_engine(content)
            if "new" in content:
                # Sinks are told once a step, not once an output.
                add(new.setdefault(content["engine"], zeros()), content["new"])
        if content.get("letter"):
            continue
        rest.append(output)
        with shielded("server"):
            _read(processor, output, content, touched)
    for engine, counts in new.items():
        _tell("counted", engine, counts)
    return rest


def _read(
    processor: Any, output: Any, content: dict[str, Any], touched: list[tuple[str, Choice]]
) -> None:
    params = {key: value for key, value in output.kv_transfer_params.items() if key != KEY}
    output.kv_transfer_params = params or None
    state = processor.request_states.get(output.request_id)
    choice: Choice | None = getattr(state, _ATTRIBUTE, None)
    if state is None or choice is None:
        return
    choice.counts, choice.layers = content["total"], content.get("layers")
    choice.engine = content["engine"]
    touched.append((output.request_id, choice))
    if not hasattr(state, _OVER_HTTP):
        output.kv_transfer_params = {**params, KEY: _show_offline(state, choice)}


def _show_offline(state: Any, choice: Choice) -> dict[str, Any] | None:
    """What an output outside of HTTP carries; those of n > 1 sequences arrive as one."""
    if state.parent_req is None:
        return choice.show()
    by_index: dict[int, Choice] = vars(state.parent_req)[_CHOICES]
    return show_all([by_index[index] for index in sorted(by_index)])


def _tell_engine(content: dict[str, Any]) -> None:
    engine = content["engine"]
    if layers := content.get("new_layers"):
        _tell("layers_counted", engine, layers)
    if failures := content.get("failures"):
        _tell("failed", engine, failures)


def _tell(event: str, *values: Any) -> None:
    """Tell every sink; one that fails keeps nothing from the others."""
    for sink in _sinks:
        with shielded("server"):
            getattr(sink, event)(*values)
