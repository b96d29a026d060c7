"""CPU decode over the sketch of K: the sketch is what sketch.py says, its bounds hold, and rows are
the specification's on the keys that it stands for."""

import math
from dataclasses import replace
from random import Random

import pytest
import torch
from decode_calls import BASE, OPTIONS, TARGETS, check, decode, kept_keys, needs_native
from torch import Tensor

from vllm_toptheta.kernels import ops
from vllm_toptheta.kernels.cpu import native
from vllm_toptheta.kernels.layout import Packing, PageLayout
from vllm_toptheta.kernels.sketch import (
    hadamard,
    page_views,
    parts_of,
    read_groups,
    sketch_of,
)
from vllm_toptheta.testing.cases import Case, Spec, make_case, with_sketches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def written(
    case: Case, target: ops.Target = "native", packing: Packing = "vec"
) -> tuple[Tensor, PageLayout]:
    """The case's pages with side data of a target."""
    pages, layout = case.cpu_pages(packing, sketch=True)
    ops.update_side_data(pages, layout, case.slots(), target=target)
    return pages, layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, *OPTIONS[6:], {"head_dim": 80, "block_size": 48}], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_the_specification_s(
    target: ops.Target, options: dict[str, object], dtype: torch.dtype
) -> None:
    case = make_case(Spec(**{**BASE, **options, "dtype": dtype}))  # type: ignore[arg-type]
    pages, layout = written(case, target)
    case = with_sketches(case, *read_groups(pages, layout))
    check(case, decode(case, target, pages=pages, sketch=True))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("packing", ["vec", "amx"])
@needs_native
def test_every_option(packing: Packing, options: dict[str, object]) -> None:
    case = make_case(Spec(**{**BASE, **options}))  # type: ignore[arg-type]
    pages, layout = written(case, "native", packing)
    case = with_sketches(case, *read_groups(pages, layout))
    check(case, decode(case, pages=pages, packing=packing, sketch=True))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_instruction_sets_and_cuts_agree(options: dict[str, object], dtype: torch.dtype) -> None:
    """Also where rounding decides: thresholds stand on keys."""
    case = make_case(Spec(**{**BASE, **options, "dtype": dtype}))  # type: ignore[arg-type]
    pages, layout = written(case)
    case = with_sketches(case, *read_groups(pages, layout))
    for row, (_, visible) in enumerate(case.spec.rows):
        if visible > 20:
            log_p = case.select(row).probs.log().unflatten(0, (case.spec.num_kv_heads, -1))
            case.log_min_prob[row] = log_p.amax(1)[:, 0, 17].float().clamp(min=-12)
    base = decode(case, pages=pages, sketch=True, isa="avx2", num_splits=1, num_threads=1)
    runs = [decode(case, pages=pages, sketch=True, num_splits=5, num_threads=2, isa="avx2")]
    if native.has_avx512():
        runs.append(decode(case, pages=pages, sketch=True, isa="avx512"))
    for run in runs:
        assert torch.equal(run.num_kept, base.num_kept)
        assert torch.equal(run.kept_mass, base.kept_mass)
        assert torch.equal(run.lifts, base.lifts)


def summed(parts: Tensor) -> Tensor:
    """The keys that a sketch stands for."""
    return sum(parts.chunk(2, -1))  # type: ignore[return-value]


def keys_of(pages: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    parts, bounds = read_groups(pages, layout)
    return summed(parts), bounds


def keys_of_kind(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    keys = torch.randn(shape, generator=generator)
    if kind == "outliers":
        keys[..., 3] *= 40
        keys[..., 17] += 145
    elif kind == "one token":
        keys[..., 5, :] *= 1000
    elif kind == "adversarial":  # rotated, every dimension lies between two codes
        signs = torch.randn(shape, generator=generator).sign()
        keys = ((signs * (63.5 / 127)).double() @ hadamard(shape[-1])).float()
    elif kind == "constant":
        keys = keys[..., :1, :].expand(shape).contiguous()
    return keys


@pytest.mark.parametrize("kind", ["random", "outliers", "one token", "adversarial", "constant"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("target", TARGETS)
def test_no_score_leaves_its_bound(target: ops.Target, head_dim: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    case = make_case(Spec(lens=(640,), head_dim=head_dim, dtype=torch.bfloat16))
    keys = keys_of_kind(kind, (10, 2, 64, head_dim), generator).bfloat16()
    case.keys[0] = keys.transpose(1, 2).flatten(0, 1)
    pages, layout = written(case, target)
    near, bounds = keys_of(pages, layout)
    block = case.block_table[0, :10].long()
    error = keys.double() - near[block]
    query = torch.randn(200, head_dim, generator=generator).double()
    # What a query that knows the error makes of it, and random ones.
    worst = error.norm(dim=-1).amax(-1)
    assert (worst <= bounds[block, :, 0, 0] * (1 + 1e-6)).all()
    off = (error @ query.T).abs().amax(-2)
    assert (off <= bounds[block, :, 0, :1].double() * query.norm(dim=-1) + 1e-9).all()
    if kind == "random":
        assert (worst < 0.02 * keys.double().norm(dim=-1).amax(-1)).all()


@needs_native
@pytest.mark.parametrize("packing", ["vec", "amx"])
@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_the_native_sketch_is_the_specification_s(head_dim: int, packing: Packing) -> None:
    case = make_case(Spec(lens=(300, 64), head_dim=head_dim, dtype=torch.bfloat16))
    pages, layout = written(case, "native", packing)
    codes, scales, centres, bounds = page_views(pages, layout)
    block = case.block_table[0, :4].long()
    keys = layout.keys(pages)[block]
    wanted = sketch_of(keys)
    assert torch.equal(scales[block], wanted.scales)
    torch.testing.assert_close(centres[block, :, 0], wanted.centre, rtol=2**-7, atol=1e-3)
    found = codes[block].transpose(3, 4).flatten(4).flatten(2, 3).double() - 128
    assert ((found - wanted.codes).abs() <= 1).all()
    assert (found != wanted.codes).double().mean() < 0.01
    torch.testing.assert_close(bounds[block, :, 0], wanted.bounds, rtol=1e-2, atol=0)
    assert (keys.double() - summed(parts_of(wanted))).norm(dim=-1).amax() <= wanted.bounds[
        ..., 0
    ].max()


@pytest.mark.parametrize("target", TARGETS)
def test_a_group_that_it_does_not_serve_is_scored_with_k(target: ops.Target) -> None:
    """Of two equal caches one has a group of keys that no sketch serves."""
    case = make_case(Spec(lens=(523,), query_scale=8.0, **BASE))  # type: ignore[arg-type]
    case.keys[0][128:192] *= 60
    pages, layout = written(case, target)
    case = with_sketches(case, *read_groups(pages, layout))
    exact = make_exact(case)
    assert torch.equal(case.scores(0)[..., 128:192], exact.scores(0)[..., 128:192])
    assert not torch.equal(case.scores(0)[..., :64], exact.scores(0)[..., :64])
    check(case, decode(case, target, pages=pages, sketch=True))


def make_exact(case: Case) -> Case:
    return replace(case, sketches=None)


@pytest.mark.parametrize("target", TARGETS)
def test_dense_rows_never_read_it(target: ops.Target) -> None:
    case = make_case(Spec(dense_rows=(0, 1, 3), **BASE))  # type: ignore[arg-type]
    pages, layout = written(case, target)
    for part in page_views(pages, layout):
        part.fill_(77)
    result = decode(case, target, pages=pages, sketch=True)
    assert torch.equal(result.out, decode(case, target).out)


@needs_native
def test_what_it_lists_is_what_it_adds() -> None:
    case = make_case(Spec(lens=(523, 90), min_prob=0.003, **BASE))  # type: ignore[arg-type]
    listed = decode(case, sketch=True).num_kept
    assert torch.equal(kept_keys(case, sketch=True).sum(-1).int(), listed)


@pytest.mark.parametrize("target", TARGETS)
def test_keys_that_are_no_numbers_are_not_served(target: ops.Target) -> None:
    case = make_case(Spec(lens=(256,), **BASE))  # type: ignore[arg-type]
    case.keys[0][70] = math.inf
    pages, layout = written(case, target)
    _, bounds = read_groups(pages, layout)
    at = case.block_table[0, 1].long()
    assert not (bounds[at] < 1e9).all()


def test_a_page_of_another_dtype_is_refused() -> None:
    layout = PageLayout(64, 64, sketch=torch.float32)
    pages = torch.zeros(1, 1, 64, layout.content_elements, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="must be torch.float32"):
        layout.check(pages)


@needs_native
def test_the_life_of_pages() -> None:
    """Ten thousand random steps: sequences grow token by token and by chunks, are freed, share
    their whole blocks, and are computed again into other blocks. The sketch of every group that a
    sequence holds complete is that of its keys."""
    random = Random(0)
    layout = PageLayout(32, 32, sketch=torch.bfloat16)
    pages = torch.full((24, 2, 32, layout.content_elements), math.nan, dtype=torch.bfloat16)
    free, users = list(range(24)), dict.fromkeys(range(24), 0)
    sequences: list[tuple[list[int], int]] = []  # blocks, tokens
    checked = 0

    def release(blocks: list[int]) -> None:
        for block in blocks:
            users[block] -= 1
            if not users[block]:
                free.append(block)

    def grow(blocks: list[int], length: int, tokens: int) -> int:
        while len(blocks) * 32 < length + tokens:
            if not free:
                tokens = len(blocks) * 32 - length
                break
            blocks.append(free.pop(random.randrange(len(free))))
            users[blocks[-1]] = 1
        if tokens == 0:
            return length
        position = torch.arange(length, length + tokens)
        slots = torch.tensor(blocks)[position // 32] * 32 + position % 32
        key, value = torch.randn(2, tokens, 2, 32).bfloat16()
        layout.write(pages, slots, key, value)
        ops.update_side_data(pages, layout, slots, target="native")
        return length + tokens

    for step in range(10_000):
        kind = random.choice(["token"] * 6 + ["chunk", "new", "free", "share", "again"])
        if kind == "new" and free:
            blocks: list[int] = []
            sequences.append((blocks, grow(blocks, 0, random.randint(1, 70))))
        elif not sequences:
            continue
        else:
            at = random.randrange(len(sequences))
            blocks, length = sequences[at]
            if kind in ("token", "chunk"):
                sequences[at] = (blocks, grow(blocks, length, random.choice([1, 1, 40])))
            elif kind == "share":
                common = blocks[: length // 32]
                for block in common:
                    users[block] += 1
                sequences.append((list(common), len(common) * 32))
            else:
                release(blocks)
                del sequences[at]
                if kind == "again" and free:
                    blocks = []
                    sequences.append((blocks, grow(blocks, 0, length)))
        if step % 100 == 0:
            codes, scales, _, _ = page_views(pages, layout)
            found = codes.transpose(3, 4).flatten(4).flatten(2, 3).double() - 128
            held = torch.tensor([b for blocks, n in sequences for b in blocks[: n // 32]]).long()
            checked += len(held)
            wanted = sketch_of(layout.keys(pages)[held])
            torch.testing.assert_close(scales[held], wanted.scales, rtol=2**-7, atol=0)
            assert ((found[held] - wanted.codes).abs() <= 1).all()
    assert checked > 500
