"""Rows of one batch with different options: each gets the threshold of its own target, and of its
phase's where its request does not say."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs an installed vLLM")

from asked import AskedDial  # noqa: E402
from threshold_fixtures import make_identity, make_table  # noqa: E402

from vllm_toptheta.backend.dial import REASONS, Dial, RowPlan  # noqa: E402
from vllm_toptheta.backend.plan import Plan  # noqa: E402
from vllm_toptheta.config import TopThetaConfig  # noqa: E402
from vllm_toptheta.kernels.layout import RENORMALISE, UNCALIBRATED_WEIGHTS  # noqa: E402
from vllm_toptheta.requests import RequestOptions, Target, Targets  # noqa: E402
from vllm_toptheta.threshold_store import FoundTable  # noqa: E402

LAYERS, HEADS, KV_HEADS = 3, 4, 2
IDENTITY = make_identity(num_hidden_layers=LAYERS)
OFFSETS = torch.arange(LAYERS * KV_HEADS).view(LAYERS, KV_HEADS) / 100


def make_plan(table: bool = True, offsets: bool = False, **options: object) -> Plan:
    config = TopThetaConfig.from_additional_config({"toptheta": options})
    if not table:
        return Plan(config, IDENTITY)
    made = make_table(IDENTITY, **({"offsets": OFFSETS} if offsets else {}))
    return Plan(config, IDENTITY, FoundTable(made, Path("table")))


def make_dial(windows: list[int | None] | None = None, **options: Any) -> Dial:
    plan = make_plan(**options)
    return AskedDial(plan, list(range(LAYERS)), windows or [None] * LAYERS, 0, HEADS)


def at_k(k: float, length: int) -> float:
    """The threshold at which rows of `make_table` keep k keys."""
    return -math.log(k) - math.log(length / 128) / 2


def reasons(plan: RowPlan, layer: int = 0) -> list[str]:
    """The reason of every row in one layer, "" where it is pruned."""
    result = []
    for row in range(plan.visible.shape[1]):
        found = [name for name in REASONS if plan.reasons[name][layer, row]]
        assert len(found) == plan.dense[layer, row] <= 1
        result.append("".join(found).removeprefix("dense_"))
    return result


def test_every_row_gets_the_threshold_of_its_own_target() -> None:
    dial = make_dial(min_kv_len=100, min_prob=0.002, min_mass=0.1)
    lens = torch.tensor([500, 500, 500, 90, 1000, 300, 500], dtype=torch.int32)
    options = {
        1: RequestOptions(min_prob=0.05),
        2: RequestOptions(pruning=False),
        4: RequestOptions(k=32, layers=True),
        5: RequestOptions(k=100, min_mass=0.7),
        6: RequestOptions(min_mass=0.2),
    }
    plan = dial.plan(lens, options)
    log = [math.log(p) for p in (0.002, 0.05, 0.002, 0.002)]
    expected = torch.tensor([*log, at_k(32, 1000), at_k(100, 300), math.log(0.002)])
    assert plan.log_min_prob.shape == (LAYERS, 7, KV_HEADS)
    torch.testing.assert_close(plan.log_min_prob, expected[:, None].expand(LAYERS, -1, KV_HEADS))
    torch.testing.assert_close(plan.min_mass, torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.7, 0.2]))
    assert reasons(plan) == ["", "", "off", "short", "", "", ""]
    assert plan.visible.tolist() == [lens.tolist()] * LAYERS
    assert plan.target.tolist() == [[0, 0, 0, 0, 32 * HEADS, 100 * HEADS, 0]] * LAYERS


def test_min_prob_needs_no_table() -> None:
    dial = make_dial(table=False, min_kv_len=0)
    lens = torch.tensor([500, 9], dtype=torch.int32)
    plan = dial.plan(lens, {1: RequestOptions(min_prob=0.01)})
    expected = torch.tensor([math.log(0.001), math.log(0.01)])
    torch.testing.assert_close(plan.log_min_prob, expected[:, None].expand(LAYERS, -1, KV_HEADS))
    assert (plan.min_mass == 0.5).all(), "weights that were not fitted want a floor"
    torch.testing.assert_close(dial.weights[1, 2], torch.tensor(UNCALIBRATED_WEIGHTS))
    without = make_dial(table=False, compensation=False).weights
    torch.testing.assert_close(without[1, 2], torch.tensor(RENORMALISE))


def test_a_k_follows_the_length_of_a_row_and_is_all_that_it_has() -> None:
    dial = make_dial(min_kv_len=0, k=64)
    lens = torch.tensor([300, 4000, 40], dtype=torch.int32)
    plan = dial.plan(lens, {})
    expected = torch.tensor([at_k(64, n) for n in (300, 4000)])
    torch.testing.assert_close(plan.log_min_prob[1, :2, 0], expected)
    assert plan.target[0].tolist() == [64 * HEADS, 64 * HEADS, 40 * HEADS]
    assert (plan.min_mass == 0).all()


def test_offsets_come_on_top_of_whatever_rules() -> None:
    dial = make_dial(offsets=True, min_kv_len=0, layers={"2": {"min_prob": 0.03}})
    plan = dial.plan(torch.tensor([500], dtype=torch.int32), {0: RequestOptions(min_prob=0.01)})
    expected = torch.tensor([0.01, 0.01, 0.03]).log()[:, None] + OFFSETS
    torch.testing.assert_close(plan.log_min_prob[:, 0], expected)


@pytest.mark.parametrize(
    ("options", "expected", "words"),
    [
        ({}, Targets(Target(0.001), None), "min_prob 0.001, rows"),
        ({"min_mass": 0.3}, Targets(Target(0.001, 0.3), None), "min_prob 0.001, min_mass 0.3, r"),
        ({"k": 64}, Targets(Target(None, k=64), None), "k 64, rows"),
        ({"phases": "prefill"}, Targets(None, Target(0.001)), "prompts min_prob 0.001, rows"),
        (
            {"phases": "prefill", "prefill_min_prob": 0.01, "min_mass": 0.3},
            Targets(None, Target(0.01)),
            "prompts min_prob 0.01, rows",
        ),
        (
            {"phases": "both", "k": 64, "min_mass": 0.3},
            Targets(Target(None, 0.3, 64), Target(None, k=64)),
            "k 64, min_mass 0.3, prompts k 64, rows",
        ),
        (
            {"phases": "both", "k": 64, "prefill_min_prob": 0.01},
            Targets(Target(None, k=64), Target(0.01)),
            "k 64, prompts min_prob 0.01, rows",
        ),
        ({"prefill_min_prob": 0.01}, Targets(Target(0.001), None), "min_prob 0.001, rows"),
    ],
)
def test_a_plan_says_what_rows_of_each_phase_run_with(
    options: dict[str, object], expected: Targets, words: str
) -> None:
    plan = make_plan(**options)
    assert plan.targets == plan.policy().server == expected
    assert plan.describe().startswith(f"Top-theta attention: {words}")


def test_rows_of_a_phase_take_its_target_unless_their_request_says_another() -> None:
    dial = make_dial(phases="both", prefill_min_prob=0.05, min_kv_len=0)
    lens, options = torch.full((2,), 500), {1: RequestOptions(min_prob=0.01)}
    for phase, own in (("decode", 0.001), ("prefill", 0.05)):
        plan = dial.plan(lens, options, phase)  # type: ignore[arg-type]
        torch.testing.assert_close(plan.log_min_prob[0, :, 0], torch.tensor([own, 0.01]).log())


def test_a_phase_that_is_not_pruned_is_excluded_by_an_option() -> None:
    dial = make_dial(phases="prefill", min_kv_len=1000, windows=[None, 20, None])
    plan = dial.plan(torch.tensor([500, 500]), {1: RequestOptions(pruning=False)})
    assert [reasons(plan, layer) for layer in range(3)] == [["layer", "layer"]] * 3


def test_a_batch_is_the_same_as_its_rows_one_by_one() -> None:
    dial = make_dial(min_kv_len=50, windows=[None, 100, 32])
    lens = torch.tensor([10, 70, 400, 400], dtype=torch.int32)
    asked = [RequestOptions(k=2), RequestOptions(k=100.5), RequestOptions(), RequestOptions(k=16)]
    whole = dial.plan(lens, dict(enumerate(asked)))
    for row, one in enumerate(asked):
        alone = dial.plan(lens[row : row + 1], {0: one})
        for name in ("log_min_prob", "target", "visible", "dense"):
            assert torch.equal(getattr(whole, name)[:, row], getattr(alone, name)[:, 0])
        assert [reasons(whole, i)[row] for i in range(3)] == [
            reasons(alone, i)[0] for i in range(3)
        ]
    assert [reasons(whole, layer)[2] for layer in range(3)] == ["", "", "window"]


def test_the_operators_layers_stand_whatever_a_request_asks_for() -> None:
    dial = make_dial(min_kv_len=0, layers={"0": {"min_prob": 0.05}, "1": {"dense": True}})
    for asked in (RequestOptions(k=16), RequestOptions(min_prob=0.002)):
        plan = dial.plan(torch.tensor([1000], dtype=torch.int32), {0: asked})
        other = at_k(16, 1000) if asked.k else math.log(0.002)
        torch.testing.assert_close(
            plan.log_min_prob[:, 0, 0], torch.tensor([math.log(0.05), other, other])
        )
        assert [reasons(plan, layer) for layer in range(3)] == [[""], ["layer"], [""]]
        meant = 16 * HEADS if asked.k else 0
        assert plan.target[:, 0].tolist() == [0, meant, meant]


def test_off_wins_over_every_other_reason() -> None:
    dial = make_dial(min_kv_len=1000, layers={"1": {"dense": True}}, windows=[None, None, 32])
    plan = dial.plan(torch.tensor([50], dtype=torch.int32), {0: RequestOptions(pruning=False)})
    assert [reasons(plan, layer) for layer in range(3)] == [["off"]] * 3


@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_plan_is_the_callers_own(num_rows: int) -> None:
    dial = make_dial(min_kv_len=0, layers={"2": {"dense": True}})
    lens = torch.full((num_rows,), 500, dtype=torch.int32)
    first = dial.plan(lens, {})
    for values in (first.visible, first.log_min_prob, first.min_mass, *first.reasons.values()):
        values.fill_(1)
    again = dial.plan(lens, {})
    for layer, reason in enumerate(("", "", "layer")):
        assert reasons(again, layer) == [reason] * num_rows
    assert (again.visible == 500).all()
    assert (again.log_min_prob < 0).all()


def test_curves_that_clients_ask_for_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_toptheta.backend.dial._MAX_CURVES", 16)
    dial = make_dial()
    lens = torch.full((200,), 500, dtype=torch.int32)
    options = {row: RequestOptions(k=20 + row / 4) for row in range(200)}
    plan = dial.plan(lens, options)
    torch.testing.assert_close(
        plan.log_min_prob[0, 150, 0].item(), at_k(57.5, 500), rtol=1e-5, atol=0
    )
    assert dial._curve_at_k.cache_info().currsize == 16


def test_a_rank_sees_its_own_heads() -> None:
    plan = make_plan(offsets=True, min_kv_len=0)
    assert plan.table is not None
    plan.table.weights[:, 2:, 3] = 0.25
    dial = Dial(plan, [0, 1, 2], [None] * 3, 2, 2)
    assert (dial.weights[..., 3] == 0.25).all()
    rows = dial.plan(torch.tensor([500], dtype=torch.int32), {})
    torch.testing.assert_close(rows.log_min_prob[:, 0], math.log(0.001) + OFFSETS[:, 1:])


@pytest.mark.parametrize("table", [True, False])
def test_ranks_may_share_a_kv_head(table: bool) -> None:
    dial = Dial(make_plan(table=table, min_kv_len=0), [0, 1, 2], [None] * 3, 3, 1)
    assert dial.weights.shape == (LAYERS, 1, 5)
    assert dial.plan(torch.tensor([500]), {}).log_min_prob.shape == (LAYERS, 1, 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"table": False, "k": 64}, ["needs a threshold table", "toptheta calibrate org/model"]),
        ({"k": 1000}, ["k = 1000", "outside the table's range"]),
        ({"layers": {"3": {"dense": True}}}, ["layer 3", "layers 0 to 2"]),
        ({"min_k": 65, "max_k": 64}, ["'min_k' = 65 is above 'max_k' = 64"]),
        ({"min_k": 1000}, ["'min_k' = 1000 is above 'max_k' = 256"]),
    ],
)
def test_options_that_do_not_fit_the_model(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="toptheta|outside") as caught:
        make_plan(**options).check()
    for word in words:
        assert word in str(caught.value)


def test_requests_may_name_a_k_exactly_where_there_is_a_table() -> None:
    assert make_plan(min_k=4).policy().ranges["k"] == (4, 256)
    assert "k" not in make_plan(table=False).policy().ranges


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({}, True),
        ({"compensation": False}, False),
        ({"compensation": False, "phases": "both"}, True),
    ],
)
def test_means_are_kept_where_rows_read_them(options: dict[str, Any], needs: bool) -> None:
    assert make_plan(**options).config.needs_means is needs


def test_a_batch_of_the_same_requests_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    dial = make_dial(min_kv_len=0)
    looked_up: list[Target] = []
    find = dial._curve_at_k

    def count(target: Target) -> torch.Tensor:
        looked_up.append(target)
        return find(target)

    monkeypatch.setattr(dial, "_curve_at_k", count)
    options = {row: RequestOptions(k=20 + row / 4) for row in range(70)}
    for step in range(3):
        plan = dial.plan(torch.full((70,), 500 + step), dict(options))
        assert plan.log_min_prob[0, 8, 0].item() == pytest.approx(at_k(22, 500 + step), rel=1e-5)
    assert len(looked_up) == 70
    # Another request takes a row, then one leaves.
    options[8] = RequestOptions(min_prob=0.01)
    plan = dial.plan(torch.full((70,), 500), options)
    assert plan.log_min_prob[0, 8, 0].item() == pytest.approx(math.log(0.01))
    assert dial.plan(torch.full((8,), 500), options).target.shape == (LAYERS, 8)
    assert len(looked_up) == 148
