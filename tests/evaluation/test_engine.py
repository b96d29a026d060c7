"""What surrounds an engine under evaluation: variants, whose row predicts a token, counts."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_toptheta.evaluation import engine
from vllm_toptheta.kernels.columns import COLUMNS
from vllm_toptheta.requests import Target, Targets
from vllm_toptheta.telemetry.counters import summarise


def test_variants() -> None:
    found = engine.variants(["decode", "both"], [0.001], [64], [0.002], 256)
    assert [engine.label(options) for options in (None, *found)] == [
        "stock",
        "decode min_prob 0.001",
        "decode k 64",
        "both min_prob 0.001 prefill_min_prob 0.002",
        "both k 64 prefill_min_prob 0.002",
    ]
    assert all(options["min_kv_len"] == 256 for options in found)
    (alone,) = engine.variants(["prefill"], [0.001], [], [0.002], 0)
    assert alone == {"phases": "prefill", "min_prob": 0.001, "min_kv_len": 0}


def answer(document: list[int], prompt: int, logprob: float, counts: dict[str, int]) -> Any:
    """An engine's answer in which token t has log-probability t * logprob."""
    entries = [{token: SimpleNamespace(logprob=token * logprob)} for token in document]
    told = {
        "toptheta": summarise(
            Targets(Target(min_prob=0.001), None), [counts.get(name, 0) for name in COLUMNS]
        )
    }
    return SimpleNamespace(
        prompt_logprobs=[None, *entries[1:prompt]],
        outputs=[SimpleNamespace(logprobs=entries[prompt:])],
        kv_transfer_params=told if counts else None,
    )


def test_the_last_prompt_row_predicts_the_first_decoded_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    documents = [[9, 1, 2, 3, 4], [9, 5, 6, 7, 8]]
    counts = {
        "keys_scored": 10,
        "keys_kept": 5,
        "v_rows_scored": 10,
        "v_rows_read": 1,
        "prefill_rows": 3,
        "prefill_keys_scored": 8,
        "prefill_keys_kept": 2,
        "prefill_v_tiles": 4,
        "prefill_v_tiles_read": 3,
    }
    given: list[Any] = []

    def follow(logprob: float, told: dict[str, int]) -> None:
        def fake(_: Any, prompts: Any, forced: Any, *, score_prompts: bool) -> list[Any]:
            given[:] = [prompts, forced]
            assert score_prompts
            return [answer(ids, 3, logprob, told) for ids in documents]

        monkeypatch.setattr(engine, "follow", fake)

    follow(-0.1, {})
    stock = engine.evaluate_engine(None, documents, 3, None, None)
    assert given == [[[9, 1, 2], [9, 5, 6]], [[3, 4], [7, 8]]]
    assert (stock.num_prompt_tokens, stock.num_decode_tokens) == (6, 2)
    assert math.log(stock.prompt_perplexity) == pytest.approx(0.1 * (1 + 2 + 3 + 5 + 6 + 7) / 6)
    assert math.log(stock.decode_perplexity) == pytest.approx(0.1 * (4 + 8) / 2)
    assert math.log(stock.perplexity) == pytest.approx(0.1 * 36 / 8)
    assert stock.ratio_to_stock == stock.decode_ratio_to_stock == 1
    assert math.isnan(stock.decode_kept_fraction)

    follow(-0.2, counts)
    ours = engine.evaluate_engine(None, documents, 3, {"phases": "both", "min_prob": 0.001}, stock)
    assert math.log(ours.decode_ratio_to_stock) == pytest.approx(0.6)
    assert (ours.prompt_kept_fraction, ours.prompt_v_tile_fraction) == (0.25, 0.75)
    assert (ours.decode_kept_fraction, ours.decode_v_row_fraction) == (0.5, 0.1)


@pytest.mark.parametrize(
    ("prompt_tokens", "phases", "message"),
    [(300, "both", "from 2 to 256"), (256, "decode", "leaves no decode row")],
)
def test_nothing_to_prune(prompt_tokens: int, phases: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.compare_engines(
            "model",
            [],
            engine.variants([phases], [0.001], [], [], 0),
            length=256,
            prompt_tokens=prompt_tokens,
            num_documents=1,
            chunk=256,
            dtype="float32",
            report=print,
        )


def test_forced_tokens_leave_one_choice() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("vllm", reason="needs an installed vLLM")
    from vllm_toptheta.evaluation.forced_tokens import KEY, ForcedTokens

    processor = ForcedTokens(None, torch.device("cpu"), False)
    assert not processor.is_argmax_invariant()
    assert processor.new_req_logits_processor(SimpleNamespace(extra_args={})) is None
    assert processor.new_req_logits_processor(SimpleNamespace(extra_args=None)) is None
    force = processor.new_req_logits_processor(SimpleNamespace(extra_args={KEY: [5, 3]}))
    logits = torch.arange(8.0)
    assert [int(force(ids, logits).argmax()) for ids in ([], [5])] == [5, 3]
    assert force([5, 3], logits) is logits  # the rest is free
    assert torch.isfinite(force([], logits)).sum() == 1
    assert torch.equal(logits, torch.arange(8.0))
