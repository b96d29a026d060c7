"""What must not change the result of CPU decode: cut, threads, batch, blocks, old memory."""

import math
from dataclasses import replace

import pytest
import torch
from decode_calls import (
    TARGETS,
    check,
    decode,
    expected_keys,
    kept_keys,
    long_spec,
    needs_native,
    torch_threads,
)

from vllm_toptheta.kernels import ops
from vllm_toptheta.kernels.layout import PageLayout
from vllm_toptheta.testing.cases import Case, Result, Spec, make_case

OPTIONS = [{}, {"window": 700, "sinks": True, "soft_cap": 3.0}, {"min_mass": 0.8}]


def assert_same(result: Result, other: Result) -> None:
    """The same keys, so the same counts and masses bit by bit; outputs but for their rounding."""
    assert torch.equal(result.num_kept, other.num_kept)
    assert torch.equal(result.lifts, other.lifts)
    assert torch.equal(result.kept_mass, other.kept_mass)
    torch.testing.assert_close(result.out, other.out, rtol=1e-5, atol=1e-5)


def on_a_key(case: Case) -> Case:
    """Thresholds at the log p of some key: whether it is kept is arbitrary, but always the same."""
    case = replace(case, log_min_prob=case.log_min_prob.clone())
    for row, (_, visible) in enumerate(case.spec.rows):
        if visible:
            log_p = case.select(row).probs.log().unflatten(0, (case.spec.num_kv_heads, -1))
            wanted = log_p.amax(1)[:, 0]
            case.log_min_prob[row] = wanted[:, visible // 2].float()
    return case


@needs_native
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (11, 1)])
def test_cut_and_threads_do_not_matter(
    num_heads: int, num_kv_heads: int, options: dict[str, object]
) -> None:
    case = make_case(long_spec(num_heads=num_heads, num_kv_heads=num_kv_heads, **options))
    base = decode(case, num_splits=1, num_threads=1)
    check(case, base)
    for num_threads, num_splits in [(1, 2), (2, 3), (8, 5), (3, 7), (2, 16), (8, 1000)]:
        assert_same(decode(case, num_splits=num_splits, num_threads=num_threads), base)
    for number in (1, 2):
        with torch_threads(number):
            assert_same(decode(case), base)


@needs_native
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_list_is_the_same_whatever_the_cut(options: dict[str, object]) -> None:
    case = make_case(Spec(lens=(523, 90), min_prob=0.003, **options))  # type: ignore[arg-type]
    expected = expected_keys(case)
    on_key = on_a_key(case)
    arbitrary = kept_keys(on_key)
    for num_splits in (1, 2, 9):
        assert torch.equal(kept_keys(case, num_splits=num_splits), expected)
        assert torch.equal(kept_keys(on_key, num_splits=num_splits, num_threads=2), arbitrary)


@needs_native
def test_dense_rows_do_not_depend_on_the_cut() -> None:
    case = make_case(long_spec(dense_rows=(0, 3), dtype=torch.float32))
    base = decode(case, num_splits=1, num_threads=1)
    for num_splits in (3, 16):
        assert_same(decode(case, num_splits=num_splits), base)


@pytest.mark.parametrize("target", TARGETS)
def test_batch_order_does_not_matter(target: ops.Target) -> None:
    case = on_a_key(make_case(long_spec()))
    base = decode(case, target)
    order = [2, 0, 3, 1, 0]
    moved = Case(
        replace(case.spec, lens=tuple(case.spec.lens[i] for i in order)),
        case.query[order],
        [case.keys[i] for i in order],
        [case.values[i] for i in order],
        case.scales,
        case.block_table[order],
        case.num_blocks,
        case.log_min_prob[order],
        case.min_mass[order],
        case.weights,
        case.dense[order],
        None,
    )
    result = decode(moved, target)
    assert_same(result, Result(*(tensor[order] for tensor in vars(base).values())))


@pytest.mark.parametrize("target", TARGETS)
def test_block_table_does_not_matter(target: ops.Target) -> None:
    case = on_a_key(make_case(long_spec()))
    base = decode(case, target)
    order = torch.randperm(case.num_blocks, generator=torch.Generator().manual_seed(1))
    used = case.block_table < case.num_blocks
    table = case.block_table.clone()
    table[used] = order[table[used].long()].to(torch.int32)
    assert_same(decode(replace(case, block_table=table), target), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("min_prob", [0.01, 1e-6])
@pytest.mark.parametrize("target", TARGETS)
def test_nan_outside_the_row_never_reaches_the_output(
    target: ops.Target, min_prob: float, dtype: torch.dtype
) -> None:
    """What lies before a window may be as stale as what lies behind the end."""
    spec = Spec(lens=(1, 63, 523), window=90, min_prob=min_prob, dtype=dtype)
    case = make_case(spec)
    pages, layout = case.cpu_pages()
    ops.update_side_data(pages, layout, case.slots(), target=target)
    for seq, length in enumerate(spec.lens):
        position = torch.arange(max(length - 90, 0))
        block, slot = case.block_table[seq].long()[position // 64], position % 64
        layout.keys(pages).transpose(1, 2)[block, slot] = math.nan
        layout.values(pages).transpose(1, 2)[block, slot] = math.nan
        layout.v_means(pages).transpose(1, 2)[block, 0] = math.nan
    result = decode(case, target, pages=pages)
    assert result.out.isfinite().all()
    check(case, result)


@needs_native
def test_what_the_thread_did_before_does_not_matter() -> None:
    case, longer = make_case(long_spec()), make_case(long_spec(lens=(2500,), head_dim=128))
    base = decode(case)
    decode(longer)
    for _ in range(5):
        again = decode(case)
        assert torch.equal(again.out, base.out)
        assert_same(again, base)


@needs_native
def test_rows_of_wider_tensors() -> None:
    """First strides are free: outputs and thresholds as slices of what vLLM allocates."""
    case = make_case(Spec())
    base = decode(case)
    wide = torch.full((4, 5), 9.0)
    wide[:, 1:3] = case.log_min_prob
    assert_same(decode(replace(case, log_min_prob=wide[:, 1:3])), base)
    assert PageLayout(64, 64).group_size == 64
