"""`OutputProcessor`: counts are taken out of engine outputs in the server process.

The wrap sees each engine output before outputs of one request are merged, so n > 1 and stop strings
(found in this process) are exact. Counts of a choice are gone with vLLM's own state of the request.
"""

from dataclasses import dataclass
from typing import Any

from vllm_toptheta.hooks.wrapping import Beside, Method, optional
from vllm_toptheta.requests import Resolved
from vllm_toptheta.telemetry.counters import Counts, add, zeros
from vllm_toptheta.telemetry.delivery import CURRENT, Choice, show_all, tell
from vllm_toptheta.telemetry.ledger import KEY
from vllm_toptheta.telemetry.shield import shielded

LOST = "responses and metrics show nothing of what was pruned"


@dataclass
class _Sequence:
    """What is known of a `RequestState`.

    Attributes:
        choice: its counts.
        in_output: whether its outputs carry them; those of HTTP requests do so in the response.
    """

    choice: Choice
    in_output: bool


_sequences: Beside[_Sequence] = Beside()
_choices: Beside[dict[int, Choice]] = Beside()
"""Outside of HTTP, of the `ParentRequest` of several sequences, by index."""


def install() -> None:
    """Make vLLM's output processor take counts out of engine outputs."""
    with optional(LOST):
        from vllm.v1.engine.output_processor import OutputProcessor

        add_request = Method(OutputProcessor, "add_request", "request")
        process = Method(OutputProcessor, "process_outputs", "engine_core_outputs")
        added = add_request.argument("request")
        arrived = process.argument("engine_core_outputs")

        def add_and_open(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = add_request.original(self, *args, **kwargs)
            with shielded("server"):
                _open(self, added.get(args, kwargs))
            return result

        def take_and_process(self: Any, *args: Any, **kwargs: Any) -> Any:
            touched: list[tuple[str, Choice]] = []
            with shielded("server"):
                rest = _take(self, arrived.get(args, kwargs), touched)
                args = arrived.replace(args, kwargs, rest)
            result = process.original(self, *args, **kwargs)
            with shielded("server"):
                for request_id, choice in touched:
                    if request_id not in self.request_states and not choice.finished:
                        choice.finished = True
                        tell("finished", choice)
            return result

        add_request.by(add_and_open).wrap()
        process.by(take_and_process).wrap()


def _open(processor: Any, request: Any) -> None:
    state = processor.request_states.get(request.request_id)
    if state is None or _sequences.get(state):
        return
    if (found := Resolved.read(request.sampling_params)) is None:
        return  # of another engine in this process, with another backend
    choice = Choice(
        state.external_req_id,
        state.request_index,
        found.setting,
        found.targets,
        report=found.report,
        adapter=getattr(state, "lora_name", None) or "",
    )
    collector = CURRENT.get()
    over_http = collector is not None and not collector.closed
    _sequences.put(state, _Sequence(choice, found.report and not over_http))
    if collector is not None and over_http:
        collector.choices.append(choice)
    elif (parent := state.parent_req) is not None:
        siblings = _choices.get(parent) or _choices.put(parent, {})
        siblings[state.request_index] = choice


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
        tell("counted", engine, counts)
    return rest


def _read(
    processor: Any, output: Any, content: dict[str, Any], touched: list[tuple[str, Choice]]
) -> None:
    params = {key: value for key, value in output.kv_transfer_params.items() if key != KEY}
    output.kv_transfer_params = params or None
    state = processor.request_states.get(output.request_id)
    sequence = _sequences.get(state)
    if sequence is None:
        return
    choice = sequence.choice
    choice.counts, choice.layers = content["total"], content.get("layers")
    choice.engine = content["engine"]
    touched.append((output.request_id, choice))
    if sequence.in_output:
        output.kv_transfer_params = {**params, KEY: _show_offline(state, choice)}


def _show_offline(state: Any, choice: Choice) -> dict[str, Any] | None:
    """What an output outside of HTTP carries; those of n > 1 sequences arrive as one."""
    by_index = None if state.parent_req is None else _choices.get(state.parent_req)
    if by_index is None:
        return choice.show()
    return show_all([by_index[index] for index in sorted(by_index)])


def _tell_engine(content: dict[str, Any]) -> None:
    engine = content["engine"]
    if layers := content.get("new_layers"):
        tell("layers_counted", engine, layers)
    if failures := content.get("failures"):
        tell("failed", engine, failures)
