"""What a row of a long prompt keeps, however the prompt is cut: thresholds placed on scores."""

import pytest
import torch
from cpu_cases import Spec, needs_native
from prefill_cases import PrefillResult, put_on_scores, unplaced_case

pytestmark = needs_native

LENS, QUERY_LENS = (2300, 150, 1, 700), (2300, 40, 1, 3)
ALONE = (2300, 0, 0, 0)


def assert_same(result: PrefillResult, expected: PrefillResult, dtype: torch.dtype) -> None:
    assert torch.equal(result.num_kept, expected.num_kept)
    assert torch.equal(result.v_tiles_read, expected.v_tiles_read)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result.out, expected.out, rtol=close, atol=close)


def first_rows(result: PrefillResult, begin: int, end: int) -> PrefillResult:
    return PrefillResult(
        result.out[begin:end], result.num_kept[begin:end], result.v_tiles_read[begin:end]
    )


@pytest.mark.parametrize(
    "spec",
    [
        Spec(3, 1, 64, 128, 16, LENS, torch.float32),
        Spec(4, 2, 64, 128, 128, LENS, torch.bfloat16),
        Spec(3, 1, 80, 16, 16, LENS, torch.bfloat16, window=1000),
    ],
    ids=str,
)
def test_a_long_prompt_keeps_the_same_keys_however_it_is_cut(spec: Spec) -> None:
    case = put_on_scores(unplaced_case(spec, QUERY_LENS))
    whole = first_rows(case.run_chunk("native", QUERY_LENS, ALONE), 0, 2300)
    visible = torch.arange(1, 2301).clamp(max=spec.window or 2300)
    assert 0.1 < whole.num_kept.double().sum() / visible.sum() / spec.num_heads < 0.16
    # In a batch with a chunk behind a prefix, a prompt of one token, and a few last tokens.
    assert_same(first_rows(case.run("native"), 0, 2300), whole, spec.dtype)
    for chunk in (256, 1024):
        assert_same(first_rows(case.run_in_chunks("native", chunk), 0, 2300), whole, spec.dtype)
    # Behind a cached prefix that ends in the middle of a page, a key tile and a V tile.
    for prefix in (256, 1243):
        behind = case.run_chunk("native", QUERY_LENS, (2300 - prefix, 0, 0, 0))
        assert_same(behind, first_rows(whole, prefix, 2300), spec.dtype)
