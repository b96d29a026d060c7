"""Prompt rows of a batch: a threshold for every token, and counts of every prompt."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs an installed vLLM")

from asked import AskedDial  # noqa: E402
from threshold_fixtures import make_identity, make_table  # noqa: E402

from vllm_toptheta.backend.counts import RankHeads  # noqa: E402
from vllm_toptheta.backend.dial import Dial  # noqa: E402
from vllm_toptheta.backend.plan import Plan  # noqa: E402
from vllm_toptheta.backend.prompts import PromptStep, plan_prompts  # noqa: E402
from vllm_toptheta.config import TopThetaConfig  # noqa: E402
from vllm_toptheta.kernels.columns import COLUMNS  # noqa: E402
from vllm_toptheta.requests import RequestOptions  # noqa: E402
from vllm_toptheta.threshold_store import FoundTable  # noqa: E402

LAYERS, HEADS, KV_HEADS = 2, 4, 2
LENS, QUERY_LENS = [300, 90, 200], [70, 90, 1]
of_rank = RankHeads(HEADS, KV_HEADS, first_replica=True)
UNIT_OF = dict(zip(COLUMNS, of_rank.units(torch.device("cpu")).tolist(), strict=True))


def make_dial(windows: list[int | None] | None = None, **options: object) -> Dial:
    given = {"k": 64, "phases": "prefill", "min_kv_len": 100, **options}
    config = TopThetaConfig.from_additional_config({"toptheta": given})
    identity = make_identity()
    plan = Plan(config, identity, FoundTable(make_table(identity), Path("table")))
    return AskedDial(plan, list(range(LAYERS)), windows or [None] * LAYERS, 0, HEADS)


def plan_step(dial: Dial, options: dict[int, RequestOptions] | None = None) -> PromptStep:
    starts = torch.tensor([0, *QUERY_LENS]).cumsum(0).to(torch.int32)
    lens = torch.tensor(LENS, dtype=torch.int32)
    table = torch.zeros(3, 10, dtype=torch.int32)
    return plan_prompts(dial, table, starts, lens, options or {}, HEADS)


def test_every_token_gets_the_threshold_of_its_own_length() -> None:
    dial = make_dial()
    step = plan_step(dial)
    lens = [*range(231, 301), *range(1, 91), 200]
    assert step.row_lens.tolist() == lens
    assert torch.equal(step.visible, step.row_lens.expand(LAYERS, -1))
    for token in (0, 69, 70, 159, 160):
        alone = dial.plan(torch.tensor([lens[token]], dtype=torch.int32), {}, "prefill")
        assert torch.equal(step.log_min_prob[:, token], alone.log_min_prob[:, 0])
    assert step.log_min_prob[0, 0, 0] > step.log_min_prob[0, 69, 0]
    assert step.dense[0].tolist() == [n <= 100 for n in lens]


def test_prompts_may_have_a_min_prob_of_their_own_and_requests_theirs() -> None:
    asked = {1: RequestOptions(pruning=False), 2: RequestOptions(min_prob=0.03)}
    step = plan_step(make_dial(prefill_min_prob=0.02), asked)
    assert (step.log_min_prob[:, :70] == torch.tensor(0.02).log()).all()
    assert step.dense[:, 70:160].all()
    torch.testing.assert_close(step.log_min_prob[0, 160, 1].item(), math.log(0.03))
    assert not step.dense[:, 160].any()


@pytest.mark.parametrize("windows", [None, [None, 150]])
@pytest.mark.parametrize(
    "options",
    [
        {0: RequestOptions(k=16)},
        {0: RequestOptions(k=16), 2: RequestOptions(k=16)},
        {0: RequestOptions(pruning=False), 1: RequestOptions(k=16), 2: RequestOptions(k=100)},
        {0: RequestOptions(min_prob=0.03), 1: RequestOptions(min_mass=0.3)},
    ],
    ids=str,
)
def test_options_of_a_prompt_hold_for_each_of_its_tokens(
    options: dict[int, RequestOptions], windows: list[int | None] | None
) -> None:
    dial = make_dial(windows)
    step = plan_step(dial, options)
    prompt_of = torch.arange(3).repeat_interleave(torch.tensor(QUERY_LENS)).tolist()
    for token, prompt in enumerate(prompt_of):
        asked = {0: options[prompt]} if prompt in options else {}
        alone = dial.plan(step.row_lens[token : token + 1], asked, "prefill")
        assert torch.equal(step.log_min_prob[:, token], alone.log_min_prob[:, 0])
        assert torch.equal(step.dense[:, token], alone.dense[:, 0])
        assert torch.equal(step.visible[:, token], alone.visible[:, 0])


def test_what_another_kernel_keeps_is_every_visible_key() -> None:
    step = plan_step(make_dial([None, 150]))
    step.keep_all()
    counts = step.counts()
    assert (counts["prefill_keys_kept"] == counts["prefill_keys_scored"] * KV_HEADS).all()
    assert (counts["prefill_v_tiles_read"] == counts["prefill_v_tiles"] * KV_HEADS).all()
    assert (counts["prefill_kept_mass"] == counts["prefill_rows"] * HEADS * 10**6).all()
    assert counts["prefill_keys_scored"][1].sum() < counts["prefill_keys_scored"][0].sum()


@pytest.mark.parametrize("window", [None, 150])
def test_counts_are_sums_over_the_tokens_of_a_prompt(window: int | None) -> None:
    step = plan_step(make_dial([None, window]))
    generator = torch.Generator().manual_seed(0)
    step.num_kept.copy_(torch.randint(1, 60, step.num_kept.shape, generator=generator))
    step.v_tiles_read.copy_(torch.randint(1, 4, step.v_tiles_read.shape, generator=generator))
    step.kept_mass.copy_(torch.rand(step.kept_mass.shape, generator=generator))
    counts = step.counts()
    start = 0
    for prompt, (length, query_len) in enumerate(zip(LENS, QUERY_LENS, strict=True)):
        rows = range(start, start + query_len)
        start += query_len
        for layer in range(LAYERS):
            limit = (window if layer else None) or 10**6
            seen = [(max(n - limit, 0), n) for n in range(length - query_len + 1, length + 1)]
            found = {n: int(values[layer, prompt]) * UNIT_OF[n] for n, values in counts.items()}
            assert found == {
                "dense_prefill": HEADS * sum(int(step.dense[layer, row]) for row in rows),
                "prefill_rows": HEADS * query_len,
                "prefill_keys_scored": HEADS * sum(end - begin for begin, end in seen),
                "prefill_keys_kept": int(step.num_kept[layer, rows.start : rows.stop].sum())
                * (HEADS // KV_HEADS),
                "prefill_v_tiles": KV_HEADS
                * sum(len({key // 64 for key in range(begin, end)}) for begin, end in seen),
                "prefill_v_tiles_read": int(step.v_tiles_read[layer, rows.start : rows.stop].sum()),
                "prefill_kept_mass": pytest.approx(
                    step.kept_mass[layer, rows.start : rows.stop].double().sum().item() * 10**6,
                    rel=1e-6,
                ),
            }
