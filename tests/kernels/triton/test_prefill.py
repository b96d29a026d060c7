"""The Triton prefill kernel against the float64 specification, branch by branch."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from decode_runs import new_means
from prefill_runs import new_pages, rows_of, run, run_chunks, spoil
from triton_interpreter import needs_interpreter

from vllm_toptheta.kernels.reference import softmax
from vllm_toptheta.testing.cases import Case, Result, Spec, error_budget, make_case

pytestmark = needs_interpreter

BASE = Spec(
    lens=(1, 63, 210, 90, 40),
    query_lens=(1, 12, 21, 1, 0),
    dtype=torch.bfloat16,
    min_prob=0.02,
    tile=64,
)


def spec(**changes: Any) -> Spec:
    return dataclasses.replace(BASE, **changes)


CASES = {
    "plain": BASE,
    "fp16": spec(dtype=torch.float16, seed=1),
    "one head a group": spec(num_heads=2, seed=2),
    "sixteen heads a group": spec(num_heads=16, num_kv_heads=1, seed=3),
    "seven heads a group": spec(num_heads=7, num_kv_heads=1, block_size=16, seed=4),
    "head_dim 32": spec(head_dim=32, block_size=32, seed=5),
    "head_dim 80": spec(head_dim=80, block_size=128, seed=6),
    "head_dim 256": spec(head_dim=256, block_size=16, lens=(170,), query_lens=(9,), seed=7),
    "block 96": spec(block_size=96, seed=8),
    "a whole prompt": spec(lens=(100,), query_lens=(100,), num_heads=2, num_kv_heads=1, seed=9),
    "window": spec(window=100, seed=10),
    "window of one key": spec(window=1, seed=11),
    "window within a group": spec(window=7, block_size=16, seed=12),
    "window of whole groups": spec(window=128, lens=(320,), query_lens=(40,), seed=13),
    "soft cap": spec(soft_cap=3.0, seed=14),
    "sinks": spec(sinks=True, seed=15),
    "window, sinks, soft cap": spec(window=90, sinks=True, soft_cap=3.0, block_size=16, seed=16),
    "dense rows": spec(sinks=True, dense_rows=tuple(range(0, 35, 3)), seed=17),
    "dense tiles": spec(sinks=True, dense_rows=tuple(range(35)), seed=18),
    "keep almost all": spec(min_prob=1e-5, seed=19),
    "keep almost none": spec(min_prob=0.9, lens=(1, 60, 230, 90, 40), seed=20),
    "fp8": spec(cache_dtype=torch.float8_e4m3fn, dtype=torch.float16, seed=21),
    "fp8, block 16": spec(cache_dtype=torch.float8_e4m3fn, block_size=16, seed=22),
}


def check(case: Case, result: Result) -> None:
    """Counts equal the specification's; outputs err by rounding at most."""
    expected = case.expected()
    assert torch.equal(result.num_kept, expected.num_kept)
    assert torch.equal(result.v_tiles_read, expected.v_tiles_read)
    torch.testing.assert_close(result.kept_mass, expected.kept_mass, rtol=0, atol=2e-5)
    # Probabilities too are rounded, before the product with V.
    largest = max(float(v.double().abs().max()) for v in case.values if len(v)) * case.scales[1]
    allowed = error_budget(case, expected.out) + largest * torch.finfo(case.spec.dtype).eps / 2
    error = (result.out.double() - expected.out).abs()
    assert (error <= allowed).all(), (error - allowed).max()


def assert_same_kept(result: Result, other: Result) -> None:
    assert torch.equal(result.num_kept, other.num_kept)
    assert torch.equal(result.v_tiles_read, other.v_tiles_read)
    torch.testing.assert_close(result.kept_mass, other.kept_mass, rtol=0, atol=2e-5)
    torch.testing.assert_close(result.out, other.out, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", CASES)
def test_matches_the_specification(name: str) -> None:
    case = make_case(CASES[name])
    check(case, run(case))


@pytest.mark.parametrize("rows", [16, 32, 128])
def test_the_size_of_row_tiles_does_not_matter(rows: int) -> None:
    case = make_case(CASES["window, sinks, soft cap"])
    check(case, run(case, rows=rows))


def test_pruning_is_visible() -> None:
    """The cases would pass a dense kernel if nothing were pruned."""
    case = make_case(BASE)
    kept = case.expected()
    case.dense.fill_(True)
    dense = case.expected()
    longest = rows_of(case, (1, 12, 21, 1, 0), (0, 0, 1, 0, 0))
    assert kept.num_kept[longest].max() < 210 / 2
    assert kept.kept_mass[longest].max() < 0.95
    assert (dense.out[longest] - kept.out[longest]).abs().max() > 0.1


def test_thresholds_that_no_key_misses() -> None:
    case = make_case(spec(window=70, sinks=True, seed=23))
    case.log_min_prob.fill_(-1e30)
    expected = run(case)
    check(case, expected)
    assert torch.equal(expected.kept_mass, torch.ones_like(expected.kept_mass))
    case.log_min_prob.fill_(-math.inf)
    assert torch.equal(run(case).num_kept, expected.num_kept)
    case.dense.fill_(True)
    case.log_min_prob.fill_(1.0)
    assert_same_kept(run(case), expected)


def test_thresholds_that_no_key_reaches() -> None:
    """The keys alone whose group has no stored mean; a row may have none."""
    case = make_case(spec(lens=(200, 128), query_lens=(7, 1), seed=29))
    case.log_min_prob.fill_(1.0)
    result = run(case)
    assert result.num_kept[:, 0].tolist() == [2, 3, 4, 5, 6, 7, 8, 0]
    assert not result.kept_mass[-1].any()
    probs = softmax(case.scores(7))[:, 0].unflatten(-1, (2, 64)).sum(-1)
    means = case.values[1].double().unflatten(0, (2, 64)).mean(1).repeat_interleave(3, 1)
    expected = torch.einsum("hg,ghd->hd", probs, means)
    torch.testing.assert_close(result.out[-1].double(), expected, rtol=0, atol=1e-2)


def test_tiles_of_v_without_a_kept_key_are_not_read() -> None:
    case = make_case(spec(lens=(200,), query_lens=(7,), seed=24))
    case.log_min_prob.fill_(1.0)
    kv_cache, means = new_pages(case)
    for block in case.block_table[0, :3].long():
        kv_cache[block, ..., case.spec.head_dim :] = math.nan
    result = run(case, pages=(kv_cache, means))
    check(case, result)
    assert (result.v_tiles_read == 1).all()


@pytest.mark.parametrize(
    "changes", [{}, {"window": 70, "sinks": True, "soft_cap": 3.0, "block_size": 16}], ids=str
)
def test_chunks_do_not_matter(changes: Any) -> None:
    """Nor is anything read that a chunk does not hold yet."""
    case = make_case(
        spec(lens=(150, 70), query_lens=(50, 20), num_kv_heads=1, num_heads=2, seed=25, **changes)
    )
    whole = run(case)
    check(case, whole)
    for chunk in (33, 9):
        assert_same_kept(run_chunks(case, chunk), whole)


def test_kept_sets_are_the_specifications_whatever_the_chunk() -> None:
    """Read off outputs whose V rows are one-hot in the position: every head of the group has every
    kept key."""
    case = make_case(
        spec(lens=(128,), query_lens=(60,), head_dim=128, num_heads=3, num_kv_heads=1, seed=26)
    )
    case.values[0] = torch.eye(128).to(case.spec.dtype)[:, None]
    kv_cache, means = new_pages(case)
    means.zero_()
    expected = torch.zeros(60, 3, 128, dtype=torch.bool)
    for row in range(60):
        kept = case.select(row).kept[0, 0]
        expected[row, :, : len(kept)] = kept
    assert 0.1 < expected.float().mean() < 0.6
    for chunk in (60, 33, 9):
        result = run_chunks(case, chunk, (kv_cache, means))
        assert torch.equal(result.out != 0, expected), chunk


def test_the_other_sequences_do_not_matter() -> None:
    case = make_case(spec(lens=(140, 63, 1, 100), query_lens=(20, 9, 1, 12), seed=27))
    counts, pages = case.spec.query_lens, new_pages(case)
    together = run(case, pages=pages)
    for seq in range(4):
        alone = tuple(q if i == seq else 0 for i, q in enumerate(counts))
        part, rows = run(case, upto=counts, take=alone, pages=pages), rows_of(case, counts, alone)
        for name, tensor in vars(part).items():
            # The same tiles of the same rows: not a bit may differ.
            assert torch.equal(tensor, getattr(together, name)[rows]), name


@pytest.mark.parametrize("min_prob", [0.02, 1e-5])
@pytest.mark.parametrize("window", [None, 45])
def test_what_no_row_sees_never_reaches_the_output(window: int | None, min_prob: float) -> None:
    """Slots that were never written, and those of a block's earlier owner."""
    counts = (12, 21)
    case = make_case(
        spec(lens=(63, 141), query_lens=counts, window=window, min_prob=min_prob, seed=28)
    )
    results = []
    for value in (math.nan, 1e4):
        pages = new_pages(case)
        spoil(case, pages, counts, value)
        results.append(run(case, pages=pages))
    check(case, results[0])
    assert torch.equal(results[0].out, results[1].out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_min_prob": torch.zeros(33, 6)}, r"log_min_prob must be \[33, 2\]"),
        ({"dense": torch.zeros(33)}, "dense must be contiguous"),
        ({"num_kept": torch.zeros(33, 6, dtype=torch.int32)}, r"num_kept must be .* \[33, 2\]"),
        ({"kept_mass": torch.zeros(33, 2)}, r"kept_mass must be contiguous \[33, 6\]"),
        ({"query_start_loc": torch.zeros(2, dtype=torch.int32)}, "query_start_loc must be"),
        ({"block_table": torch.zeros(2, 3)}, r"block_table must be \[2, max_blocks\]"),
        ({"k_scale": torch.ones(1)}, "together"),
        ({"sinks": torch.zeros(3)}, "sinks must be"),
        ({"rows": 18}, "4 times 1 to 64 tokens"),
        ({"rows": 512}, "4 times 1 to 64 tokens"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    from vllm_toptheta.kernels.triton.config import PrefillConfig
    from vllm_toptheta.kernels.triton.prefill import prefill_attention

    case = make_case(spec(lens=(63, 90), query_lens=(12, 21)))
    kv_cache, means = case.gpu_pages(), new_means(case)
    key, value = kv_cache.split(64, dim=-1)
    result = Result.empty(case.spec)
    arguments: dict[str, Any] = {
        "query": case.query.contiguous(),
        "key_cache": key,
        "value_cache": value,
        "v_means": means,
        "block_table": case.block_table,
        "query_start_loc": case.query_start_loc,
        "seq_lens": case.seq_lens,
        "log_min_prob": case.log_min_prob,
        "sm_scale": 0.1,
        "dense": case.dense.to(torch.int8),
        "out": result.out,
        "num_kept": result.num_kept,
        "v_tiles_read": result.v_tiles_read,
        "kept_mass": result.kept_mass,
        "config": PrefillConfig(rows=changes.pop("rows", 32)),
    }
    with pytest.raises(ValueError, match=message):
        prefill_attention(**(arguments | changes))
