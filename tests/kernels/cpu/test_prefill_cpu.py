"""The CPU targets of prefill attention against the specification."""

import ctypes
import math
import mmap
import multiprocessing
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_cases import TARGETS, Prompts, check, make_prompts, needs_native, unplaced_prompts

from vllm_toptheta.kernels.layout import V_TILE
from vllm_toptheta.testing.cases import Spec

LENS, QUERY_LENS = (1, 63, 290, 200, 40), (1, 40, 70, 1, 0)
SHAPES = [
    # heads, kv heads, head_dim, block_size
    (2, 2, 64, 128),
    (9, 3, 64, 64),
    (8, 2, 128, 192),
    (8, 1, 80, 32),
    (8, 1, 256, 128),
    (10, 2, 96, 512),
    (7, 1, 32, 16),
    (4, 2, 48, 96),
]
OPTIONS = [
    {"window": 100},
    {"window": 1},
    {"window": 200, "sinks": True, "dense_rows": (45, 90, 91, 111)},
    {"soft_cap": 2.0},
    {"sinks": True},
    {"min_prob": 0.1},
    {"min_prob": 1e-5},
    {"dense_rows": (0, 3, 4, 5, 80, 81, 100, 111)},
]


def shaped(shape: tuple[int, ...], **options: object) -> Spec:
    return Spec(*shape, **{"lens": LENS, "query_lens": QUERY_LENS, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@needs_native
def test_native_matches_the_specification(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    prompts = make_prompts(shaped(shape, dtype=dtype))
    check(prompts, prompts.run())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_options_match_the_specification(target: str, options: dict[str, object]) -> None:
    prompts = make_prompts(shaped((6, 2, 64, 64), **options))
    check(prompts, prompts.run(target))


@pytest.mark.parametrize("window", [None, 300])
def test_eager_matches_the_specification_behind_a_prefix(window: int | None) -> None:
    spec = Spec(4, 2, 48, 32, lens=(700, 90), query_lens=(60, 90), window=window)
    prompts = make_prompts(spec)
    check(prompts, prompts.run("eager"))


@needs_native
@pytest.mark.parametrize("head_dim", [64, 96])
def test_pages_in_amx_tiles_give_the_same_bits(head_dim: int) -> None:
    prompts = make_prompts(shaped((6, 2, head_dim, 64), dtype=torch.bfloat16, window=250))
    plain = prompts.run()
    check(prompts, plain)
    prompts.write_pages("amx")
    tiles = prompts.run()
    assert torch.equal(tiles.out, plain.out)
    assert torch.equal(tiles.num_kept, plain.num_kept)


@needs_native
@settings(max_examples=25, deadline=None)
@given(
    group=st.sampled_from([1, 2, 3, 4, 5, 8, 9]),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([16, 48, 64, 80]),
    block_size=st.sampled_from([16, 32, 64, 96, 128, 256]),
    lens=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), min_size=1, max_size=3),
    min_prob=st.floats(-12, -1).map(math.exp),
    window=st.none() | st.integers(1, 400),
    soft_cap=st.none() | st.just(5.0),
    sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_native_matches_the_specification_everywhere(
    group: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    lens: list[tuple[int, int]],
    min_prob: float,
    window: int | None,
    soft_cap: float | None,
    sinks: bool,
    seed: int,
) -> None:
    spec = Spec(
        group * num_kv_heads,
        num_kv_heads,
        head_dim,
        block_size,
        lens=tuple(max(pair) for pair in lens),
        query_lens=tuple(min(pair) for pair in lens),
        min_prob=min_prob,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        seed=seed,
    )
    if spec.rows:
        prompts = make_prompts(spec)
        check(prompts, prompts.run())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_a_threshold_of_minus_infinity_is_dense_attention(target: str, dtype: torch.dtype) -> None:
    prompts = unplaced_prompts(shaped((9, 3, 64, 128), dtype=dtype))
    prompts.case.log_min_prob.fill_(-math.inf)
    pruned = prompts.run(target)
    check(prompts, pruned)
    prompts.case.dense.fill_(True)
    prompts.case.log_min_prob.fill_(1e30)
    dense = prompts.run(target)
    check(prompts, dense)
    for result in (pruned, dense):
        assert (result.kept_mass - 1).abs().max() < 1e-6
        assert result.num_kept[-1, 0] == LENS[3]


@pytest.mark.parametrize("limit", [1e30, math.inf])
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("target", TARGETS)
def test_what_keeps_nothing_is_made_of_means(target: str, window: int | None, limit: float) -> None:
    prompts = unplaced_prompts(shaped((8, 2, 64, 32), window=window))
    prompts.case.log_min_prob.fill_(limit)
    result = prompts.run(target)
    check(prompts, result)
    if window is None:
        seen = torch.tensor([visible for _, visible in prompts.spec.rows])
        assert torch.equal(result.num_kept[:, 0], (seen % 32).int())


@needs_native
@pytest.mark.parametrize("logit", [-200.0, 12.0])
def test_a_sink_counts_from_the_start(logit: float) -> None:
    prompts = unplaced_prompts(shaped((6, 2, 64, 64), sinks=True))
    assert prompts.case.sinks is not None
    prompts.case.sinks.fill_(logit)
    prompts.case.log_min_prob.fill_(-7.03)
    expected, result = prompts.expected(), prompts.run()
    torch.testing.assert_close(result.out.double(), expected.out, rtol=0, atol=1e-4)
    # Thresholds are not in gaps here.
    assert (result.num_kept - expected.num_kept).abs().max() <= 1
    assert (result.num_kept != expected.num_kept).float().mean() < 0.01


@needs_native
def test_old_scratch_memory_does_not_matter() -> None:
    spec = Spec(3, 1, 48, 16, lens=(291,), query_lens=(241,))
    first, second = unplaced_prompts(spec), make_prompts(spec)
    first.case.query.fill_(math.nan)
    first.run(num_threads=1)
    check(second, second.run(num_threads=1))


PLACED_LEN, PLACED_ROWS = 700, 60
WHOLE = [0, 3, 4, 5, 8, 10]
"""V tiles of which every row keeps every key. The kernel's key tiles have two each: here (whole,
none), (none, whole), (whole, whole), (none, none), (whole, few), (whole, part)."""
FEW = [9 * V_TILE + i for i in (0, 17, 18, 63)]
"""Keys that every row keeps of the V tile beside a whole one."""


def placed_prompts(spec: Spec) -> tuple[Prompts, torch.Tensor]:
    """Scores near 2 for the keys to keep and near -2 for the others, thresholds between them.

    What is not kept still has some mass, which the means must return.

    Returns:
        The prompts, and which keys are kept by choice: [PLACED_LEN] bool.
    """
    prompts = unplaced_prompts(spec)
    case, position = prompts.case, torch.arange(PLACED_LEN)
    kept = torch.isin(position // V_TILE, torch.tensor(WHOLE))
    kept |= torch.isin(position, torch.tensor(FEW))
    case.query.mul_(0.05)
    case.query[..., 0] = 2 / spec.sm_scale
    case.keys[0][..., 0] = torch.where(kept, 1.0, -1.0)[:, None]
    case.log_min_prob.fill_(-7.0)
    prompts.write_pages()
    return prompts, kept


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [16, 96, 128])
def test_v_rows_that_nobody_keeps_are_not_read_beside_v_tiles_that_are_multiplied_whole(
    block_size: int, dtype: torch.dtype
) -> None:
    spec = Spec(3, 1, 64, block_size, (PLACED_LEN,), (PLACED_ROWS,), dtype)
    prompts, kept = placed_prompts(spec)
    exact = prompts.expected()
    # The tile with a few kept keys, and the last one, of which rows see parts.
    assert (exact.v_tiles_read == len(WHOLE) + 1).all()
    result = prompts.run()
    check(prompts, result)
    # Means were written with the values: only reading the rows themselves meets what follows.
    slots = prompts.case.slots()[~kept]
    value = prompts.layout.values(prompts.pages)
    value[slots // block_size, :, slots % block_size] = math.nan
    assert torch.equal(prompts.run().out, result.out)
    assert prompts.run_in_chunks(7).out.isfinite().all()


def run_without_the_v_tiles_that_nobody_keeps() -> None:
    prompts, _ = placed_prompts(Spec(3, 1, 64, 128, (PLACED_LEN,), (PLACED_ROWS,)))
    expected = prompts.run().out
    # The same pages, each at the start of a memory page.
    num_blocks, _, size, content = prompts.pages.shape
    stride = -(-size * content * 4 // 4096) * 1024
    memory = mmap.mmap(-1, num_blocks * stride * 4)
    pages = torch.frombuffer(memory, dtype=torch.float32)
    pages = pages.as_strided((num_blocks, 1, size, content), (stride, stride, content, 1))
    pages.copy_(prompts.pages)
    prompts.pages = pages
    for tile in set(range(9)) - set(WHOLE):
        block = int(prompts.case.block_table[0, tile // 2])
        offset = (block * stride + (2 + tile % 2) * V_TILE * 64) * 4
        address = ctypes.c_void_p(pages.data_ptr() + offset)
        assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(V_TILE * 64 * 4), 0) == 0
    assert torch.equal(prompts.run().out, expected)
    os._exit(0)


@needs_native
@pytest.mark.skipif(mmap.PAGESIZE > 4096, reason="V tiles are smaller than memory pages")
def test_v_tiles_that_nobody_keeps_may_be_missing_from_memory() -> None:
    # A process of its own, which reading what is protected ends; a new one, because OpenMP hangs
    # in a fork of one whose threads it has started.
    run = run_without_the_v_tiles_that_nobody_keeps
    child = multiprocessing.get_context("spawn").Process(target=run)
    child.start()
    child.join(120)
    assert child.exitcode == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("min_prob", [0.02, 1e-4])
@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("target", TARGETS)
def test_nan_that_no_row_sees_never_reaches_the_output(
    target: str, window: int | None, min_prob: float, dtype: torch.dtype
) -> None:
    spec = Spec(6, 2, 64, 64, (63, 523), (20, 100), dtype, window=window, min_prob=min_prob)
    prompts = make_prompts(spec)
    pages, layout, slots = prompts.pages, prompts.layout, prompts.case.slots()
    start = 0
    for length, query_len in zip(spec.lens, (20, 100), strict=True):
        hidden = slots[start : start + max(length - query_len + 1 - (window or length), 0)]
        start += length
        block, offset = hidden // spec.block_size, hidden % spec.block_size
        layout.keys(pages)[block, :, offset] = math.nan
        layout.values(pages)[block, :, offset] = math.nan
        # Means of groups that the rows see only in part are not valid for them.
        layout.v_means(pages)[block, :, offset // layout.group_size] = math.nan
    check(prompts, prompts.run(target))


@pytest.mark.parametrize(
    ("starts", "blocks", "message"),
    [
        ([0, 10, 29], None, "must rise from 0"),
        ([0, 20, 30], None, "must rise from 0"),
        ([0, 10, 30], 99, "outside the KV cache"),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_what_does_not_fit_together_is_refused(
    target: str, starts: list[int], blocks: int | None, message: str
) -> None:
    prompts = unplaced_prompts(Spec(4, 2, 64, 32, lens=(10, 80), query_lens=(10, 20)))
    if blocks is not None:
        prompts.case.block_table.fill_(blocks)
    loc, rows = torch.tensor(starts, dtype=torch.int32), torch.arange(30)
    with pytest.raises(ValueError, match=message):
        prompts.call(rows, loc, prompts.case.seq_lens, target)
