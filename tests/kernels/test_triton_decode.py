"""The Triton decode kernel against the float64 specification, branch by branch."""

import dataclasses

import pytest
import torch
from triton_cases import Case, Result, run
from triton_interpreter import needs_interpreter

pytestmark = needs_interpreter

BASE = Case([75, 33, 1, 0, 16, 64])

CASES = {
    "plain": BASE,
    "no compensation": dataclasses.replace(BASE, compensation=False),
    "fp16": dataclasses.replace(BASE, dtype=torch.float16, seed=1),
    "one head a group": Case([50, 17], heads=1, num_kv_heads=3, seed=2),
    "sixteen heads a group": Case([70], heads=16, num_kv_heads=1, seed=3),
    "head_dim 80": Case([45, 32], head_dim=80, seed=4),
    "head_dim 96": Case([45], head_dim=96, heads=4, block_size=32, group_size=32, seed=5),
    "head_dim 112": Case([45], head_dim=112, seed=6),
    "head_dim 256": Case([45], head_dim=256, seed=7, k=4),
    "block 128, group 16": Case([150], block_size=128, seed=8),
    "block 128, group 128": Case([300, 128], block_size=128, group_size=128, heads=2, seed=9),
    "block 64, group 64": Case([140], block_size=64, group_size=64, seed=10),
    "window inside a group": Case([90, 39, 12], window=37, seed=11),
    "window of whole groups": Case([96, 90], window=32, seed=12),
    "window within one group": Case([90, 44], window=7, seed=13, k=3),
    "soft cap": Case([75], soft_cap=3.0, seed=14),
    "sinks": Case([75, 20], with_sinks=True, seed=15),
    "dense rows": Case([75, 33, 18], dense_rows=(0, 2), with_sinks=True, seed=16),
    "dense rows in a window": Case([75, 33], dense_rows=(0,), window=20, seed=17),
    "best key only": Case([75, 64, 1], best_only_rows=(0, 1, 2), seed=18),
    "best key only, no compensation": Case(
        [75, 64], best_only_rows=(0, 1), compensation=False, seed=19
    ),
    "best key only in a window": Case([90, 39], best_only_rows=(0, 1), window=21, seed=20),
    "best key only, group 32": Case(
        [90, 39, 64], best_only_rows=(0, 1, 2), block_size=64, group_size=32, seed=21
    ),
    "head-major cache": Case([75, 33], head_major=True, seed=22),
    "fp8 e4m3": Case([75, 33], cache_dtype=torch.float8_e4m3fn, seed=23),
    "fp8 e5m2": Case([60], cache_dtype=torch.float8_e5m2, dtype=torch.float16, seed=24),
    "keep almost nothing": Case([130], k=1, seed=25),
    "keep everything by theta": Case([75, 33], k=1000, seed=26),
}


def budget(case: Case, expected: torch.Tensor) -> float:
    """Rounding P, V means and the output to the compute dtype, with a factor 2 to spare."""
    unit = torch.finfo(case.dtype).eps
    return 2 * unit * float(expected.abs().max().clamp(min=1)) * case.scales[1]


def check(case: Case, result: Result) -> None:
    out, num_kept, v_rows_read, lse = case.expected()
    torch.testing.assert_close(result.num_kept, num_kept, rtol=0, atol=0)
    torch.testing.assert_close(result.v_rows_read, v_rows_read, rtol=0, atol=0)
    torch.testing.assert_close(result.out.double(), out, rtol=0, atol=budget(case, out))
    torch.testing.assert_close(result.lse.double(), lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_matches_the_specification(name: str) -> None:
    check(CASES[name], run(CASES[name]))


def test_pruning_is_visible() -> None:
    """The cases would pass a dense kernel if nothing were pruned."""
    result = run(BASE)
    assert result.num_kept[0].max() < BASE.lens[0] / 4
    assert (result.v_rows_read[0] > result.num_kept[0].view(2, 3).max(1).values).all()
    out, *_ = dataclasses.replace(BASE, dense_rows=tuple(range(6))).expected()
    assert (out[0] - BASE.expected()[0][0]).abs().max() > 2 * budget(BASE, out)


@pytest.mark.parametrize("num_splits", [1, 2, 5, 64])
@pytest.mark.parametrize("tile", [16, 64])
def test_counts_do_not_depend_on_how_a_row_is_cut(num_splits: int, tile: int) -> None:
    case = Case([139, 75], best_only_rows=(1,), seed=30)
    check(case, run(case, num_splits=num_splits, tile=tile))


def test_a_row_does_not_depend_on_its_batch() -> None:
    case = Case([75, 33, 130], best_only_rows=(1,), dense_rows=(2,), seed=31)
    together = run(case)
    for seq in range(3):
        alone = run(case, rows=[seq])
        for name in ("out", "num_kept", "v_rows_read", "lse"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[seq]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 48}, "head_dim must be a multiple of 16 from 64 to 256, got 48"),
        ({"head_dim": 264}, "head_dim must be"),
        ({"heads": 17}, "1 to 16 times num_kv_heads"),
        ({"dtype": torch.float32}, "query must be one of"),
    ],
)
def test_unsupported_shapes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Case([20], **change))


def test_too_little_scratch_is_refused() -> None:
    from vllm_toptheta.kernels.triton_checks import check_tile
    from vllm_toptheta.kernels.triton_decode import DecodeScratch, _check_splits

    scratch = DecodeScratch.allocate(5, 2, 1, 64, "cpu")
    with pytest.raises(ValueError, match="room for 5 parts, 2 sequences of 3 splits need 6"):
        _check_splits(3, 2, scratch)
    with pytest.raises(ValueError, match="choose another tile"):
        check_tile(32, 64)
    with pytest.raises(ValueError, match="num_splits must be 1 to 64"):
        _check_splits(65, 1, scratch)
