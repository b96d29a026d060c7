"""What a CPU step counts: which rank tells it, per head, and together with other steps."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from asked import resolve  # noqa: E402
from cpu_engine import CHUNK, HEADS, KV_HEADS, Batch, Engine, plans  # noqa: E402
from vllm.config import VllmConfig  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402

from vllm_toptheta.backend import counts as counts_module  # noqa: E402
from vllm_toptheta.backend.counts import DecodeCounts, RankHeads  # noqa: E402
from vllm_toptheta.backend.dial import KindRows  # noqa: E402
from vllm_toptheta.backend.heads import HeadCounts, toptheta_heads  # noqa: E402
from vllm_toptheta.hooks import model_runner  # noqa: E402
from vllm_toptheta.kernels.columns import COLUMNS  # noqa: E402
from vllm_toptheta.requests import RequestOptions  # noqa: E402


@pytest.fixture(scope="module")
def vllm_config(smollm2: Path) -> VllmConfig:
    return EngineArgs(model=str(smollm2), dtype="float32").create_engine_config()


def test_ranks_that_share_a_kv_head_count_its_v_rows_once(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig
) -> None:
    batch = Batch([0, CHUNK])
    engine = Engine(monkeypatch, vllm_config, "both", False)
    _, whole = engine.step(batch)
    engine.builder.rank = RankHeads(HEADS, KV_HEADS, first_replica=False)
    _, other = engine.step(batch)
    v_columns = {name for name in COLUMNS if "v_" in name}
    assert len(v_columns) == 4
    for before, after in zip(whole, other, strict=True):
        assert after == before | dict.fromkeys(v_columns, 0)
    assert any(one[name] for one in whole for name in v_columns)


def test_counts_per_head_add_up_to_those_of_the_requests(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig
) -> None:
    engine = Engine(monkeypatch, vllm_config, "decode", True)
    _, counts = engine.step(Batch([0, 1, CHUNK]))
    worker = SimpleNamespace(vllm_config=vllm_config)
    (heads,) = toptheta_heads(worker)
    assert toptheta_heads(worker) == [heads], "each step once"
    assert (heads["layers"], heads["first_head"], heads["rows"]) == ([0, 1], 0, [2, 2])

    def total(name: str) -> int:
        return sum(one[name] for one in counts)

    kept, mass = torch.tensor(heads["kept"]), torch.tensor(heads["kept_mass"])
    assert kept.shape == (2, KV_HEADS)
    assert mass.shape == (2, HEADS)
    assert int(kept.sum()) == total("v_rows_read")
    assert int(torch.tensor(heads["scored"]).sum()) == total("v_rows_scored")
    assert float(mass.sum()) * 1e6 == pytest.approx(total("kept_mass"), abs=4)
    assert (mass[1] == 2).all(), "the dense layer keeps everything"
    engine.builder.build(0, Batch([0, 1, CHUNK]).common())  # a dummy run: no engine step is open
    assert toptheta_heads(worker) == [heads]


@pytest.mark.parametrize("phases", ["decode", "both"])
def test_steps_that_are_asked_together_count_what_they_count_alone(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig, phases: str
) -> None:
    options = {0: RequestOptions(layers=True), 1: RequestOptions(pruning=False)}
    monkeypatch.setattr(model_runner, "row_options", lambda cam: resolve(plans[-1], options))
    engine = Engine(monkeypatch, vllm_config, phases, True)
    batches = [Batch([0, 1, CHUNK]) for _ in range(3)]
    batches[1].lens = [length - 7 for length in batches[1].lens]
    steps = []
    for batch in batches:
        engine.step(batch)
        steps.append(engine.counts)
    first, *others = pickle.loads(pickle.dumps(steps))  # as they travel to another process
    alone = [step.of_rank() for step in steps]
    assert first.detail == [0]
    assert torch.equal(first.of_rank(*others), sum(alone))
    assert not torch.equal(alone[0], alone[1])


def test_what_a_step_without_pruned_prompts_counts_waits_where_one_rank_counts(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig
) -> None:
    engine = Engine(monkeypatch, vllm_config, "both", True)
    engine.step(Batch([0, CHUNK]))
    assert not engine.counts.waits, "it has elements for every token"
    engine.step(Batch([0, 1]))
    assert engine.counts.waits
    monkeypatch.setattr(counts_module, "get_tp_group", lambda: SimpleNamespace(world_size=2))
    assert not engine.counts.waits, "the ranks add up in every step"


def test_counts_per_head_do_not_hold_every_step() -> None:
    counts = HeadCounts("engine", [0], 0, 1, torch.zeros(1, 4, dtype=torch.int64))
    nothing = np.zeros((1, 1), dtype=bool)
    kinds = KindRows(np.zeros(1, dtype=np.int64), np.full((1, 1), 9), nothing * 0, {}, nothing)
    kept, mass = np.full((1, 1, 1), 2, dtype=np.int32), np.ones((1, 1, 1), dtype=np.float32)
    for _ in range(200):
        counts.follow(DecodeCounts(kinds, kept, kept, mass))
        assert len(counts.waiting) <= 64
    assert counts.shown()["kept"] == [[400]]
    assert counts.shown()["scored"] == [[1800]]
    assert counts.shown()["rows"] == [200]
