"""The server's side of the carrier on a stand-in for vLLM's output processor."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_toptheta.request_options import RequestOptions, TargetK
from vllm_toptheta.telemetry import delivery
from vllm_toptheta.telemetry.counters import FIELDS
from vllm_toptheta.telemetry.delivery import CURRENT, Choice, Collector

pytest.importorskip("vllm", reason="needs an installed vLLM")


def row(rows: int) -> list[int]:
    return [rows] + [0] * (len(FIELDS) - 1)


class Processor:
    """Forgets a request when its output says that it is finished."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}
        self.processed: list[str] = []

    def add_request(self, request: Any, parent: Any = None, index: int = 0) -> None:
        self.request_states[request.request_id] = SimpleNamespace(
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
    delivery.install_on_output_processor(TargetK(128, 80))
    sink[0].processor = made()
    return sink[0]


def request(name: str, **xargs: Any) -> Any:
    return SimpleNamespace(request_id=name, sampling_params=SimpleNamespace(extra_args=xargs))


def output(name: str, new: int, total: int, last: bool = False, **more: Any) -> Any:
    content = {"engine": 0, "new": row(new), "total": row(total), **more}
    return SimpleNamespace(
        request_id=name, kv_transfer_params={"toptheta": content, "remote": 1}, last=last
    )


def test_choices_of_an_http_request_gather_in_its_collector(recorder: Recorder) -> None:
    processor = recorder.processor
    collector = Collector()
    token = CURRENT.set(collector)
    processor.add_request(request("a", toptheta_k=64), SimpleNamespace(), 0)
    processor.add_request(request("b", toptheta="off"), SimpleNamespace(), 1)
    CURRENT.reset(token)
    first = output("a", 3, 3)
    processor.process_outputs([first, output("b", 5, 5, last=True)])
    assert [(c.target, c.counts[0], c.finished) for c in collector.choices] == [
        (TargetK(64, 64), 3, False),
        (TargetK(None, None), 5, True),
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
    parent = SimpleNamespace()
    for index in (0, 1):
        processor.add_request(request(f"child{index}"), parent, index)
    single, first, second = output("single", 3, 3), output("child0", 1, 1), output("child1", 2, 2)
    processor.process_outputs([single, first, second])
    assert single.kv_transfer_params["toptheta"]["rows"] == 3
    assert "choices" not in single.kv_transfer_params["toptheta"]
    shown = second.kv_transfer_params["toptheta"]
    assert (shown["rows"], [c["rows"] for c in shown["choices"]]) == (3, [1, 2])


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
        return Choice("x", index, RequestOptions(), TargetK(128, None), counts=row(rows))

    shown = delivery.show_all([choice(0, 3), choice(1, 4)])
    assert shown is not None
    assert (shown["k"], shown["rows"]) == (128, 7)
    assert [(c["index"], c["rows"]) for c in shown["choices"]] == [(0, 3), (1, 4)]
    assert delivery.show_all([]) is None


def test_requests_show_the_k_of_the_engine_that_was_configured_last(recorder: Recorder) -> None:
    processor = recorder.processor
    process = type(processor).process_outputs
    delivery.install_on_output_processor(TargetK(None, 64))
    assert type(processor).process_outputs is process, "wrapped once"
    processor.add_request(request("a"))
    sent = output("a", 3, 3)
    sent.kv_transfer_params["toptheta"]["total"][FIELDS.index("prefill_rows")] = 9
    processor.process_outputs([sent])
    shown = sent.kv_transfer_params["toptheta"]
    assert (shown["k"], shown["prefill"]["k"]) == (None, 64)
