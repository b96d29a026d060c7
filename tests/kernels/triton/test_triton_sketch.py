"""The sketch of K on GPUs: what is written of a group, and decode kernels that scan it."""

import dataclasses

import pytest
import torch
from decode_runs import new_means, run
from test_triton_decode import BASE, check
from torch import Tensor
from triton_interpreter import needs_interpreter

from vllm_toptheta.kernels.sketch import SKETCH_ERROR, Sketch, hadamard, parts_of, sketch_of
from vllm_toptheta.testing.cases import Case, Result, Spec, make_case, with_sketches

pytestmark = needs_interpreter

WIDE = 60.0
"""Factor on keys of which 8 bits are not enough."""


def spec(**changes: object) -> Spec:
    return dataclasses.replace(BASE, **changes)


def case_of(asked: Spec, wide: tuple[int, ...] = ()) -> Case:
    """A case whose groups of these numbers hold keys of which some stand out."""
    case = make_case(asked)
    for keys in case.keys:
        for group in wide:
            keys[group * 64 + 3 : group * 64 + 5] *= WIDE
    return case


def written(case: Case) -> tuple[tuple[Tensor, Tensor], Sketch]:
    """Pages and means, and their sketch."""
    from vllm_toptheta.kernels.triton.means import update_v_means
    from vllm_toptheta.kernels.triton.sketch import update_sketch

    pages, sketch = case.sketched_gpu_pages()
    means, (keys, values) = new_means(case), pages.split(case.spec.head_dim, dim=-1)
    slots = torch.cat([torch.tensor([-1, -1]), case.slots()])
    update_v_means(values, means, slots)
    update_sketch(keys, sketch, slots)
    return (pages, means), sketch


def specified(case: Case, sketch: Sketch) -> Case:
    """The case with what its sketch stands for."""
    return with_sketches(case, parts_of(sketch).flatten(2, 3), sketch.bounds)


def trusted(case: Case) -> Tensor:
    """[groups, num_kv_heads] of the first row: whether the sketch is used."""
    (parts, bounds), spec = (case.sketches or [])[0], case.spec
    norm = case.query[0].double().norm(dim=-1).unflatten(0, (spec.num_kv_heads, -1)).amax(-1)
    assert len(parts)
    return (bounds[..., 0] * norm * spec.sm_scale) < 0.9 * SKETCH_ERROR * spec.head_dim**0.5


CASES = {
    "plain": (BASE, ()),
    "fp16": (spec(dtype=torch.float16, lens=(75, 300), seed=1), ()),
    "one head a group": (spec(num_heads=3, num_kv_heads=3, lens=(50, 270), seed=2), ()),
    "sixteen heads a group": (spec(num_heads=16, num_kv_heads=1, lens=(270,), seed=3), (1,)),
    "head_dim 80": (spec(head_dim=80, lens=(45, 200), seed=4), (0,)),
    "head_dim 256": (spec(head_dim=256, lens=(200,), seed=7), ()),
    "block 128": (spec(block_size=128, lens=(300, 128), seed=10), (2,)),
    "window inside a group": (spec(lens=(300, 39, 12), window=137, seed=11), ()),
    "window of whole groups": (spec(lens=(320, 300), window=128, seed=12), (3,)),
    "soft cap": (spec(lens=(275,), soft_cap=3.0, min_prob=0.02, seed=14), (1, 2)),
    "sinks": (spec(lens=(275, 20), sinks=True, seed=15), ()),
    "dense rows": (spec(lens=(275, 133, 18), dense_rows=(0, 2), seed=16), ()),
    "floor": (spec(lens=(320, 275, 64, 30), min_prob=0.2, min_mass=0.6, seed=19), (4,)),
    "no group is trusted": (spec(lens=(275,), seed=20), (0, 1, 2, 3, 4)),
    "keep everything": (spec(lens=(275, 33), min_prob=1e-12, seed=26), ()),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_the_specification(name: str) -> None:
    case = case_of(*CASES[name])
    pages, sketch = written(case)
    case = specified(case, sketch)
    check(case, run(case, pages=pages, sketch=sketch))


def test_the_cases_show_something() -> None:
    """Groups of both kinds; and scores of sketches and of keys that differ."""
    case = case_of(*CASES["soft cap"])
    by_sketch = specified(case, written(case)[1])
    assert trusted(by_sketch)[:4, 0].tolist() == [True, False, False, True]
    plain = (by_sketch.scores(0) - case.scores(0)).abs()[:, 0]
    assert plain[:, :64].max() > 1e-3
    assert plain[:, 64:192].max() == plain[:, 256:].max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_written(dtype: torch.dtype) -> None:
    case = case_of(spec(lens=(139, 64), head_dim=80, dtype=dtype, seed=60), (1,))
    case.keys[0] += 100.0  # a bias, as Qwen's first layer has
    _, sketch = written(case)
    groups = 0
    for seq, length in enumerate(case.spec.lens):
        for group in range(length // 64):
            groups += 1
            block = int(case.block_table[seq, group])
            keys = case.keys[seq][group * 64 :][:64].transpose(0, 1)
            found = Sketch(*(part[block, :, 0] for part in sketch))
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(found.centre, sketch_of(keys).centre, rtol=eps, atol=1e-6)
            rest = (keys.double() - found.centre.double()[:, None]) @ hadamard(80)
            largest = rest.abs().amax((1, 2))[:, None].float() / 127
            torch.testing.assert_close(found.scales, largest, rtol=1e-4, atol=1e-6)
            assert (found.codes - rest / found.scales[..., None]).abs().max() < 0.51
            # The certificate holds for what is stored, whatever was rounded otherwise.
            stands_for = parts_of(found).unflatten(-1, (2, -1)).sum(-2)
            error = (keys.double() - stands_for).norm(dim=-1).amax(-1)
            assert (error <= found.bounds[:, 0] + 1e-4).all()
            assert (error >= 0.9 * found.bounds[:, 0]).all()
            length_of = (found.codes.double() * found.scales.double()[..., None]).norm(dim=-1)
            assert (length_of.amax(-1) <= found.bounds[:, 1]).all()
    assert (~sketch.bounds[..., 0].isnan()).sum() == groups * case.spec.num_kv_heads


def test_any_cut_of_a_row_keeps_the_same() -> None:
    """Also where rounding decides: thresholds stand on keys."""
    case = case_of(spec(lens=(560, 300), num_heads=4, seed=31), (1, 6))
    pages, sketch = written(case)
    case = specified(case, sketch)
    for row in range(2):
        log_probs = case.select(row).probs[:, 0].log().unflatten(0, (2, -1)).amax(1)
        case.log_min_prob[row] = log_probs.sort(-1, descending=True).values[:, 5].float()
    whole = run(case, pages=pages, sketch=sketch, num_splits=1)

    def same(other: Result) -> bool:
        return all(torch.equal(getattr(whole, n), getattr(other, n)) for n in ("num_kept", "lifts"))

    assert all(
        same(run(case, pages=pages, sketch=sketch, num_splits=n, min_tiles=m))
        for n, m in ((2, 1), (5, 2), (64, 1))
    )


def test_what_does_not_fit_is_refused() -> None:
    from vllm_toptheta.kernels.triton.sketch import update_sketch

    case = make_case(spec(lens=(64,)))
    pages, sketch = case.sketched_gpu_pages()
    keys = pages[..., :64]
    with pytest.raises(ValueError, match="codes must be"):
        update_sketch(keys, sketch._replace(codes=sketch.codes.to(torch.uint8)), case.slots())
    with pytest.raises(ValueError, match="slot_mapping must be"):
        update_sketch(keys, sketch, case.slots().int())
    with pytest.raises(ValueError, match="multiple of 64 tokens"):
        update_sketch(keys[:, :, :32], sketch, case.slots())
    with pytest.raises(ValueError, match=r"config.tile must be 64, got 128"):
        run(case, pages=(pages, new_means(case)), sketch=sketch, tile=128)
