"""What must not change which keys a prompt row keeps: chunks, prefixes, threads, other requests.

Thresholds lie on keys, so that the last bit of a score or of the running denominator decides.
"""

import pytest
import torch
from decode_calls import torch_threads
from prompt_cases import (
    Prompts,
    assert_same,
    check,
    make_prompts,
    needs_native,
    rows_of_result,
    unplaced_prompts,
)

from vllm_toptheta.testing.cases import Result, Spec

pytestmark = needs_native

SHAPES = [(4, 4, 64, 32), (9, 3, 64, 128), (8, 2, 128, 128), (8, 1, 80, 64), (5, 1, 16, 96)]


def on_keys(spec: Spec) -> Prompts:
    prompts = unplaced_prompts(spec)
    prompts.place_on_keys()
    return prompts


def test_thresholds_really_lie_on_keys() -> None:
    prompts = on_keys(Spec(9, 3, 64, 128, lens=(600,), query_lens=(600,)))
    counts = []
    for shift in (-1e-5, 1e-5):
        prompts.case.log_min_prob += shift
        counts.append(prompts.run().num_kept)
        prompts.case.log_min_prob -= shift
    # Of the others, the key lies in a group that the row sees in part.
    assert (counts[0] != counts[1])[64:].float().mean() > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 150, "sinks": True, "soft_cap": 3.0}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_and_threads_do_not_matter(
    shape: tuple[int, ...], options: dict[str, object], dtype: torch.dtype
) -> None:
    lens, query_lens = (420, 211), (420, 100)
    spec = Spec(*shape, lens=lens, query_lens=query_lens, dtype=dtype, **options)  # type: ignore[arg-type]
    prompts = on_keys(spec)
    base = prompts.run(num_threads=1)
    for chunk in (256, 64, 37, 7):
        assert_same(prompts.run_in_chunks(chunk), base)
    for num_threads in (2, 3):
        assert torch.equal(prompts.run(num_threads=num_threads).out, base.out)
    with torch_threads(2):
        assert torch.equal(prompts.run().out, base.out)


LENS, QUERY_LENS = (1700, 150, 1, 700), (1700, 40, 1, 3)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(3, 1, 64, 128, LENS, QUERY_LENS),
        Spec(4, 2, 64, 128, LENS, QUERY_LENS, torch.bfloat16),
        Spec(3, 1, 80, 16, LENS, QUERY_LENS, torch.bfloat16, window=1000),
    ],
    ids=str,
)
def test_a_long_prompt_keeps_the_same_keys_however_it_is_cut(spec: Spec) -> None:
    prompts, length = on_keys(spec), LENS[0]
    whole = prompts.run_chunk(QUERY_LENS, (length, 0, 0, 0))

    def first_rows(result: Result) -> Result:
        return rows_of_result(result, slice(0, length))

    # In a batch with a chunk behind a prefix, a prompt of one token, and a few last tokens.
    assert_same(first_rows(prompts.run()), whole)
    for chunk in (256, 1000):
        assert_same(first_rows(prompts.run_in_chunks(chunk)), whole)
    # Behind a cached prefix that ends in the middle of a page, a key tile and a V tile.
    for prefix in (256, 1243):
        behind = prompts.run_chunk(QUERY_LENS, (length - prefix, 0, 0, 0))
        assert_same(behind, rows_of_result(whole, slice(prefix, length)))


def test_kept_keys_themselves_do_not_depend_on_the_chunk() -> None:
    # One-hot V rows show the set; with blocks of 16, means shine through on short groups only.
    spec = Spec(6, 2, 256, 32, (250,), (250,))
    prompts = on_keys(spec)
    prompts.case.values[0] = torch.eye(250, 256)[:, None].expand(-1, 2, -1).contiguous()
    prompts.write_pages()
    prompts.layout.v_means(prompts.pages).zero_()
    whole = prompts.run().out != 0
    for chunk in (256, 64, 33, 1):
        assert torch.equal(prompts.run_in_chunks(chunk).out != 0, whole)
    assert 0.1 < whole.sum() / (6 * 250 * 251 / 2) < 0.5


def test_the_other_sequences_do_not_matter() -> None:
    spec = Spec(6, 2, 64, 32, (300, 63, 1, 200), (300, 20, 1, 77))
    prompts = on_keys(spec)
    together = prompts.run()
    for seq, query_len in enumerate(prompts.query_lens):
        alone = tuple(query_len if i == seq else 0 for i in range(4))
        part = prompts.run_chunk(prompts.query_lens, alone)
        assert_same(part, rows_of_result(together, prompts.rows_of(seq)))


def test_later_tokens_of_the_cache_do_not_matter() -> None:
    # A chunk in the middle of a prompt: the kernel sees seq_lens, not what was written behind it.
    prompts = make_prompts(Spec(6, 2, 64, 32, (400,), (400,)))
    whole, part = prompts.run(), prompts.run_chunk((173,), (60,))
    assert_same(part, rows_of_result(whole, slice(113, 173)))
    check(prompts, whole)
