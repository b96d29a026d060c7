"""The CPU prefill kernels against the specification."""

import math

import pytest
import torch
from cpu_cases import IMPLS, Spec, needs_native, with_options
from hypothesis import given, settings
from hypothesis import strategies as st
from prefill_cases import PrefillCase, check_prefill, make_prefill_case

from vllm_toptheta.kernels.api import prefill_attention

LENS, QUERY_LENS = (1, 63, 300, 200, 40), (1, 40, 300, 1, 0)
SHAPES = [
    # heads, kv heads, head_dim, block_size, group_size
    (2, 2, 64, 128, 16),
    (9, 3, 64, 64, 32),
    (8, 2, 128, 128, 16),
    (8, 1, 80, 32, 16),
    (8, 1, 256, 128, 64),
    (10, 2, 96, 128, 128),
    (7, 1, 32, 16, 16),
    (4, 2, 48, 96, 32),
]
OPTIONS = [
    {},
    {"compensation": False},
    {"window": 100},
    {"window": 1},
    {"window": 200, "sinks": True},
    {"soft_cap": 2.0},
    {"sinks": True},
    {"kept": 0.9},
    {"kept": 0.4},
    {"kept": 0.0},
]


def shaped(shape: tuple[int, ...], **changes: object) -> Spec:
    return with_options(Spec(*shape), **{"lens": LENS, **changes})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_the_specification(impl: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_prefill_case(shaped(shape, dtype=dtype), QUERY_LENS)
    check_prefill(case, case.run(impl))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_options_match_the_specification(impl: str, options: dict[str, object]) -> None:
    case = make_prefill_case(shaped((6, 2, 64, 64, 32), **options), QUERY_LENS)
    check_prefill(case, case.run(impl))


@needs_native
@settings(max_examples=15, deadline=None)
@given(
    group=st.sampled_from([1, 2, 3, 4, 5, 8]),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([16, 48, 64, 80]),
    page=st.sampled_from([(16, 16), (32, 16), (64, 64), (96, 32), (128, 128), (256, 16)]),
    lens=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=3),
    kept=st.floats(0, 1),
    compensation=st.booleans(),
    window=st.none() | st.integers(1, 400),
    soft_cap=st.none() | st.just(5.0),
    sinks=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_native_matches_the_specification_everywhere(
    group: int,
    num_kv_heads: int,
    head_dim: int,
    page: tuple[int, int],
    lens: list[tuple[int, int]],
    kept: float,
    compensation: bool,
    window: int | None,
    soft_cap: float | None,
    sinks: bool,
    seed: int,
) -> None:
    spec = Spec(
        group * num_kv_heads,
        num_kv_heads,
        head_dim,
        *page,
        lens=tuple(max(pair) for pair in lens),
        kept=kept,
        compensation=compensation,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        seed=seed,
    )
    case = make_prefill_case(spec, tuple(min(pair) for pair in lens))
    if len(case.query):
        check_prefill(case, case.run("native"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_theta_of_minus_infinity_is_dense_attention(impl: str, dtype: torch.dtype) -> None:
    case = make_prefill_case(shaped((9, 3, 64, 128, 16), dtype=dtype), QUERY_LENS)
    case.theta.fill_(-math.inf)
    pruned = case.run(impl)
    case.dense.fill_(True)
    case.theta.fill_(1e30)
    dense = case.run(impl)
    assert torch.equal(pruned.out, dense.out)
    assert torch.equal(pruned.num_kept, dense.num_kept)
    assert torch.equal(pruned.v_tiles_read, dense.v_tiles_read)
    check_prefill(case, dense)


@pytest.mark.parametrize("impl", IMPLS)
def test_dense_rows_ignore_theta(impl: str) -> None:
    case = make_prefill_case(shaped((8, 2, 64, 32, 16), window=200, sinks=True), QUERY_LENS)
    case.dense[1::3] = True
    check_prefill(case, case.run(impl))


@pytest.mark.parametrize("theta", [1e30, math.inf])
@pytest.mark.parametrize("compensation", [True, False])
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_never_loses_its_best_key(
    impl: str, window: int | None, compensation: bool, theta: float
) -> None:
    spec = shaped((8, 2, 64, 32, 16), compensation=compensation, window=window)
    case = make_prefill_case(spec, QUERY_LENS)
    case.theta.fill_(theta)
    result = case.run(impl)
    assert (result.num_kept == 1).all()
    check_prefill(case, result)


@needs_native
def test_old_scratch_memory_does_not_matter() -> None:
    first = make_prefill_case(Spec(3, 1, 48, 16, 16, lens=(291,)), (241,))
    first.query.fill_(math.nan)
    first.run("native", num_threads=1)
    spec = Spec(3, 1, 48, 16, 16, lens=(291,), compensation=False, kept=0.9)
    second = make_prefill_case(spec, (241,))
    check_prefill(second, second.run("native", num_threads=1))


@needs_native
def test_tiles_of_best_keys_are_counted_once() -> None:
    case = make_prefill_case(Spec(4, 1, 64, 32, 16, lens=(523,)), (300,))
    # Heads 0 and 1 agree and keep nothing; head 2 agrees with them and keeps; head 3 is on its own.
    case.query[:, 1] = case.query[:, 2] = case.query[:, 0]
    case.theta[:, :2] = 1e30
    check_prefill(case, case.run("native"))
    case.theta.fill_(1e30)
    result = case.run("native")
    assert result.v_tiles_read.max() == 2
    check_prefill(case, result)


def broken(case: PrefillCase, **changes: object) -> dict[str, object]:
    spec, rows = case.spec, len(case.query)
    return {
        "query": case.query,
        "kv_cache": case.cache.kv_cache,
        "layout": spec.layout,
        "block_table": case.cache.block_table,
        "query_start_loc": torch.tensor([0, 10, 30], dtype=torch.int32),
        "seq_lens": torch.tensor(spec.lens, dtype=torch.int32),
        "theta": case.theta,
        "sm_scale": 0.1,
        "dense": case.dense,
        "compensation": True,
        "window": None,
        "soft_cap": None,
        "sinks": None,
        "out": torch.empty_like(case.query),
        "num_kept": torch.empty(rows, spec.num_heads, dtype=torch.int32),
        "v_tiles_read": torch.empty(rows, spec.num_kv_heads, dtype=torch.int32),
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta": torch.zeros(29, 4)}, r"theta must be \[30, 4\]"),
        ({"dense": torch.zeros(30)}, "dense must be"),
        ({"v_tiles_read": torch.zeros(30, 4, dtype=torch.int32)}, "v_tiles_read must be"),
        ({"query_start_loc": torch.zeros(2, dtype=torch.int32)}, "query_start_loc must be"),
        ({"query_start_loc": torch.tensor([0, 10, 29], dtype=torch.int32)}, "must rise from 0"),
        ({"query_start_loc": torch.tensor([0, 20, 30], dtype=torch.int32)}, "must rise from 0"),
        ({"window": 0}, "window must be positive"),
        ({"sinks": torch.zeros(3)}, "sinks must be"),
        ({"block_table": torch.full((2, 3), 99, dtype=torch.int32)}, "outside the KV cache"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("impl", IMPLS)
def test_wrong_arguments_are_refused(impl: str, changes: dict[str, object], message: str) -> None:
    case = make_prefill_case(Spec(4, 2, 64, 32, 16, lens=(10, 80)), (10, 20))
    with pytest.raises(ValueError, match=message):
        prefill_attention(**broken(case, **changes), impl=impl)  # type: ignore[arg-type]


def test_an_unknown_implementation_is_refused() -> None:
    case = make_prefill_case(Spec(4, 2, 64, 32, 16, lens=(10, 80)), (10, 20))
    with pytest.raises(ValueError, match="impl must be"):
        prefill_attention(**broken(case), impl="best")  # type: ignore[arg-type]
