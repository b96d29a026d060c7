"""What the page's JSON and the info series say, with and without a threshold table."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

from threshold_fixtures import make_identity, make_table  # noqa: E402

from vllm_toptheta.config import TopThetaConfig  # noqa: E402
from vllm_toptheta.requests import RequestPolicy, Target, Targets  # noqa: E402
from vllm_toptheta.serving.routes import config_of, merge_heads, thresholds_of  # noqa: E402
from vllm_toptheta.serving.served import Served  # noqa: E402
from vllm_toptheta.serving.sinks import info  # noqa: E402

RANGES = {"min_prob": (1e-6, 0.1), "min_mass": (0.0, 0.95)}


def served(targets: Targets, *, calibrated: bool, **options: Any) -> Served:
    table = make_table() if calibrated else None
    path = Path("/folder/table.safetensors") if calibrated else None
    ranges = {**RANGES, "k": (16.0, 64.0)} if calibrated else RANGES
    policy = RequestPolicy(targets, ranges, allow_off=True)
    config = TopThetaConfig(**options)
    return Served("m", config, policy, make_identity(), table, path, None)


def test_without_a_table_the_defaults_are_shown() -> None:
    made = served(Targets(Target(0.001, 0.5), None), calibrated=False)
    assert thresholds_of(made) is None
    shown = config_of(made)
    assert shown["server"] == {
        "decode": {"min_prob": 0.001, "min_mass": 0.5, "k": None},
        "prefill": None,
    }
    assert shown["requests_may_ask_for"] == {**RANGES, "off": True}
    labels = info(made)
    assert (labels["min_prob"], labels["min_mass"], labels["k"]) == ("0.001", "0.5", "none")
    assert labels["prefill_min_prob"] == labels["table"] == labels["table_model"] == "none"


def test_a_table_is_shown_with_what_it_promises() -> None:
    k = Target(None, 0.0, 32.0)
    made = served(Targets(k, k), calibrated=True, k=32.0, phases="both")
    shown = thresholds_of(made)
    assert shown is not None
    assert shown["file"] == "table.safetensors"
    assert shown["metadata"]["min_prob"] == 0.001
    curves = shown["mean_kept"]
    assert [len(curve) for curve in curves] == [len(shown["log_probs"])] * len(shown["lengths"])
    assert config_of(made)["requests_may_ask_for"]["k"] == (16.0, 64.0)
    labels = info(made)
    assert (labels["min_prob"], labels["k"], labels["prefill_k"]) == ("none", "32", "32")
    assert (labels["table"], labels["table_model"]) == ("table.safetensors", "org/model")
    json.dumps([shown, config_of(made)])


def part(layers: list[int], first_head: int, kept: int, mass: float, heads: int = 2) -> Any:
    """A worker's counts of query heads that share one kv head, one row and ten keys a layer."""
    return {
        "layers": layers,
        "first_head": first_head,
        "kept": [[kept]] * len(layers),
        "scored": [[10]] * len(layers),
        "kept_mass": [[mass] * heads] * len(layers),
        "rows": [2] * len(layers),
    }


def test_heads_of_all_ranks_make_one_grid() -> None:
    # Two pipeline stages of two tensor-parallel ranks; the first stage has two builders.
    answers = [
        [part([0], 0, 1, 0.2), part([1], 0, 2, 0.4)],
        [part([0], 2, 3, 0.6), part([1], 2, 4, 0.8)],
        [part([2], 0, 5, 1.0)],
        [part([2], 2, 6, 1.2)],
    ]
    model = make_identity(num_hidden_layers=4)
    grid = merge_heads(answers, model)
    assert [[read for read, _ in layer] for layer in grid["v_rows"]] == [
        [1, 3],
        [2, 4],
        [5, 6],
        [0, 0],
    ]
    assert grid["v_rows"][2][1] == [6, 10]
    assert grid["kept_mass"] == [
        [0.1, 0.1, 0.3, 0.3],
        [0.2, 0.2, 0.4, 0.4],
        [0.5, 0.5, 0.6, 0.6],
        [None] * 4,
    ]
    json.dumps(grid, allow_nan=False)


def test_ranks_that_share_a_kv_head_count_as_one() -> None:
    answers = [[part([0, 1], head, 3, 0.5 + head / 4, heads=1)] for head in range(4)]
    grid = merge_heads(answers, make_identity())
    for cells in grid["v_rows"]:
        assert [read / scored for read, scored in cells] == [0.3, 0.3]
    assert grid["kept_mass"][1] == [0.25, 0.375, 0.5, 0.625]
