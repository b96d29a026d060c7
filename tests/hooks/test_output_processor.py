"""The server's side of counts on a stand-in for vLLM's output processor."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_toptheta.hooks import output_processor
from vllm_toptheta.kernels.columns import COLUMNS
from vllm_toptheta.requests import Resolved, Target, Targets
from vllm_toptheta.telemetry import delivery
from vllm_toptheta.telemetry.delivery import CURRENT, Choice, Collector

pytest.importorskip("vllm", reason="needs an installed vLLM")


SERVER = Targets(Target(0.001, 0.5), Target(0.001))


def row(rows: int) -> list[int]:
    return [rows] + [0] * (len(COLUMNS) - 1)


class State:
    """vLLM's of a request, or of several sequences; also gone with the last who holds it."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class Processor:
    """Forgets a request when its output says that it is finished."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}
        self.processed: list[str] = []

    def add_request(self, request: Any, parent: Any = None, index: int = 0) -> None:
        self.request_states[request.request_id] = State(
            external_req_id=f"x-{request.request_id}", parent_req=parent, request_index=index
        )

    def process_outputs(self, engine_core_outputs: list[Any]) -> None:
        for output in engine_core_outputs:
            self.processed.append(output.request_id)
            if getattr(output, "last", False):
                self.request_states.pop(output.request_id, None)


class Recorder:
    """A sink that writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def __getattr__(self, event: str) -> Any:
        return lambda *values: self.told.append((event, *values))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    import vllm.v1.engine.output_processor as module

    made = type("OutputProcessor", (Processor,), dict(vars(Processor)))
    monkeypatch.setattr(module, "OutputProcessor", made)
    monkeypatch.setattr(delivery, "_sinks", sink := [Recorder()])
    output_processor.install()
    sink[0].processor = made()
    return sink[0]


def request(
    name: str, setting: str = "default", targets: Targets | None = SERVER, report: bool = True
) -> Any:
    """A request as the input processor hands it on; without targets it is another backend's."""
    params = SimpleNamespace(extra_args=None)
    if targets is not None:
        Resolved(setting, targets, report=report).write(params)
    return SimpleNamespace(request_id=name, sampling_params=params)


def output(name: str, new: int, total: int, last: bool = False, **more: Any) -> Any:
    content = {"engine": 0, "new": row(new), "total": row(total), **more}
    return SimpleNamespace(
        request_id=name, kv_transfer_params={"toptheta": content, "remote": 1}, last=last
    )


def test_choices_of_an_http_request_gather_in_its_collector(recorder: Recorder) -> None:
    processor = recorder.processor
    collector = Collector()
    token = CURRENT.set(collector)
    own = Targets(Target(None, 0.5, k=64), None)
    child = request("a", "k", own)
    processor.add_request(child, State(), 0)
    processor.add_request(request("b", "off", Targets(None, None)))
    CURRENT.reset(token)
    first = output("a", 3, 3)
    processor.process_outputs([first, output("b", 5, 5, last=True)])
    assert [(c.setting, c.targets, c.counts[0], c.finished) for c in collector.choices] == [
        ("k", own, 3, False),
        ("off", Targets(None, None), 5, True),
    ]
    assert first.kv_transfer_params == {"remote": 1}, "it appears once in the response"
    events = [event for event, *_ in recorder.told]
    assert events == ["counted", "finished"], "counts are told once a step"
    assert recorder.told[0][2][0] == 8


def test_what_runs_after_a_stop_string_is_in_the_metrics_only(recorder: Recorder) -> None:
    processor = recorder.processor
    collector = Collector()
    token = CURRENT.set(collector)
    processor.add_request(request("a"))
    CURRENT.reset(token)
    processor.process_outputs([output("a", 3, 3, last=True)])
    processor.process_outputs([output("a", 2, 5)])
    processor.process_outputs([output("a", 1, 6, letter=True)])
    assert collector.choices[0].counts[0] == 3
    assert [values[1][0] for event, *values in recorder.told if event == "counted"] == [3, 2, 1]
    assert [event for event, *_ in recorder.told].count("finished") == 1
    assert processor.processed == ["a", "a"], "letters are not for vLLM"


def test_outside_of_http_outputs_carry_the_object(recorder: Recorder) -> None:
    processor = recorder.processor
    processor.add_request(request("single"))
    children = [request("child0"), request("child1")]
    parent = State()
    for index, child in enumerate(children):
        processor.add_request(child, parent, index)
    single, first, second = output("single", 3, 3), output("child0", 1, 1), output("child1", 2, 2)
    processor.process_outputs([single, first, second])
    assert single.kv_transfer_params["toptheta"]["rows"] == 3
    assert "choices" not in single.kv_transfer_params["toptheta"]
    shown = second.kv_transfer_params["toptheta"]
    assert (shown["rows"], [c["rows"] for c in shown["choices"]]) == (3, [1, 2])


def test_counts_that_are_left_out_are_in_the_metrics(recorder: Recorder) -> None:
    processor = recorder.processor
    token = CURRENT.set(collector := Collector())
    processor.add_request(request("a", report=False))
    CURRENT.reset(token)
    processor.add_request(request("b", report=False))
    processor.add_request(request("child", report=False), State(), 0)
    outputs = [output(name, 3, 3, last=True) for name in ("a", "b", "child")]
    outputs[1].kv_transfer_params.pop("remote")
    processor.process_outputs(outputs)
    assert [sent.kv_transfer_params for sent in outputs] == [{"remote": 1}, None, {"remote": 1}]
    assert not collector.choices[0].report
    events = [event for event, *_ in recorder.told]
    assert events == ["counted", "finished", "finished", "finished"]
    assert recorder.told[0][2][0] == 9


def test_a_failing_sink_keeps_nothing_from_the_others(recorder: Recorder) -> None:
    processor = recorder.processor
    delivery._sinks.insert(0, SimpleNamespace())  # type: ignore[arg-type]
    processor.add_request(request("a"))
    sent = output("a", 3, 3)
    processor.process_outputs([sent, SimpleNamespace(request_id="b", kv_transfer_params=None)])
    assert processor.processed == ["a", "b"]
    assert [event for event, *_ in recorder.told] == ["counted"]
    assert sent.kv_transfer_params["toptheta"]["rows"] == 3


def test_several_choices_are_added_up() -> None:
    def choice(index: int, rows: int) -> Choice:
        return Choice("x", index, "default", SERVER, counts=row(rows))

    shown = delivery.show_all([choice(0, 3), choice(1, 4)])
    assert shown is not None
    assert (shown["min_prob"], shown["rows"]) == (0.001, 7)
    assert [(c["index"], c["rows"]) for c in shown["choices"]] == [(0, 3), (1, 4)]
    assert delivery.show_all([]) is None


def test_engines_of_one_process_keep_apart(recorder: Recorder) -> None:
    first = recorder.processor
    process = type(first).process_outputs
    output_processor.install()
    assert type(first).process_outputs is process, "wrapped once"
    second, other = type(first)(), type(first)()
    shown = {}
    for processor, targets in (
        (first, SERVER),
        (second, Targets(None, Target(0.02))),
        (other, None),
    ):
        processor.add_request(request("a", targets=targets))
        sent = output("a", 3, 3)
        sent.kv_transfer_params["toptheta"]["total"][COLUMNS.index("prefill_rows")] = 9
        shown[processor] = sent
    for processor, sent in shown.items():
        processor.process_outputs([sent])
    first_shown, second_shown = (shown[p].kv_transfer_params["toptheta"] for p in (first, second))
    assert (first_shown["min_prob"], first_shown["prefill"]["min_prob"]) == (0.001, 0.001)
    assert (second_shown["min_prob"], second_shown["prefill"]["min_prob"]) == (None, 0.02)
    assert shown[other].kv_transfer_params == {"remote": 1}, "another backend's"


def test_a_collector_that_outlives_its_request_holds_nothing(recorder: Recorder) -> None:
    """vLLM's loop over outputs, and responses in the background, keep the context of a request."""
    processor = recorder.processor
    token = CURRENT.set(collector := Collector())
    processor.add_request(request("a"))
    collector.close()
    processor.add_request(request("b"))
    CURRENT.reset(token)
    assert collector.choices == []
    sent = output("b", 3, 3)
    processor.process_outputs([sent])
    assert sent.kv_transfer_params["toptheta"]["rows"] == 3, "shown where nobody collects"


def test_beams_are_added_up_and_not_listed() -> None:
    beams = [
        Choice(f"chatcmpl-x-{step}-beam-{beam}", 0, "default", SERVER, counts=row(1))
        for step in range(9)
        for beam in range(4)
    ]
    shown = delivery.show_all(beams)
    assert shown is not None
    assert shown["rows"] == 36
    assert "choices" not in shown


def test_what_is_reported_belongs_to_the_engine_that_ran_it(recorder: Recorder) -> None:
    token = CURRENT.set(collector := Collector())
    recorder.processor.add_request(request("a"))
    CURRENT.reset(token)
    recorder.processor.process_outputs([output("a", 3, 3, engine=2)])
    delivery.report(collector.choices)
    assert recorder.told[-1][:2] == ("reported", 2)
