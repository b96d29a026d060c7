"""CPU decode against the specification in float64, over dtypes, shapes and options."""

import math
from dataclasses import replace

import pytest
import torch
from decode_calls import TARGETS, check, decode, expected_keys, kept_keys, needs_native

from vllm_toptheta.kernels import ops
from vllm_toptheta.kernels.layout import PageLayout
from vllm_toptheta.testing.cases import Spec, make_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        *(
            pytest.param("native", dtype, marks=needs_native, id=f"native-{dtype}")
            for dtype in DTYPES
        ),
        pytest.param("eager", torch.bfloat16, id="eager"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_mass": 0.8},
        {"sinks": True, "min_mass": 0.5},
        {"window": 200},
        {"window": 1},
        {"soft_cap": 6.0},
        {"dense_rows": (1, 3)},
        {"compensation": False},
        {"min_prob": 1e-5},
        {"min_prob": 0.3},
    ],
    ids=str,
)
def test_options(target: ops.Target, dtype: torch.dtype, options: dict[str, object]) -> None:
    case = make_case(Spec(dtype=dtype, **options))  # type: ignore[arg-type]
    check(case, decode(case, target))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(1, 1, 16), (2, 1, 80), (9, 3, 128), (8, 2, 48), (10, 2, 96), (7, 1, 64), (32, 1, 16)],
)
def test_heads(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    spec = Spec(num_heads, num_kv_heads, head_dim, lens=(5, 300), dtype=dtype)
    case = make_case(spec)
    check(case, decode(case))


@needs_native
@pytest.mark.parametrize("block_size", [16, 32, 48, 80, 96, 128, 192, 320, 512])
@pytest.mark.parametrize("window", [None, 150])
def test_block_sizes(block_size: int, window: int | None) -> None:
    spec = Spec(block_size=block_size, window=window, lens=(1, 63, 64, 65, 700), min_prob=0.01)
    case = make_case(spec)
    check(case, decode(case))


@needs_native
@pytest.mark.parametrize("min_prob", [0.02, 0.002, 2e-4, 2e-5, 1e-7])
def test_any_share_of_the_keys(min_prob: float) -> None:
    """From lists over groups that are read as a whole to all of V."""
    case = make_case(Spec(head_dim=32, lens=(1111, 640), min_prob=min_prob))
    check(case, decode(case))


@needs_native
def test_groups_that_keep_much_beside_groups_that_keep_little() -> None:
    spec = Spec(head_dim=32, lens=(1100,), min_prob=1e-3)
    case = make_case(spec)
    group = torch.arange(1100) // 64
    loud = torch.where(group % 3 == 1, 0.05, 2.0)[:, None, None]
    case.keys[0] *= loud
    check(case, decode(case))


@needs_native
def test_means_alone_and_every_weight() -> None:
    """Each of the five weights counts: one at a time."""
    case = make_case(Spec(head_dim=32, lens=(900, 1300), window=900, min_prob=0.02))
    for i in range(5):
        case.weights.zero_()
        case.weights[:, i] = 1
        check(case, decode(case))


@pytest.mark.parametrize("target", TARGETS)
def test_thresholds_that_keep_everything_or_only_the_best(target: ops.Target) -> None:
    case = make_case(Spec(lens=(1, 256, 0, 523)))
    case.log_min_prob.fill_(-math.inf)
    everything = decode(case, target)
    check(case, everything)
    assert everything.num_kept[1].tolist() == [256, 256]
    case.log_min_prob.fill_(1.0)
    best = decode(case, target)
    check(case, best)
    assert (best.num_kept[1] <= 3).all()  # query heads of a kv head


@pytest.mark.parametrize("target", TARGETS)
def test_the_floor_lifts_until_it_holds(target: ops.Target) -> None:
    case = make_case(Spec(min_prob=0.2, min_mass=0.9, lens=(512, 1, 320)))
    result = decode(case, target)
    check(case, result)
    assert (result.lifts[0] > 0).all()
    assert (result.kept_mass[0] >= 0.9).all()
    assert result.lifts[1].tolist() == [0, 0]


@needs_native
def test_lifts_end() -> None:
    case = make_case(Spec(min_prob=0.9, min_mass=0.0, lens=(512,)))
    case.log_min_prob.fill_(30.0)
    case.min_mass.fill_(0.99)
    result = decode(case)
    check(case, result)
    assert result.lifts.tolist() == [[12, 12]]


@needs_native
def test_scores_far_apart() -> None:
    """Scores of thousands, as K biases make them: only differences count."""
    case = make_case(Spec(lens=(700,), query_scale=2.0, min_prob=0.01))
    shift = torch.zeros(2, 64)
    shift[:, 0] = 1
    case.keys[0] += 1000 * shift
    case.query[..., 0] = 8.0
    result, expected = decode(case), case.expected()
    # Scores near 1000 in float32 have steps of 1e-4.
    torch.testing.assert_close(result.kept_mass, expected.kept_mass, rtol=0, atol=2e-3)
    torch.testing.assert_close(result.out.double(), expected.out, rtol=5e-3, atol=5e-3)


@needs_native
@pytest.mark.parametrize("options", [{}, {"window": 100}, {"min_mass": 0.9}], ids=str)
def test_kept_keys_are_those_of_the_specification(options: dict[str, object]) -> None:
    case = make_case(Spec(lens=(1, 63, 0, 523), **options))  # type: ignore[arg-type]
    assert torch.equal(kept_keys(case), expected_keys(case))


@needs_native
def test_rows_of_128k_tokens() -> None:
    case = make_case(Spec(2, 1, 16, 128, lens=(131072,), query_scale=6.0, min_prob=1e-3))
    for splits in (1, 5):
        check(case, decode(case, num_splits=splits))


@pytest.mark.parametrize("target", TARGETS)
def test_blocks_that_do_not_exist(target: ops.Target) -> None:
    case = make_case(Spec(lens=(64, 523)))
    pages, _ = case.cpu_pages()
    ops.update_side_data(pages, PageLayout(64, 64), case.slots(), target=target)
    for wrong in (-1, case.num_blocks):
        broken = replace(case, block_table=case.block_table.clone())
        broken.block_table[1, 3] = wrong
        with pytest.raises(ValueError, match="outside the KV cache"):
            decode(broken, target, pages=pages)
    longer = replace(case)
    longer.seq_lens = torch.tensor([64, 64 * case.block_table.shape[1] + 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="outside the KV cache"):
        decode(longer, target, pages=pages)
    check(case, decode(case, target, pages=pages))
