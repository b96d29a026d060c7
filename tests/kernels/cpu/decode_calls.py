"""Calls of the CPU decode kernel on random cases, and which keys it added."""

import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from vllm_toptheta.kernels import ops
from vllm_toptheta.kernels.cpu import native
from vllm_toptheta.kernels.cpu.calls import DecodeCall
from vllm_toptheta.kernels.layout import RENORMALISE, Packing, PageLayout
from vllm_toptheta.testing.cases import Case, Result, Spec, error_budget

needs_native = pytest.mark.skipif(
    ops.available_target().target != "native",
    reason=f"no native kernels: {ops.available_target().reason}",
)
TARGETS = [pytest.param("native", marks=needs_native), "eager"]


def decode(
    case: Case,
    target: ops.Target = "native",
    *,
    pages: Tensor | None = None,
    packing: Packing = "vec",
    num_splits: int | None = None,
    num_threads: int | None = None,
    isa: native.Isa | None = None,
) -> Result:
    """Run the kernel, on the case's pages where none are given; what only native.py takes is for
    the native target."""
    spec, result = case.spec, Result.empty(case.spec)
    layout = PageLayout(spec.block_size, spec.head_dim, packing)
    if pages is None:
        pages, _ = case.cpu_pages(packing)
        ops.update_v_means(pages, layout, case.slots(), target=target)
    call = DecodeCall(
        query=case.query,
        kv_cache=pages,
        layout=layout,
        block_table=case.block_table,
        seq_lens=case.seq_lens,
        log_min_prob=case.log_min_prob,
        min_mass=case.min_mass,
        sm_scale=spec.sm_scale,
        dense=case.dense,
        weights=case.weights,
        window=spec.window,
        soft_cap=spec.soft_cap,
        sinks=case.sinks,
        out=result.out,
        num_kept=result.num_kept,
        kept_mass=result.kept_mass,
        lifts=result.lifts,
    )
    if num_splits or num_threads or isa:
        native.decode_attention(call, num_splits=num_splits, num_threads=num_threads, isa=isa)
    else:
        arguments = {field.name: getattr(call, field.name) for field in fields(call)}
        ops.decode_attention(**arguments, target=target)
    return result


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
