"""What must not change the result of the CPU kernels: cut, batch, blocks, old memory."""

import math

import pytest
import torch
from cpu_cases import IMPLS, Case, Result, Spec, check, make_case, needs_native, slots_of, write

LENS = (2011, 63, 1, 523)


def assert_same(result: Result, other: Result) -> None:
    assert torch.equal(result.num_kept, other.num_kept)
    assert torch.equal(result.v_rows_read, other.v_rows_read)
    torch.testing.assert_close(result.out, other.out, rtol=1e-5, atol=1e-6)


@needs_native
@pytest.mark.parametrize("options", [{}, {"window": 700, "sinks": True, "soft_cap": 3.0}], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (11, 1)])
def test_cut_and_threads_do_not_matter(
    num_heads: int, num_kv_heads: int, options: dict[str, object]
) -> None:
    case = make_case(Spec(num_heads, num_kv_heads, 64, 32, 16, lens=LENS, **options))
    base = case.run("native", num_splits=1, num_threads=1)
    check(case, base)
    for num_threads in (1, 2, 3):
        for num_splits in (2, 3, 7, 1000):
            assert_same(case.run("native", num_splits=num_splits, num_threads=num_threads), base)
    assert_same(case.run("native"), base)


@needs_native
@pytest.mark.parametrize("theta_in_score", [False, True])
def test_kept_set_is_exact_whatever_the_cut(theta_in_score: bool) -> None:
    # One-hot V rows without compensation show the set itself.
    case = make_case(Spec(6, 2, 256, 32, 16, lens=(250,), compensation=False, kept=0.3))
    case.values[0] = torch.eye(250, 256)[:, None].expand(-1, 2, -1).contiguous()
    write(case, 0)
    scores = case.scores(0)[:, 0]
    expected = scores >= case.theta[0].double()[:, None]
    if theta_in_score:
        # Theta equal to a score up to rounding: the set is arbitrary there, but always the same.
        case.theta[0] = scores.median(-1).values.float()
        expected = None
    for num_splits in (1, 2, 5, 8):
        result = case.run("native", num_splits=num_splits, num_threads=2)
        kept = result.out[0, :, :250] != 0
        expected = kept if expected is None else expected
        assert torch.equal(kept, expected)
        assert torch.equal(kept.sum(-1).int(), result.num_kept[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_batch_order_does_not_matter(impl: str) -> None:
    case = make_case(Spec(6, 2, 64, 32, 16, lens=LENS))
    base = case.run(impl)
    order = torch.tensor([2, 0, 3, 1])
    moved = Case(
        Spec(6, 2, 64, 32, 16, lens=tuple(LENS[i] for i in order)),
        case.query[order],
        [case.keys[i] for i in order],
        [case.values[i] for i in order],
        case.kv_cache,
        case.block_table[order],
        case.theta[order],
        None,
    )
    result = moved.run(impl)
    assert_same(result, Result(base.out[order], base.num_kept[order], base.v_rows_read[order]))


@pytest.mark.parametrize("impl", IMPLS)
def test_block_table_does_not_matter(impl: str) -> None:
    case = make_case(Spec(6, 2, 64, 32, 16, lens=LENS), num_spare_blocks=40)
    base = case.run(impl)
    order = torch.randperm(case.kv_cache.shape[0], generator=torch.Generator().manual_seed(1))
    inverse = order.argsort().to(torch.int32)
    case.kv_cache = case.kv_cache[order].contiguous()
    used = case.block_table < order.numel()
    case.block_table[used] = inverse[case.block_table[used].long()]
    moved = case.run(impl)
    assert torch.equal(moved.out, base.out) or impl == "native"
    assert_same(moved, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [0.05, 0.9])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_outside_the_row_never_reaches_the_output(
    impl: str, window: int | None, kept: float, dtype: torch.dtype
) -> None:
    spec = Spec(6, 2, 64, 64, 16, (1, 63, 523), window=window, kept=kept, dtype=dtype)
    case = make_case(spec)
    exact, _ = case.expected()
    for seq, length in enumerate(spec.lens):
        first = max(length - (window or length), 0)
        hidden = slots_of(case, seq)[:first]
        views = spec.layout.views(case.kv_cache)
        block, offset = hidden // spec.block_size, hidden % spec.block_size
        views.key_cache.permute(0, 3, 1, 2)[block, offset] = math.nan
        views.value_cache.transpose(1, 2)[block, offset] = math.nan
        # Means of groups that the row sees only in part are not valid for it.
        views.v_means[block, :, offset // spec.group_size] = math.nan
    result = case.run(impl)
    assert result.out.isfinite().all()
    assert torch.equal(result.num_kept, exact.num_kept)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(result.out.double(), exact.out, rtol=0, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_blocks_can_be_used_again_by_another_request(impl: str) -> None:
    first = make_case(Spec(6, 2, 64, 32, 16, lens=(523, 200)))
    second = make_case(Spec(6, 2, 64, 32, 16, lens=(170, 500), seed=5))
    fresh = second.run(impl)
    second.kv_cache = first.kv_cache
    second.block_table = first.block_table.flip(0)[:, : second.block_table.shape[1]]
    second.block_table[:, -1] = first.block_table[0, 16]
    spare = [b for b in range(first.kv_cache.shape[0]) if b not in first.block_table.tolist()[0]]
    blocks = torch.tensor(spare + first.block_table[0, :16].tolist(), dtype=torch.int32)
    second.block_table = blocks[:34].view(2, 17)
    for seq in range(2):
        write(second, seq)
    reused = second.run(impl)
    assert_same(reused, fresh)
    check(second, reused)


@needs_native
def test_results_are_repeatable() -> None:
    case = make_case(Spec(9, 3, 64, 32, 16, lens=LENS, dtype=torch.bfloat16))
    base = case.run("native", num_splits=5, num_threads=2)
    for _ in range(20):
        assert torch.equal(case.run("native", num_splits=5, num_threads=2).out, base.out)
