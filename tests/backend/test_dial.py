"""Rows of one batch with different options: each gets the thresholds of its own k, and of its
phase's where it does not say."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs an installed vLLM")

from tables import flat_table  # noqa: E402

from vllm_toptheta.backend import dial as dial_module  # noqa: E402
from vllm_toptheta.backend.dial import REASONS, Dial  # noqa: E402
from vllm_toptheta.backend.plan import Plan  # noqa: E402
from vllm_toptheta.config import TopThetaConfig  # noqa: E402
from vllm_toptheta.model_identity import ModelIdentity  # noqa: E402
from vllm_toptheta.request_options import RequestOptions, TargetK  # noqa: E402
from vllm_toptheta.thresholds import ThresholdTable  # noqa: E402

LAYERS, HEADS = 3, 4


def table() -> ThresholdTable:
    """Levels 16 and 256, whose theta is minus log2 of k."""
    identity = ModelIdentity(
        name="test",
        architectures=[],
        num_layers=LAYERS,
        num_heads=HEADS,
        num_kv_heads=2,
        head_dim=16,
        fields={},
        config_hash="0" * 64,
    )
    made = flat_table(identity, 0.0, levels=(16, 256))
    made.theta[0], made.theta[1] = -4.0, -8.0
    return made


def make_plan(**options: object) -> Plan:
    config = TopThetaConfig.from_additional_config({"toptheta": {"k": 64, **options}})
    return Plan(config, table(), Path("table"))


def make_dial(windows: list[int | None] | None = None, **options: object) -> Dial:
    plan = make_plan(**options)
    return Dial(plan, list(range(LAYERS)), windows or [None] * LAYERS, 0, HEADS)


def reasons(plan: dial_module.RowPlan, layer: int = 0) -> list[str]:
    """The reason of every row in one layer, "" where it is pruned."""
    result = []
    for row in range(plan.visible.shape[1]):
        found = [name for name in REASONS if plan.reasons[name][layer, row]]
        assert len(found) <= 1
        result.append("".join(found).removeprefix("dense_"))
    return result


def test_every_row_gets_the_thresholds_of_its_own_k() -> None:
    dial = make_dial(min_kv_len=100)
    lens = torch.tensor([500, 500, 500, 90, 200], dtype=torch.int32)
    options = {
        1: RequestOptions(k=16),
        2: RequestOptions(pruning=False),
        4: RequestOptions(k=256, layers=True),
    }
    plan = dial.plan(lens, options)
    theta = plan.theta[:, :, 0]
    expected = torch.tensor([-6.0, -4.0, -6.0, -6.0, -8.0])
    torch.testing.assert_close(theta, expected.expand(LAYERS, -1))
    assert reasons(plan) == ["", "", "off", "short", "short"]
    assert plan.visible.tolist() == [lens.tolist()] * LAYERS
    assert plan.target[0].tolist() == [64 * HEADS, 16 * HEADS, 64 * HEADS, 64 * HEADS, 200 * HEADS]


def test_rows_of_a_phase_take_its_k_unless_their_request_says_another() -> None:
    dial, lens = make_dial(min_kv_len=0), torch.full((3,), 500, dtype=torch.int32)
    assert (dial.plan(lens, {}, 16).theta == -4).all()
    plan = dial.plan(lens, {1: RequestOptions(k=256), 2: RequestOptions(layers=True)}, 16)
    assert plan.theta[0, :, 0].tolist() == [-4.0, -8.0, -4.0]
    assert (dial.plan(lens, {}).theta == -6).all()


@pytest.mark.parametrize(
    ("options", "expected", "words"),
    [
        ({}, TargetK(64, None), "k 64, rows"),
        ({"phases": "prefill"}, TargetK(None, 64), "prompts k 64, rows"),
        ({"phases": "prefill", "prefill_k": 32}, TargetK(None, 32), "prompts k 32, rows"),
        ({"phases": "both"}, TargetK(64, 64), "k 64, prompts k 64, rows"),
        ({"phases": "both", "prefill_k": 32}, TargetK(64, 32), "k 64, prompts k 32, rows"),
        ({"prefill_k": 32}, TargetK(64, None), "k 64, rows"),
    ],
)
def test_a_plan_says_what_rows_of_each_phase_keep(
    options: dict[str, object], expected: TargetK, words: str
) -> None:
    plan = make_plan(**options)
    assert plan.target_k == plan.policy().server == expected
    assert plan.describe().startswith(f"Top-theta attention: {words}")


def test_a_batch_of_one_k_is_the_same_as_its_rows_one_by_one() -> None:
    dial = make_dial(min_kv_len=0, windows=[None, 100, 32])
    lens = torch.tensor([10, 70, 400], dtype=torch.int32)
    for k in (None, 16, 100.5):
        options = {row: RequestOptions(k=k) for row in range(3)}
        whole = dial.plan(lens, options)
        for row in range(3):
            alone = dial.plan(lens[row : row + 1], {0: RequestOptions(k=k)})
            torch.testing.assert_close(whole.theta[:, row], alone.theta[:, 0])
            assert [reasons(whole, i)[row] for i in range(3)] == [
                reasons(alone, i)[0] for i in range(3)
            ]


def test_the_operators_layers_stand_whatever_a_request_asks_for() -> None:
    dial = make_dial(min_kv_len=0, layers={"0": {"k": 256}, "1": {"dense": True}})
    plan = dial.plan(torch.tensor([1000], dtype=torch.int32), {0: RequestOptions(k=16)})
    assert plan.theta[:, 0, 0].tolist() == [-8.0, -4.0, -4.0]
    assert [reasons(plan, layer) for layer in range(3)] == [[""], ["layer"], [""]]


def test_off_wins_over_every_other_reason() -> None:
    dial = make_dial(min_kv_len=1000, layers={"1": {"dense": True}}, windows=[None, None, 32])
    plan = dial.plan(torch.tensor([50], dtype=torch.int32), {0: RequestOptions(pruning=False)})
    assert [reasons(plan, layer) for layer in range(3)] == [["off"]] * 3


@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_plan_is_the_callers_own(num_rows: int) -> None:
    dial = make_dial(min_kv_len=0, layers={"2": {"dense": True}})
    lens = torch.full((num_rows,), 500, dtype=torch.int32)
    for values in dial.plan(lens, {}).reasons.values():
        values.fill_(True)
    again = dial.plan(lens, {})
    for layer, reason in enumerate(("", "", "layer")):
        assert reasons(again, layer) == [reason] * num_rows


def test_levels_that_clients_ask_for_do_not_pile_up() -> None:
    dial = make_dial()
    lens = torch.tensor([500], dtype=torch.int32)
    for step in range(200):
        dial.plan(lens, {0: RequestOptions(k=20 + step)})
    assert len(dial._levels) <= dial_module._MAX_LEVELS


def test_a_rank_sees_its_own_heads() -> None:
    config = TopThetaConfig.from_additional_config({"toptheta": {"k": 16, "min_kv_len": 0}})
    made = table()
    made.theta[:, :, 2:] -= 1
    dial = Dial(Plan(config, made, Path("table")), [0, 1, 2], [None] * 3, 2, 2)
    plan = dial.plan(torch.tensor([500], dtype=torch.int32), {})
    assert plan.theta.shape == (3, 1, 2)
    assert (plan.theta == -5).all()
