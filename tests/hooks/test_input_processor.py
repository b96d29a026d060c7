"""Request intake of several engines in one process, on a stand-in for vLLM's input processor."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

from vllm_toptheta.config import TopThetaConfig  # noqa: E402
from vllm_toptheta.hooks import input_processor  # noqa: E402
from vllm_toptheta.requests import RequestPolicy, Resolved, Target, Targets  # noqa: E402
from vllm_toptheta.serving import served as served_module  # noqa: E402
from vllm_toptheta.serving.served import Served, set_served  # noqa: E402

RANGES = {"min_prob": (1e-6, 0.1), "min_mass": (0.0, 0.95)}


class InputProcessor:
    def __init__(self, instance_id: str) -> None:
        self.vllm_config = SimpleNamespace(instance_id=instance_id)

    def process_inputs(self, request_id: str, prompt: str, params: Any) -> Any:
        return SimpleNamespace(sampling_params=params, cache_salt=None)


@pytest.fixture(autouse=True)
def two_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.v1.engine.input_processor as module

    made = type("InputProcessor", (InputProcessor,), dict(vars(InputProcessor)))
    monkeypatch.setattr(module, "InputProcessor", made)
    monkeypatch.setattr(served_module, "_served", {})
    for name, min_prob in (("first", 0.001), ("second", 0.01)):
        policy = RequestPolicy(Targets(Target(min_prob), None), RANGES, allow_off=True)
        nothing: Any = None
        set_served(Served(name, TopThetaConfig(), policy, nothing, None, None, None), name)
    input_processor.install()


def ask(engine: str, **xargs: Any) -> tuple[Any, Any]:
    """What a request runs with in an engine, and its salt."""
    import vllm.v1.engine.input_processor as module

    params = SimpleNamespace(extra_args=xargs)
    processor: Any = module.InputProcessor(engine)  # type: ignore[call-arg]
    request = processor.process_inputs("a", "text", params)
    assert vars(params) == {"extra_args": xargs}, "the caller's own"
    written = request.sampling_params.extra_args
    if (resolved := Resolved.read(request.sampling_params)) is None:
        assert written == xargs
    else:
        assert json.loads(json.dumps(written)) == written, "it goes to other processes"
        assert set(written) == {"toptheta", *(n for n in xargs if not n.startswith("toptheta"))}
    return resolved, request.cache_salt


def test_a_request_runs_with_the_settings_of_its_engine() -> None:
    for engine, min_prob in (("first", 0.001), ("second", 0.01)):
        resolved = Resolved("default", Targets(Target(min_prob), None))
        assert ask(engine, other=1) == (resolved, None)
        assert resolved.is_default
    own = Resolved("min_prob", Targets(Target(0.01), None), layers=True)
    resolved, salt = ask("first", toptheta_min_prob=0.01, toptheta_layers=True)
    assert resolved == own
    assert salt == "toptheta:min_prob=0.01:"
    assert ask("second", toptheta_min_prob=0.01)[0].setting == "default", "it does so anyway"
    assert ask("other backend", toptheta_min_prob=7) == (None, None)


def test_the_server_says_whether_responses_carry_counts() -> None:
    served = served_module._served["first"]
    quiet = replace(served, policy=replace(served.policy, report=False))
    set_served(quiet, "first")
    for engine, xargs, expected in (
        ("first", {}, False),
        ("first", {"toptheta_report": True}, True),
        ("second", {}, True),
        ("second", {"toptheta_report": 0}, False),
    ):
        resolved, salt = ask(engine, **xargs)
        assert (resolved.report, resolved.is_default, salt) == (expected, True, None)


def test_a_refused_number_says_the_range() -> None:
    from vllm.exceptions import VLLMValidationError

    for xargs, words in (
        ({"toptheta_min_prob": 0.5}, "between 1e-06 and 0.1"),
        ({"toptheta_min_mass": 0.96}, "between 0 and 0.95"),
        ({"toptheta_k": 64}, "between 1e-06 and 0.1"),
    ):
        with pytest.raises(VLLMValidationError, match=words):
            ask("first", **xargs)
