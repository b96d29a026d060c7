"""Calls of the CPU decode kernel on random cases, and which keys it added."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vllm_toptheta.kernels import ops
from vllm_toptheta.kernels.cpu import native
from vllm_toptheta.kernels.decode import DecodeLayer, DecodeRows
from vllm_toptheta.kernels.layout import RENORMALISE, Packing, PageLayout
from vllm_toptheta.testing.cases import Case, Result, Spec, error_budget

needs_native = pytest.mark.skipif(
    ops.available_target().target != "native",
    reason=f"no native kernels: {ops.available_target().reason}",
)
BASE = {"dtype": torch.bfloat16, "head_dim": 64, "block_size": 64}
OPTIONS = [
    {},
    {"min_mass": 0.8, "sinks": True},
    {"window": 201, "soft_cap": 6.0},
    {"dense_rows": (1, 3)},
    {"min_prob": 1e-5},
    {"compensation": False},
    {"num_heads": 7, "num_kv_heads": 1, "head_dim": 128, "block_size": 128},
    {"num_heads": 16, "num_kv_heads": 1, "head_dim": 96, "block_size": 32},
    {"num_heads": 2, "num_kv_heads": 2, "head_dim": 256, "block_size": 128},
    {"num_heads": 3, "num_kv_heads": 1, "head_dim": 256, "block_size": 128},
    {"num_heads": 11, "num_kv_heads": 1, "head_dim": 32, "lens": (1500, 33), "min_prob": 0.01},
]
"""What pages of every kind are tried with, on top of BASE."""

TARGETS = [pytest.param("native", marks=needs_native), "eager"]


def decode(
    case: Case,
    target: ops.Target = "native",
    *,
    pages: Tensor | None = None,
    packing: Packing = "vec",
    sketch: bool = False,
    num_splits: int | None = None,
    num_threads: int | None = None,
    isa: native.Isa | None = None,
) -> Result:
    """Run the kernel, on the case's pages where none are given; what only native.py takes is for
    the native target."""
    spec, result = case.spec, Result.empty(case.spec)
    layout = PageLayout(
        spec.block_size, spec.head_dim, packing, sketch=spec.dtype if sketch else None
    )
    if pages is None:
        pages, _ = case.cpu_pages(packing, sketch=sketch)
        ops.update_side_data(pages, layout, case.slots(), target=target)
    layer, rows = layer_and_rows(case, result, layout, target)
    if num_splits or num_threads or isa:
        assert layer.args is not None
        layer.args.num_splits, layer.args.num_threads = num_splits or 0, num_threads or 0
        layer.args.avx512 = native.use_avx512(isa)
    layer.attend(rows, case.query, pages, result.out, case.sinks)
    return result


def layer_and_rows(
    case: Case, result: Result, layout: PageLayout, target: ops.Target
) -> tuple[DecodeLayer, DecodeRows]:
    """What a case is to the kernel, as the only layer of its step."""
    layer = DecodeLayer(
        0,
        layout,
        case.weights,
        sm_scale=case.spec.sm_scale,
        window=case.spec.window,
        soft_cap=case.spec.soft_cap,
        target=target,
    )
    rows = DecodeRows(
        block_table=case.block_table,
        seq_lens=case.seq_lens,
        log_min_prob=case.log_min_prob[None],
        min_mass=case.min_mass,
        dense=case.dense[None],
        num_kept=result.num_kept[None],
        kept_mass=result.kept_mass[None],
        lifts=result.lifts[None],
    )
    return layer, rows


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """What kernels take where they are not told; tests have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(case: Case, result: Result) -> None:
    """Raise AssertionError unless a result is what float64 says."""
    expected = case.expected()
    assert torch.equal(result.num_kept, expected.num_kept)
    assert torch.equal(result.lifts, expected.lifts)
    torch.testing.assert_close(result.kept_mass, expected.kept_mass, rtol=0, atol=2e-5)
    error = (result.out.double() - expected.out).abs()
    assert (error <= error_budget(case, expected.out)).all(), f"largest error {error.max():.2e}"


def kept_keys(case: Case, target: ops.Target = "native", **knobs: object) -> Tensor:
    """Which keys are on the lists: [num_rows, num_kv_heads, longest] bool.

    V of head_dim keys at a time is a unit vector each, the rest zero, and nothing stands for lost
    mass: a column of the output is positive where its key was added.
    """
    spec = case.spec
    longest, dim = max(spec.lens), spec.head_dim
    kept = torch.zeros(len(spec.rows), spec.num_kv_heads, longest, dtype=torch.bool)
    for first in range(0, longest, dim):
        values = []
        for key in case.keys:
            one_hot = torch.zeros_like(key)
            here = range(first, min(first + dim, len(key)))
            one_hot[here, :, range(len(here))] = 1
            values.append(one_hot)
        probe = replace(
            case, values=values, weights=torch.tensor(RENORMALISE).repeat(spec.num_heads, 1)
        )
        out = decode(probe, target, **knobs).out  # type: ignore[arg-type]
        added = out.unflatten(1, (spec.num_kv_heads, -1)).float().amax(2) > 0
        kept[..., first : first + dim] = added[..., : longest - first]
    return kept


def expected_keys(case: Case) -> Tensor:
    """`kept_keys` as float64 has it."""
    spec = case.spec
    kept = torch.zeros(len(spec.rows), spec.num_kv_heads, max(spec.lens), dtype=torch.bool)
    for row, (_, visible) in enumerate(spec.rows):
        if visible:
            kept[row, :, :visible] = case.select(row).kept[:, 0]
    return kept


def long_spec(**options: object) -> Spec:
    """A batch of unequal rows, one of them long enough to be cut."""
    base = Spec(lens=(1500, 64, 0, 333), min_prob=0.003, head_dim=32)
    return replace(base, **options)  # type: ignore[arg-type]
