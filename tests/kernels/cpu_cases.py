"""Decode cases on a paged cache for the CPU kernel tests, and what float64 says about them."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from vllm_toptheta.kernels import reference
from vllm_toptheta.kernels.api import (
    PageLayout,
    available_impl,
    decode_attention,
    update_v_means,
)

needs_native = pytest.mark.skipif(
    available_impl().impl != "native", reason=f"no native kernels: {available_impl().reason}"
)
NATIVE = pytest.param("native", marks=needs_native)
IMPLS = [NATIVE, "torch"]


@dataclass(frozen=True)
class Spec:
    """The shape and options of a case; `kept` is the share of keys that theta aims at."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 32
    group_size: int = 16
    lens: tuple[int, ...] = (1, 63, 0, 523)
    dtype: torch.dtype = torch.float32
    kept: float = 0.1
    compensation: bool = True
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    seed: int = 0

    @property
    def layout(self) -> PageLayout:
        return PageLayout(self.block_size, self.head_dim, self.group_size)

    @property
    def sm_scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass
class Result:
    """What a kernel wrote."""

    out: Tensor
    num_kept: Tensor
    v_rows_read: Tensor


@dataclass
class Case:
    """Queries and a filled cache. Whatever no token was written to holds NaN."""

    spec: Spec
    query: Tensor
    keys: list[Tensor]  # per sequence [len, num_kv_heads, head_dim]
    values: list[Tensor]
    kv_cache: Tensor
    block_table: Tensor
    theta: Tensor
    sinks: Tensor | None
    dense: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.dense = torch.zeros(len(self.spec.lens), dtype=torch.bool)

    def run(self, impl: str, **options: int) -> Result:
        spec = self.spec
        num_seqs = len(spec.lens)
        # Outputs are rows of wider tensors, pre-filled with what must be overwritten.
        wide = torch.full((num_seqs, spec.num_heads + 1, spec.head_dim), math.nan, dtype=spec.dtype)
        result = Result(
            wide[:, 1:],
            torch.full((num_seqs, spec.num_heads), -7, dtype=torch.int32),
            torch.full((num_seqs, spec.num_kv_heads), -7, dtype=torch.int32),
        )
        decode_attention(
            self.query,
            self.kv_cache,
            spec.layout,
            self.block_table,
            torch.tensor(spec.lens, dtype=torch.int32),
            self.theta,
            sm_scale=spec.sm_scale,
            dense=self.dense,
            compensation=spec.compensation,
            window=spec.window,
            soft_cap=spec.soft_cap,
            sinks=self.sinks,
            out=result.out,
            num_kept=result.num_kept,
            v_rows_read=result.v_rows_read,
            impl=impl,
            **options,
        )
        assert wide[:, 0].isnan().all()
        return result

    def scores(self, seq: int) -> Tensor:
        """[num_heads, 1, len] float64."""
        return reference.attention_scores(
            self.query[seq : seq + 1].double(),
            self.keys[seq].double(),
            torch.tensor([self.spec.lens[seq]]),
            sm_scale=self.spec.sm_scale,
            window=self.spec.window,
            soft_cap=self.spec.soft_cap,
        )

    def expected(self) -> tuple[Result, Tensor]:
        """The specification in float64, and what a careful low-precision kernel would write."""
        spec, size = self.spec, self.spec.group_size
        num_seqs = len(spec.lens)
        exact = Result(
            torch.zeros(num_seqs, spec.num_heads, spec.head_dim, dtype=torch.float64),
            torch.zeros(num_seqs, spec.num_heads, dtype=torch.int32),
            torch.zeros(num_seqs, spec.num_kv_heads, dtype=torch.int32),
        )
        low = torch.zeros_like(exact.out, dtype=spec.dtype)
        for seq, length in enumerate(spec.lens):
            if length == 0:
                continue
            scores = self.scores(seq)
            if self.dense[seq]:
                kept = scores > -math.inf
            else:
                kept = reference.select_by_theta(scores, self.theta[seq].double()[:, None])
            weights = reference.attention_weights(
                scores, kept, group_size=size if spec.compensation else None, sinks=self.sinks
            )
            value = self.values[seq]
            exact.out[seq] = reference.weighted_values(weights, value.double())[0]
            exact.num_kept[seq] = kept.sum(-1)[:, 0]
            exact.v_rows_read[seq] = reference.count_v_rows(kept, spec.num_kv_heads)[0]
            # Low precision: float32 sums, means rounded to the cache dtype, the output rounded.
            direct = reference.attention_weights(
                scores, kept, group_size=None, sinks=self.sinks
            ).float()
            row = reference.weighted_values(direct, value.float())[0]
            if spec.compensation:
                spread = (weights.float() - direct).squeeze(1)
                pad = (0, -length % size)
                lost = torch.nn.functional.pad(spread, pad).unflatten(-1, (-1, size)).sum(-1)
                parts = value.float().split(size)
                means = torch.stack([part.mean(0) for part in parts]).to(spec.dtype).float()
                row = row + reference.weighted_values(lost[:, None], means)[0]
            low[seq] = row.to(spec.dtype)
        return exact, low


def make_case(spec: Spec, *, num_spare_blocks: int = 3) -> Case:
    """Random queries, keys and values, written to randomly chosen blocks of a cache full of NaN."""
    generator = torch.Generator().manual_seed(spec.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(spec.dtype)

    num_seqs = len(spec.lens)
    max_blocks = max(-(-length // spec.block_size) for length in spec.lens)
    num_blocks = num_seqs * max_blocks + num_spare_blocks
    layout = spec.layout
    kv_cache = torch.full(
        (num_blocks, spec.num_kv_heads, spec.block_size, layout.content_elements),
        math.nan,
        dtype=spec.dtype,
    )
    # Rows of wider tensors, as vLLM passes them; unused block table entries must never be read.
    query = normal(num_seqs, spec.num_heads + 2, spec.head_dim)[:, : spec.num_heads]
    block_table = torch.full((num_seqs, max_blocks + 2), 1 << 30, dtype=torch.int32)
    order = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    case = Case(
        spec,
        query,
        [normal(n, spec.num_kv_heads, spec.head_dim) for n in spec.lens],
        [normal(n, spec.num_kv_heads, spec.head_dim) for n in spec.lens],
        kv_cache,
        block_table[:, : max_blocks + 1],
        torch.zeros(num_seqs, spec.num_heads),
        torch.randn(spec.num_heads, generator=generator) if spec.sinks else None,
    )
    for seq, length in enumerate(spec.lens):
        blocks = -(-length // spec.block_size)
        block_table[seq, :blocks] = order[seq * max_blocks : seq * max_blocks + blocks]
        write(case, seq)
        if length:
            case.theta[seq] = theta_in_gap(case.scores(seq)[:, 0], spec.kept)
    return case


def slots_of(case: Case, seq: int) -> Tensor:
    """Slots of a sequence's tokens: [len] int64."""
    position = torch.arange(case.spec.lens[seq])
    block = case.block_table[seq, position // case.spec.block_size].long()
    return block * case.spec.block_size + position % case.spec.block_size


def write(case: Case, seq: int, impl: str = "torch") -> None:
    """Write a sequence to its blocks and update the means."""
    slots = slots_of(case, seq)
    block, offset = slots // case.spec.block_size, slots % case.spec.block_size
    views = case.spec.layout.views(case.kv_cache)
    views.key_cache.permute(0, 3, 1, 2)[block, offset] = case.keys[seq]
    views.value_cache.transpose(1, 2)[block, offset] = case.values[seq]
    update_v_means(case.kv_cache, case.spec.layout, slots, impl=impl)


def theta_in_gap(scores: Tensor, kept: float) -> Tensor:
    """Thresholds that keep about a share of the keys, in the widest gap nearby.

    No score is near them, so rounding cannot change what is kept.

    Args:
        scores: [num_heads, num_keys] float64, -inf where hidden.
        kept: the share.
    """
    visible = int((scores[0] > -math.inf).sum())
    ranked = scores.sort(-1, descending=True).values[:, :visible]
    if visible == 1:
        return (ranked[:, 0] - 1).float()
    k = min(max(round(visible * kept), 1), visible - 1)
    begin, end = max(k - 1 - visible // 64, 0), min(k + visible // 64, visible - 1)
    gaps = ranked[:, begin:end] - ranked[:, begin + 1 : end + 1]
    at = gaps.argmax(-1, keepdim=True) + begin
    return ((ranked.gather(-1, at) + ranked.gather(-1, at + 1)) / 2).float().squeeze(-1)


def check(case: Case, result: Result) -> None:
    """Counts equal the specification's; outputs err at most twice as much as low precision must."""
    exact, low = case.expected()
    assert torch.equal(result.num_kept, exact.num_kept)
    assert torch.equal(result.v_rows_read, exact.v_rows_read)
    assert result.out.isfinite().all()
    error = (result.out.double() - exact.out).abs().max()
    needed = (low.double() - exact.out).abs().max()
    # The floor is for float32, where the order of the sums and exp2 matter as much as rounding.
    assert error <= 2 * needed + 4e-6 * exact.out.abs().max()


def with_options(spec: Spec, **changes: object) -> Spec:
    """A spec with some fields replaced."""
    return replace(spec, **changes)  # type: ignore[arg-type]
