"""The CPU decode kernels against the specification."""

import math

import pytest
import torch
from cpu_cases import IMPLS, Spec, check, make_case, needs_native, with_options
from hypothesis import given, settings
from hypothesis import strategies as st

LENGTHS = (1, 63, 0, 523, 2011)
SHAPES = [
    # heads, kv heads, head_dim, block_size, group_size
    (2, 2, 64, 128, 16),
    (9, 3, 64, 64, 32),
    (8, 2, 128, 128, 16),
    (8, 1, 80, 32, 16),
    (16, 1, 256, 128, 64),
    (10, 2, 96, 128, 128),
    (6, 1, 112, 32, 32),
    (7, 1, 32, 16, 16),
]
OPTIONS = [
    {},
    {"compensation": False},
    {"window": 100},
    {"window": 1},
    {"window": 640, "sinks": True},
    {"soft_cap": 2.0},
    {"sinks": True},
    {"kept": 0.9},
    {"kept": 0.4},
]


def shaped(shape: tuple[int, ...], **changes: object) -> Spec:
    return with_options(Spec(*shape), **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_the_specification(impl: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make_case(shaped(shape, dtype=dtype, lens=LENGTHS))
    check(case, case.run(impl))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_options_match_the_specification(impl: str, options: dict[str, object]) -> None:
    case = make_case(shaped((6, 2, 64, 64, 32), lens=(1, 63, 0, 523, 700), **options))
    check(case, case.run(impl))


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    group=st.sampled_from([1, 2, 3, 4, 5, 8]),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 48, 64, 80]),
    page=st.sampled_from([(16, 16), (32, 16), (64, 64), (96, 32), (128, 128), (256, 16)]),
    lens=st.lists(st.integers(0, 700), min_size=1, max_size=3),
    kept=st.floats(0, 1),
    compensation=st.booleans(),
    window=st.none() | st.integers(1, 800),
    soft_cap=st.none() | st.just(5.0),
    sinks=st.booleans(),
    num_splits=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_native_matches_the_specification_everywhere(
    group: int,
    num_kv_heads: int,
    head_dim: int,
    page: tuple[int, int],
    lens: list[int],
    kept: float,
    compensation: bool,
    window: int | None,
    soft_cap: float | None,
    sinks: bool,
    num_splits: int,
    seed: int,
) -> None:
    spec = Spec(
        group * num_kv_heads,
        num_kv_heads,
        head_dim,
        *page,
        lens=tuple(lens),
        kept=kept,
        compensation=compensation,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        seed=seed,
    )
    case = make_case(spec)
    check(case, case.run("native", num_splits=num_splits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_theta_of_minus_infinity_is_dense_attention(impl: str, dtype: torch.dtype) -> None:
    case = make_case(shaped((9, 3, 64, 128, 16), lens=LENGTHS, dtype=dtype))
    case.theta.fill_(-math.inf)
    pruned = case.run(impl)
    case.dense.fill_(True)
    dense = case.run(impl)
    assert torch.equal(pruned.out, dense.out)
    assert torch.equal(pruned.num_kept, dense.num_kept)
    assert torch.equal(pruned.v_rows_read, dense.v_rows_read)
    assert dense.num_kept[:, 0].tolist() == list(LENGTHS)
    check(case, dense)


@pytest.mark.parametrize("impl", IMPLS)
def test_dense_rows_ignore_theta(impl: str) -> None:
    case = make_case(shaped((8, 2, 64, 32, 16), window=200, sinks=True))
    case.dense[1::2] = True
    check(case, case.run(impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_fewer_keys_are_kept_as_theta_rises(impl: str) -> None:
    case = make_case(shaped((8, 2, 64, 32, 16), lens=(523, 63)))
    before = None
    for theta in torch.linspace(-4, 4, 9).tolist():
        case.theta.fill_(theta)
        result = case.run(impl)
        if before is not None:
            assert (result.num_kept <= before.num_kept).all()
            assert (result.v_rows_read <= before.v_rows_read).all()
            assert (result.num_kept < before.num_kept).any()
        before = result


@pytest.mark.parametrize("theta", [1e30, math.inf])
@pytest.mark.parametrize("compensation", [True, False])
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_never_loses_its_best_key(
    impl: str, window: int | None, compensation: bool, theta: float
) -> None:
    spec = shaped((8, 2, 64, 32, 16), compensation=compensation, window=window)
    case = make_case(spec)
    case.theta.fill_(theta)
    result = case.run(impl)
    assert (result.num_kept == torch.tensor(spec.lens)[:, None].clamp(max=1)).all()
    check(case, result)


@needs_native
@pytest.mark.parametrize("num_splits", [1, 2, 5, 17])
def test_best_keys_are_counted_once(num_splits: int) -> None:
    case = make_case(shaped((4, 1, 64, 32, 16), lens=(523,)))
    # Heads 0 and 1 agree and keep nothing; head 2 agrees with them and keeps; head 3 is on its own.
    case.query[0, 1] = case.query[0, 2] = case.query[0, 0]
    case.theta[0, :2] = 1e30
    result = case.run("native", num_splits=num_splits)
    check(case, result)
    case.theta[0] = 1e30
    result = case.run("native", num_splits=num_splits)
    assert result.v_rows_read.item() == 2
    check(case, result)
