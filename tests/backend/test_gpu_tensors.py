"""The GPU backend's look-up of thresholds against the CPU backend's."""

import itertools
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")
pytest.importorskip("triton")

import torch  # noqa: E402
from asked import resolve  # noqa: E402
from gpu_engine import (  # noqa: E402
    HEADS,
    KV_HEADS,
    WINDOWS,
    Batch,
    make_builder,
    named_totals,
    recorded_build,
    table,
)
from triton_interpreter import needs_interpreter  # noqa: E402

from vllm_toptheta.backend import gpu_tensors  # noqa: E402
from vllm_toptheta.backend.dial import Dial, RowPlan  # noqa: E402
from vllm_toptheta.backend.prompts import plan_prompts  # noqa: E402
from vllm_toptheta.hooks import model_runner  # noqa: E402
from vllm_toptheta.kernels.columns import (  # noqa: E402
    DENSE_LAYER,
    DENSE_NONE,
    DENSE_ROW,
    DENSE_SHORT,
    DENSE_WINDOW,
    UNITS,
)
from vllm_toptheta.requests import RequestOptions  # noqa: E402
from vllm_toptheta.thresholds import ThresholdTable  # noqa: E402

pytestmark = needs_interpreter

CODES = {
    "dense_short": DENSE_SHORT,
    "dense_window": DENSE_WINDOW,
    "dense_layer": DENSE_LAYER,
    "dense_off": DENSE_ROW,
}
ASKED = {
    1: RequestOptions(min_prob=0.2),
    2: RequestOptions(pruning=False),
    3: RequestOptions(min_mass=0.9),
}
ENGINES: dict[str, dict[str, Any]] = {
    "min_prob": {"layers": {"0": {"min_prob": 0.5}}},
    "a dense window": {"min_kv_len": 60},
    "min_prob with a table": {"thresholds": table(), "layers": {}},
    "k": {"thresholds": table(), "k": 16, "layers": {"0": {"min_prob": 0.5}}},
    "k without overrides": {"thresholds": table(), "k": 200, "layers": {}, "min_mass": None},
    "prompts only": {"phases": "prefill"},
    "prompts differ": {"phases": "both", "prefill_min_prob": 0.001},
}


def codes(rows: RowPlan) -> torch.Tensor:
    found = torch.zeros_like(rows.visible)
    for name, holds in rows.reasons.items():
        found[holds] = CODES[name]
    return found


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
def test_single_tokens_get_what_the_cpu_backend_gives_them(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    builder, _ = make_builder(monkeypatch, **options)
    asked = dict(ASKED)
    if "k" in options:
        asked[4] = RequestOptions(k=7.5)
    resolved = resolve(builder.plan, asked)
    monkeypatch.setattr(model_runner, "row_options", lambda cam: resolved)
    batch = Batch([180, 170, 100, 90, 140, 7], [1] * 6)
    metadata, counts = recorded_build(builder, batch.common())
    dial = Dial(builder.plan, [0, 1, 2], list(WINDOWS), 0, HEADS)
    wanted = dial.plan(batch.case.seq_lens, resolved)
    found = metadata.rows.tensors
    assert torch.equal(found.dense.long(), codes(wanted))
    pruned = found.dense == DENSE_NONE
    torch.testing.assert_close(
        found.log_min_prob[pruned], wanted.log_min_prob[pruned], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(metadata.rows.min_mass[pruned.any(0)], wanted.min_mass[pruned.any(0)])
    assert torch.equal(builder.tensors.weights, dial.weights)
    found.num_kept.fill_(3)
    of_request = (wanted.target * ~wanted.dense).sum(0).tolist()
    assert [row["keys_target"] for row in named_totals(counts)[:6]] == of_request
    assert pruned.any() == (options.get("phases") != "prefill")


@pytest.mark.parametrize("curve", [[-5.0, -6.0, -6.5], [-3.0, -2.5, -0.5]], ids=["falls", "rises"])
def test_a_curve_is_followed_at_every_length(
    monkeypatch: pytest.MonkeyPatch, curve: list[float]
) -> None:
    """The knots are at 128, 512 and 2048 keys; no threshold is above a probability of 1."""
    monkeypatch.setattr(ThresholdTable, "curve_at_k", lambda self, k: torch.tensor(curve))
    builder, _ = make_builder(monkeypatch, thresholds=table(), k=16)
    seq_lens = torch.tensor([1, 127, 300, 512, 5000, 131072], dtype=torch.int32)
    tensors = builder.tensors
    tensors._look_up(seq_lens, tensors.held)
    wanted = Dial(builder.plan, [0, 1, 2], list(WINDOWS), 0, HEADS).plan(seq_lens, {})
    torch.testing.assert_close(tensors.held.log_min_prob, wanted.log_min_prob)
    assert (tensors.held.log_min_prob[0, -1, 0] == 0) == (curve[0] == -3)


@pytest.mark.parametrize("name", ["k", "min_prob", "prompts only", "prompts differ"])
def test_prompts_are_planned_and_counted_as_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    builder, _ = make_builder(monkeypatch, **({"phases": "both"} | ENGINES[name]))
    batch = Batch([180, 60, 50], [30, 9, 2])
    asked = {1: RequestOptions(min_prob=0.2), 2: RequestOptions(pruning=False)}
    resolved = resolve(builder.plan, asked)
    monkeypatch.setattr(model_runner, "row_options", lambda cam: resolved)
    metadata, counts = recorded_build(builder, batch.common())
    ours, common = metadata.rows, batch.common()
    theirs = plan_prompts(
        Dial(builder.plan, [0, 1, 2], list(WINDOWS), 0, HEADS),
        common.block_table_tensor,
        common.query_start_loc_cpu,
        common.seq_lens,
        resolved,
        HEADS,
    )
    assert torch.equal(ours.prompts[0].starts, theirs.query_start_loc)
    found = ours.tensors
    assert torch.equal(found.dense.bool(), theirs.dense)
    assert theirs.dense.any()
    assert not theirs.dense.all()
    pruned = ~theirs.dense
    torch.testing.assert_close(
        found.log_min_prob[pruned], theirs.log_min_prob[pruned], rtol=1e-5, atol=1e-5
    )
    generator = torch.Generator().manual_seed(0)
    for column, most in (("num_kept", 60), ("v_tiles_read", 3)):
        tensor = getattr(found, column)
        tensor.copy_(torch.randint(1, most, tensor.shape, generator=generator))
        getattr(theirs, column).copy_(tensor)
    theirs.kept_mass.fill_(0.5)
    found.kept_mass.fill_(0.5)
    expected = theirs.counts()
    unit_of = dict(
        zip(UNITS, builder.tensors.rank.units(builder.tensors.device).tolist(), strict=True)
    )
    for seq, row in enumerate(named_totals(counts)[:3]):
        counted = {column: row[column] for column in expected}
        wanted = {c: int(values[:, seq].sum()) * unit_of[c] for c, values in expected.items()}
        assert counted == wanted


def test_settings_are_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request's numbers take a table, and every step has its rows."""
    builder, _ = make_builder(monkeypatch, thresholds=table(), k=16)
    asked = resolve(builder.plan, {0: RequestOptions(k=20)})
    tables = itertools.count()
    original = type(builder.plan.table).curve_at_k

    def curve_at_k(self: Any, k: float) -> torch.Tensor:
        next(tables)
        return original(self, k)

    monkeypatch.setattr(type(builder.plan.table), "curve_at_k", curve_at_k)
    monkeypatch.setattr(model_runner, "row_options", lambda cam: asked)
    for _ in range(3):
        builder.build(0, Batch([70, 70], [1, 1]).common())
    assert next(tables) == 1


@pytest.mark.parametrize("rank", range(4))
def test_ranks_that_share_a_kv_head_count_it_once(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    builder, _ = make_builder(monkeypatch, thresholds=table(), k=16)
    monkeypatch.setattr(gpu_tensors, "get_tensor_model_parallel_rank", lambda: rank)
    held = builder.tensors
    of_rank = gpu_tensors.StepTensors(
        builder.plan,
        [0, 1],
        [None, 40],
        gpu_tensors.LayerShape(1, 1, 64),
        max_rows=2,
        max_len=256,
        block_size=16,
        launch=held.launch,
        num_units=1,
        device=torch.device("cpu"),
    )
    v_rows = of_rank.rank.units(torch.device("cpu"))[list(UNITS).index("v_rows_read")]
    assert bool(v_rows) == (rank % 2 == 0)
    kv_head = rank // (HEADS // KV_HEADS)
    assert torch.equal(of_rank.weights[:, 0], held.weights[:2, rank])
    seq_lens = torch.tensor([90, 70], dtype=torch.int32)
    for tensors in (of_rank, held):
        tensors._look_up(seq_lens, tensors.held)
    assert torch.equal(of_rank.held.log_min_prob[..., 0], held.held.log_min_prob[:2, :2, kv_head])
