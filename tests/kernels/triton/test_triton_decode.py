"""The Triton decode kernels against the float64 specification, branch by branch."""

import dataclasses

import pytest
import torch
from decode_runs import run
from triton_interpreter import needs_interpreter

from vllm_toptheta.testing.cases import Case, Result, Spec, error_budget, make_case

pytestmark = needs_interpreter

BASE = Spec(lens=(75, 33, 1, 0, 64, 523), dtype=torch.bfloat16)


def spec(**changes: object) -> Spec:
    return dataclasses.replace(BASE, **changes)


CASES = {
    "plain": BASE,
    "renormalised": spec(compensation=False, lens=(75, 523), seed=1),
    "fp16": spec(dtype=torch.float16, lens=(75, 300), seed=1),
    "one head a group": spec(num_heads=3, num_kv_heads=3, lens=(50, 270), seed=2),
    "sixteen heads a group": spec(num_heads=16, num_kv_heads=1, lens=(270,), seed=3),
    "head_dim 32": spec(head_dim=32, lens=(45, 200), seed=4),
    "head_dim 80": spec(head_dim=80, lens=(45, 200), seed=4),
    "head_dim 256": spec(head_dim=256, lens=(200,), seed=7),
    "block 16": spec(block_size=16, lens=(75, 16, 600), seed=8),
    "block 32": spec(block_size=32, lens=(75, 32, 300), seed=9),
    "block 80": spec(block_size=80, lens=(300, 160), seed=9),
    "block 128": spec(block_size=128, lens=(300, 128), seed=10),
    "window inside a group": spec(lens=(300, 39, 12), window=137, seed=11),
    "window of whole groups": spec(lens=(320, 300), window=128, seed=12),
    "window within one group": spec(lens=(300, 44), window=7, seed=13),
    "window, block 16": spec(lens=(300, 44), window=101, block_size=16, seed=13),
    "soft cap": spec(lens=(275,), soft_cap=3.0, min_prob=0.02, seed=14),
    "sinks": spec(lens=(275, 20), sinks=True, seed=15),
    "dense rows": spec(lens=(275, 33, 18), dense_rows=(0, 2), sinks=True, seed=16),
    "dense rows in a window": spec(lens=(275, 33), dense_rows=(0,), window=120, seed=17),
    "best keys alone": spec(lens=(320, 256), min_prob=0.99, seed=18),
    "best keys alone, block 16": spec(lens=(160, 256), min_prob=0.99, block_size=16, seed=18),
    "floor": spec(lens=(320, 275, 64, 30), min_prob=0.2, min_mass=0.6, seed=19),
    "floor, block 16": spec(
        lens=(320, 200), min_prob=0.2, min_mass=0.6, block_size=16, sinks=True, seed=20
    ),
    "floor that is out of reach": spec(
        lens=(320,), min_prob=0.99, min_mass=0.999, query_scale=0.1, window=256, seed=21
    ),
    "fp8": spec(lens=(275, 33), cache_dtype=torch.float8_e4m3fn, seed=23),
    "keep everything": spec(lens=(275, 33), min_prob=1e-12, seed=26),
}


def check(case: Case, result: Result) -> None:
    expected = case.expected()
    assert torch.equal(result.num_kept, expected.num_kept)
    assert torch.equal(result.lifts, expected.lifts)
    torch.testing.assert_close(result.kept_mass, expected.kept_mass, rtol=0, atol=2e-5)
    # Twice, because the interpreter truncates to bfloat16 where GPUs round.
    budget = 2 * error_budget(case, expected.out)
    error = (result.out.double() - expected.out).abs()
    assert (error <= budget).all(), (error / budget).amax((1, 2))


@pytest.mark.parametrize("name", CASES)
def test_matches_the_specification(name: str) -> None:
    case = make_case(CASES[name])
    check(case, run(case))


@pytest.mark.parametrize("magnitude", [2.0**100, 2.0**-100])
def test_a_query_outside_of_float16_meets_a_float8_cache(magnitude: float) -> None:
    """Beside float8 keys the query is rounded to float16, whose range is narrower."""
    case = make_case(spec(lens=(150,), cache_dtype=torch.float8_e4m3fn, seed=24))
    expected = case.expected()
    case.query *= magnitude
    case.scales = (case.scales[0] / magnitude, case.scales[1])
    result = run(case)
    assert torch.equal(result.num_kept, expected.num_kept)
    error = (result.out.double() - expected.out).abs()
    assert (error <= 2 * error_budget(case, expected.out)).all()


def test_the_cases_show_something() -> None:
    """They would pass a dense kernel if nothing were pruned, lifted or compensated."""
    case = make_case(spec(lens=(523,)))
    expected = case.expected()
    assert expected.num_kept.max() < 523 / 4
    visible = 4 * error_budget(case, expected.out).max()
    case.dense.fill_(True)
    assert (case.expected().out - expected.out).abs().max() > visible
    case.dense.fill_(False)
    lifts = make_case(CASES["floor"]).expected().lifts
    assert lifts[0].min() > 0
    assert lifts.max() > lifts.min()
    # Where a floor is not reached, thresholds are lowered to the end.
    assert make_case(CASES["floor that is out of reach"]).expected().lifts.max() >= 9


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("index", range(5))
def test_every_weight_is_of_its_term(index: int, block_size: int) -> None:
    case = make_case(
        spec(
            lens=(850,),
            num_heads=2,
            dtype=torch.float16,
            window=700,
            block_size=block_size,
            sinks=True,
            seed=29,
        )
    )
    case.weights.zero_()
    without = case.expected().out
    case.weights[:, index] = torch.tensor([2.0, -1.0])
    expected = case.expected().out
    assert (expected - without).abs().amax((0, 2)).min() > 20 * error_budget(case, expected).max()
    check(case, run(case))


@pytest.mark.parametrize(("num_splits", "tile"), [(1, 16), (2, 256), (5, 128), (64, 32)])
def test_any_cut_of_a_row_yields_the_same(num_splits: int, tile: int) -> None:
    case = make_case(
        spec(lens=(560, 75), num_heads=4, block_size=16, min_mass=0.5, min_prob=0.05, seed=30)
    )
    check(case, run(case, num_splits=num_splits, tile=tile, min_tiles=2))


@pytest.fixture(scope="module")
def on_edges() -> Case:
    """Thresholds at which some key of each row is decided by the last bit."""
    case = make_case(spec(lens=(560, 300, 275), num_heads=4, dense_rows=(2,), seed=31))
    for row in range(2):
        log_probs = case.select(row).probs[:, 0].log().unflatten(0, (2, -1)).amax(1)
        case.log_min_prob[row] = log_probs.sort(-1, descending=True).values[:, 5].float()
    return case


def test_kept_keys_depend_neither_on_the_batch_nor_on_splits(on_edges: Case) -> None:
    together = run(on_edges, num_splits=2)
    for seq in range(3):
        alone = run(on_edges, rows=[seq], num_splits=5)
        same = run(on_edges, rows=[seq], num_splits=2)
        for name in ("num_kept", "lifts"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[seq]), name
        for name in ("out", "kept_mass", "num_kept"):
            assert torch.equal(getattr(same, name)[0], getattr(together, name)[seq]), name
        torch.testing.assert_close(alone.kept_mass[0], together.kept_mass[seq], rtol=0, atol=1e-6)


def test_head_major_pages() -> None:
    case = make_case(spec(lens=(140,), seed=32))
    check(case, run(case, head_major=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 16}, "head_dim must be a multiple of 16 from 32 to 256, got 16"),
        ({"head_dim": 272}, "head_dim must be"),
        ({"num_heads": 34}, "1 to 16 times num_kv_heads"),
        ({"dtype": torch.float32}, "query must be one of"),
    ],
)
def test_unsupported_shapes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_case(spec(lens=(20,), **change)))


def test_too_little_scratch_is_refused() -> None:
    from vllm_toptheta.kernels.triton.decode import DecodeScratch, _check_room

    scratch = DecodeScratch.allocate(
        num_rows=2,
        num_parts=5,
        max_len=300,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        block_size=64,
        device="cpu",
    )
    assert scratch.max_len == 512
    with pytest.raises(ValueError, match="2 rows and 5 parts, 2 sequences of 3 splits need 6"):
        _check_room(scratch, 2, 3)
    with pytest.raises(ValueError, match="2 rows and 5 parts, 3 sequences"):
        _check_room(scratch, 3, 1)
    with pytest.raises(ValueError, match="num_splits must be 1 to 256"):
        _check_room(scratch, 1, 257)


def test_a_tile_of_part_of_a_group_is_refused() -> None:
    with pytest.raises(ValueError, match="whole groups of 64 keys and divide 256, got 32"):
        run(make_case(spec(lens=(20,))), tile=32)
