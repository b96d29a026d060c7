"""What must not change the result of the CPU prefill kernels: chunks, threads, other requests."""

import math

import pytest
import torch
from cpu_cases import IMPLS, Spec, needs_native, slots_of, write
from prefill_cases import PrefillCase, PrefillResult, check_prefill, make_prefill_case

from vllm_toptheta.kernels.api import decode_attention

SHAPES = [(4, 4, 64, 32, 16), (9, 3, 64, 128, 32), (8, 2, 128, 128, 16), (8, 1, 80, 64, 64)]


def assert_same(result: PrefillResult, other: PrefillResult, dtype: torch.dtype) -> None:
    assert torch.equal(result.num_kept, other.num_kept)
    assert torch.equal(result.v_tiles_read, other.v_tiles_read)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result.out, other.out, rtol=close, atol=close)


def at_scores(case: PrefillCase) -> PrefillCase:
    """Put every threshold on a score up to rounding: the set is arbitrary, but always the same."""
    for seq, query_len in enumerate(case.query_lens):
        ranked = case.scores(seq).sort(-1, descending=True).values
        for row in range(query_len):
            visible = int(case.row_lens(seq)[row])
            case.theta[case.rows_of(seq).start + row] = ranked[:, row, visible // 8].float()
    return case


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 150, "sinks": True, "soft_cap": 3.0}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_and_threads_do_not_matter(
    shape: tuple[int, ...], options: dict[str, object], dtype: torch.dtype
) -> None:
    spec = Spec(*shape, lens=(400, 211), dtype=dtype, **options)
    case = at_scores(make_prefill_case(spec, (400, 100)))
    base = case.run("native", num_threads=1)
    for chunk in (256, 64, 37, 7):
        assert_same(case.run_in_chunks("native", chunk), base, dtype)
    for num_threads in (2, 3):
        assert torch.equal(case.run("native", num_threads=num_threads).out, base.out)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 150, "sinks": True, "soft_cap": 3.0}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_keeps_what_the_decode_kernel_keeps(
    shape: tuple[int, ...], options: dict[str, object], dtype: torch.dtype
) -> None:
    # One-hot V rows would need head_dim >= length; counts with thresholds on the scores do as well.
    spec = Spec(*shape, lens=(330,), dtype=dtype, **options)
    case = at_scores(make_prefill_case(spec, (330,)))
    result = case.run("native")
    rows = torch.arange(0, 330, 7)
    num = len(rows)
    out = torch.empty(num, spec.num_heads, spec.head_dim, dtype=dtype)
    num_kept = torch.empty(num, spec.num_heads, dtype=torch.int32)
    decode_attention(
        case.query[rows],
        case.cache.kv_cache,
        spec.layout,
        case.cache.block_table[:1].expand(num, -1),
        (rows + 1).int(),
        case.theta[rows],
        sm_scale=spec.sm_scale,
        dense=torch.zeros(num, dtype=torch.bool),
        compensation=True,
        window=spec.window,
        soft_cap=spec.soft_cap,
        sinks=case.cache.sinks,
        out=out,
        num_kept=num_kept,
        v_rows_read=torch.empty(num, spec.num_kv_heads, dtype=torch.int32),
        impl="native",
    )
    assert torch.equal(result.num_kept[rows], num_kept)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result.out[rows], out, rtol=close, atol=close)


@needs_native
def test_kept_sets_are_those_of_the_decode_kernel_and_of_any_chunk() -> None:
    # One-hot V rows without compensation show the set itself.
    spec = Spec(6, 2, 256, 32, 16, lens=(250,), compensation=False)
    case = at_scores(make_prefill_case(spec, (250,)))
    case.cache.values[0] = torch.eye(250, 256)[:, None].expand(-1, 2, -1).contiguous()
    write(case.cache, 0)
    whole = case.run("native").out != 0
    for chunk in (256, 64, 33, 1):
        assert torch.equal(case.run_in_chunks("native", chunk).out != 0, whole)
    out = torch.empty(250, 6, 256)
    decode_attention(
        case.query,
        case.cache.kv_cache,
        spec.layout,
        case.cache.block_table.expand(250, -1),
        torch.arange(1, 251, dtype=torch.int32),
        case.theta,
        sm_scale=spec.sm_scale,
        dense=case.dense,
        compensation=False,
        window=None,
        soft_cap=None,
        sinks=None,
        out=out,
        num_kept=torch.empty(250, 6, dtype=torch.int32),
        v_rows_read=torch.empty(250, 2, dtype=torch.int32),
        impl="native",
    )
    assert torch.equal(out != 0, whole)
    assert 0.1 < whole.sum() / (6 * 250 * 251 / 2) < 0.2


@pytest.mark.parametrize("impl", IMPLS)
def test_the_other_sequences_do_not_matter(impl: str) -> None:
    case = make_prefill_case(Spec(6, 2, 64, 32, 16, lens=(300, 63, 1, 200)), (300, 20, 1, 77))
    together = case.run(impl)
    for seq in range(4):
        alone = tuple(q if i == seq else 0 for i, q in enumerate(case.query_lens))
        part = case.run_chunk(impl, case.query_lens, alone)
        rows = case.rows_of(seq)
        expected = PrefillResult(
            together.out[rows], together.num_kept[rows], together.v_tiles_read[rows]
        )
        assert_same(part, expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [0.05, 0.9])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_that_no_row_sees_never_reaches_the_output(
    impl: str, window: int | None, kept: float, dtype: torch.dtype
) -> None:
    spec = Spec(6, 2, 64, 64, 16, (63, 523), window=window, kept=kept, dtype=dtype)
    case = make_prefill_case(spec, (20, 100))
    exact, _ = case.expected()
    for seq, length in enumerate(spec.lens):
        first = max(length - case.query_lens[seq] + 1 - (window or length), 0)
        hidden = slots_of(case.cache, seq)[:first]
        views = spec.layout.views(case.cache.kv_cache)
        block, offset = hidden // spec.block_size, hidden % spec.block_size
        views.key_cache.permute(0, 3, 1, 2)[block, offset] = math.nan
        views.value_cache.transpose(1, 2)[block, offset] = math.nan
        # Means of groups that the rows see only in part are not valid for them.
        views.v_means[block, :, offset // spec.group_size] = math.nan
    result = case.run(impl)
    assert result.out.isfinite().all()
    assert torch.equal(result.num_kept, exact.num_kept)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(result.out.double(), exact.out, rtol=0, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_later_tokens_of_the_cache_do_not_matter(impl: str) -> None:
    # A chunk in the middle of a prompt: the kernel sees seq_lens, not what was written behind it.
    case = make_prefill_case(Spec(6, 2, 64, 32, 16, lens=(400,)), (400,))
    whole, part = case.run(impl), case.run_chunk(impl, (173,), (60,))
    rows = slice(113, 173)
    expected = PrefillResult(whole.out[rows], whole.num_kept[rows], whole.v_tiles_read[rows])
    assert_same(part, expected, torch.float32)
    check_prefill(case, whole)
