"""Every rule keeps what its definition says, and its counts are those of what it kept."""

import math

import pytest
import torch
from torch import Tensor

from vllm_toptheta.calibration.attention import AttentionCall, dense_attention
from vllm_toptheta.evaluation import rules
from vllm_toptheta.kernels import reference

HEADS, KV_HEADS, KEYS, ROWS = 6, 2, 500, 40


def make_call(seed: int = 0) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return AttentionCall(
        layer=0,
        query=normal(ROWS, HEADS, 16) * 2,
        key=normal(KEYS, KV_HEADS, 16),
        value=normal(KEYS, KV_HEADS, 16),
        sm_scale=0.25,
        window=None,
        soft_cap=None,
        sinks=None,
    )


def selection(rule: rules.Rule, call: AttentionCall) -> reference.Selection:
    rows = torch.arange(KEYS - ROWS, KEYS)
    return rule.select(call, call.scores(rows), rows)


@pytest.mark.parametrize("window", [None, 100])
def test_dense_is_dense(window: int | None) -> None:
    call = AttentionCall(**{**vars(make_call()), "window": window})
    rule = rules.Dense()
    assert torch.allclose(rule(call), dense_attention(call), atol=1e-5)
    assert rule.tally.v_read == rule.tally.v_seen
    assert rule.tally.pruned == 0
    assert rule.tally.mass == pytest.approx(HEADS * ROWS, rel=1e-5)


def test_top_theta_is_the_reference_and_is_counted() -> None:
    call = make_call()
    rule = rules.TopTheta(0.01, None, 0.5, None)
    output = rule(call)
    scores = call.scores(torch.arange(KEYS - ROWS, KEYS)).double()
    threshold = torch.full((KV_HEADS, ROWS), math.log(0.01))
    chosen = reference.select(scores, threshold, 0.5, group_size=64)
    expected = reference.compensated_output(
        chosen, call.value.double(), rule.weights(call), group_size=64
    )
    assert torch.allclose(output.double(), expected, atol=1e-5)
    tally = rule.tally
    assert tally.v_read == int(chosen.kept.sum())
    assert tally.kept == int(chosen.kept.sum()) * HEADS // KV_HEADS
    assert tally.mass == pytest.approx(float(chosen.kept_mass.sum()), rel=1e-5)
    assert tally.lifted == int((chosen.lifts > 0).sum()) * HEADS // KV_HEADS > 0
    assert tally.pruned == tally.rows == HEADS * ROWS


def test_short_rows_are_dense() -> None:
    rule = rules.TopTheta(0.01, None, 0.0, None, min_kv_len=KEYS - ROWS // 2)
    rule(make_call())
    assert rule.tally.pruned == HEADS * ROWS // 2


def test_top_k_keeps_k() -> None:
    kept = selection(rules.TopK(17), make_call()).kept
    assert (kept.sum(-1) == 17).all()


def test_a_nucleus_is_the_smallest_that_holds_its_share() -> None:
    call = make_call()
    chosen = selection(rules.Nucleus(0.8), call)
    assert (chosen.kept_mass >= 0.8 - 1e-6).all()
    least = (chosen.probs + (~chosen.kept) * 2).amin(-1)
    assert (chosen.kept_mass - least < 0.8).all()


def test_quest_keeps_whole_pages_with_the_ends() -> None:
    chosen = selection(rules.Quest(64), make_call())
    pages = torch.nn.functional.pad(chosen.kept, (0, -KEYS % 16)).unflatten(-1, (-1, 16)).any(-1)
    assert pages[..., 0].all()
    assert pages[:, -1, -1].all()
    # The best key is always there; where it is in no chosen page, its page comes on top.
    assert (pages.sum(-1) >= 4).all()
    assert (pages.sum(-1) <= 5).all()


def test_quests_bound_finds_the_page_of_a_key_that_stands_out() -> None:
    call = make_call()
    call.key[163] = 0.0
    call.key[163, 0] = call.query[5, 0] * 10
    assert selection(rules.Quest(48), call).kept[0, 5, 160:176].all()


def test_blasst_drops_tiles_below_the_running_maximum() -> None:
    call = make_call()
    call.key[:64] *= 3
    chosen = selection(rules.Blasst(0.3), call)
    scores = call.scores(torch.arange(KEYS - ROWS, KEYS))
    head, row = 0, 0
    tiles = [scores[head, row, i : i + 64] for i in range(0, KEYS, 64)]
    running = -math.inf
    for i, tile in enumerate(tiles):
        running = max(running, float(tile.max()))
        wanted = float(tile.max()) >= running + math.log(0.3)
        visible = chosen.visible[row, i * 64 : i * 64 + 64]
        assert torch.equal(chosen.kept[head, row, i * 64 : i * 64 + 64], visible & wanted)


def test_a_window_keeps_the_first_four_and_the_last() -> None:
    chosen = selection(rules.Window(50), make_call())
    outside = chosen.kept[:, -1, 4:-50].sum(-1)
    assert chosen.kept[:, -1, :4].all()
    assert chosen.kept[:, -1, -50:].all()
    assert (outside <= 1).all()  # the best key


def test_the_papers_threshold_aims_at_k_on_what_it_saw() -> None:
    call = make_call()
    rule = rules.Paper(32)
    rule.observe(call)
    scores = call.scores(torch.arange(KEYS - ROWS, KEYS))
    mean = (scores >= rule._theta[0][:, None, None]).sum(-1).float().mean()
    assert 25 < float(mean) < 45


@pytest.mark.parametrize("spec", rules.DEFAULT_RIVALS)
def test_rivals_by_name(spec: str) -> None:
    assert rules.rival(spec).name == spec


@pytest.mark.parametrize("spec", ["top_p:0.9", "top_k", "top_k:many", ""])
def test_an_unknown_rival_is_refused_with_examples(spec: str) -> None:
    with pytest.raises(ValueError, match=r"expected NAME:SETTING .* top_k:64"):
        rules.rival(spec)


def test_an_fp8_cache_is_dense_attention_over_rounded_rows() -> None:
    call = make_call()
    rule = rules.rival("fp8:2")

    def rounded(x: Tensor) -> Tensor:
        return (x / 2).to(torch.float8_e4m3fn).float() * 2

    over = AttentionCall(**{**vars(call), "key": rounded(call.key), "value": rounded(call.value)})
    assert torch.allclose(rule(call), dense_attention(over), atol=1e-5)
    assert not torch.allclose(rule(call), dense_attention(call), atol=1e-3)
    assert rule.v_row_bytes * rule.tally.v_read == rule.tally.v_seen / 2
    assert rule.tally.pruned == 0
