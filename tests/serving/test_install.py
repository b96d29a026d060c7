"""Request intake of several engines in one process, on a stand-in for vLLM's input processor."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

from vllm_toptheta.config import TopThetaConfig  # noqa: E402
from vllm_toptheta.request_options import RequestPolicy, Target, Targets  # noqa: E402
from vllm_toptheta.serving import install as install_module  # noqa: E402
from vllm_toptheta.serving import served as served_module  # noqa: E402
from vllm_toptheta.serving.served import Served, set_served  # noqa: E402
from vllm_toptheta.telemetry import delivery  # noqa: E402

RANGES = {"min_prob": (1e-6, 0.1), "min_mass": (0.0, 0.95)}


class InputProcessor:
    def __init__(self, instance_id: str) -> None:
        self.vllm_config = SimpleNamespace(instance_id=instance_id)

    def process_inputs(self, request_id: str, prompt: str, params: Any) -> Any:
        # vLLM works on a copy.
        return SimpleNamespace(sampling_params=SimpleNamespace(**vars(params)), cache_salt=None)


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
    install_module._install_on_input_processor()


def ask(engine: str, **xargs: Any) -> tuple[Any, Any]:
    """What a request runs with in an engine, and its salt."""
    import vllm.v1.engine.input_processor as module

    params = SimpleNamespace(extra_args=xargs)
    processor: Any = module.InputProcessor(engine)  # type: ignore[call-arg]
    request = processor.process_inputs("a", "text", params)
    assert vars(params) == {"extra_args": xargs}, "the caller's own"
    return vars(request.sampling_params).get(delivery._RESOLVED), request.cache_salt


def test_a_request_runs_with_the_settings_of_its_engine() -> None:
    for engine, min_prob in (("first", 0.001), ("second", 0.01)):
        assert ask(engine) == (("default", Targets(Target(min_prob), None)), None)
    own = ("min_prob", Targets(Target(0.01), None))
    resolved, salt = ask("first", toptheta_min_prob=0.01)
    assert resolved == own
    assert salt == "toptheta:min_prob=0.01:"
    assert ask("second", toptheta_min_prob=0.01)[0][0] == "default", "it does so anyway"
    assert ask("other backend", toptheta_min_prob=7) == (None, None)


def test_a_refused_number_says_the_range() -> None:
    from vllm.exceptions import VLLMValidationError

    for xargs, words in (
        ({"toptheta_min_prob": 0.5}, "between 1e-06 and 0.1"),
        ({"toptheta_min_mass": 0.96}, "between 0 and 0.95"),
        ({"toptheta_k": 64}, "between 1e-06 and 0.1"),
    ):
        with pytest.raises(VLLMValidationError, match=words):
            ask("first", **xargs)
