"""Prefill cases on a paged cache for the CPU kernel tests, and what float64 says about them."""

import math
from dataclasses import dataclass, field

import torch
from cpu_cases import Case, Spec, make_case, theta_in_gap
from torch import Tensor

from vllm_toptheta.kernels import reference
from vllm_toptheta.kernels.api import V_TILE, prefill_attention


@dataclass
class PrefillResult:
    """What a kernel wrote."""

    out: Tensor
    num_kept: Tensor
    v_tiles_read: Tensor


@dataclass
class PrefillCase:
    """The last tokens of several cached sequences as queries.

    Attributes:
        cache: keys, values, pages and block table; its own queries are not used.
        query_lens: query tokens of each sequence.
        query: [num_tokens, num_heads, head_dim].
        theta: [num_tokens, num_heads] float32.
        dense: [num_tokens] bool.
    """

    cache: Case
    query_lens: tuple[int, ...]
    query: Tensor
    theta: Tensor
    dense: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.dense = torch.zeros(len(self.query), dtype=torch.bool)

    @property
    def spec(self) -> Spec:
        return self.cache.spec

    def run(self, impl: str, **options: int) -> PrefillResult:
        """All query tokens in one call."""
        return self.run_chunk(impl, self.query_lens, self.query_lens, **options)

    def run_in_chunks(self, impl: str, chunk: int, **options: int) -> PrefillResult:
        """`chunk` query tokens of every sequence at a time, on the same full cache."""
        done = [0] * len(self.query_lens)
        parts = self.empty(len(self.query))
        while any(d < q for d, q in zip(done, self.query_lens, strict=True)):
            take = tuple(min(chunk, q - d) for d, q in zip(done, self.query_lens, strict=True))
            upto = tuple(d + t for d, t in zip(done, take, strict=True))
            part = self.run_chunk(impl, upto, take, **options)
            rows, _ = self.chunk(upto, take)
            for name in ("out", "num_kept", "v_tiles_read"):
                getattr(parts, name)[rows] = getattr(part, name)
            done = list(upto)
        return parts

    def run_chunk(
        self, impl: str, upto: tuple[int, ...], take: tuple[int, ...], **options: int
    ) -> PrefillResult:
        """Query tokens upto - take to upto - 1 of every sequence."""
        spec = self.spec
        rows, lens = self.chunk(upto, take)
        result = self.empty(len(rows))
        loc = torch.tensor([0, *take]).cumsum(0).to(torch.int32)
        wide = torch.full((len(rows), spec.num_heads + 2, spec.head_dim), math.nan)
        query = wide.to(spec.dtype)[:, : spec.num_heads]
        query.copy_(self.query[rows])
        prefill_attention(
            query,
            self.cache.kv_cache,
            spec.layout,
            self.cache.block_table,
            loc,
            torch.tensor(lens, dtype=torch.int32),
            self.theta[rows],
            sm_scale=spec.sm_scale,
            dense=self.dense[rows],
            compensation=spec.compensation,
            window=spec.window,
            soft_cap=spec.soft_cap,
            sinks=self.cache.sinks,
            out=result.out,
            num_kept=result.num_kept,
            v_tiles_read=result.v_tiles_read,
            impl=impl,
            **options,
        )
        return result

    def chunk(self, upto: tuple[int, ...], take: tuple[int, ...]) -> tuple[Tensor, list[int]]:
        """Rows of the query tokens upto - take to upto - 1, and keys cached with the last one."""
        ends = [start + u for start, u in zip(self.starts(), upto, strict=True)]
        rows = [torch.arange(end - t, end) for end, t in zip(ends, take, strict=True)]
        spans = zip(self.spec.lens, self.query_lens, upto, strict=True)
        return torch.cat(rows), [n - q + u for n, q, u in spans]

    def row_lens(self, seq: int) -> Tensor:
        """Keys that each query token of a sequence sees, windows left aside: [query_len]."""
        length = self.spec.lens[seq]
        return torch.arange(length - self.query_lens[seq], length) + 1

    def rows_of(self, seq: int) -> slice:
        """The sequence's query tokens."""
        start = self.starts()[seq]
        return slice(start, start + self.query_lens[seq])

    def scores(self, seq: int) -> Tensor:
        """[num_heads, query_len, len] float64."""
        return reference.attention_scores(
            self.query[self.rows_of(seq)].double(),
            self.cache.keys[seq].double(),
            self.row_lens(seq),
            sm_scale=self.spec.sm_scale,
            window=self.spec.window,
            soft_cap=self.spec.soft_cap,
        )

    def expected(self) -> tuple[PrefillResult, Tensor]:
        """The specification in float64, and what a careful low-precision kernel would write."""
        spec, size = self.spec, self.spec.group_size
        exact = self.empty(len(self.query), torch.float64)
        low = torch.zeros_like(exact.out, dtype=spec.dtype)
        for seq, query_len in enumerate(self.query_lens):
            if query_len == 0:
                continue
            rows, value = self.rows_of(seq), self.cache.values[seq]
            scores = self.scores(seq)
            theta = self.theta[rows].double().masked_fill(self.dense[rows, None], -math.inf)
            kept = reference.select_by_theta(scores, theta.transpose(0, 1))
            weights = reference.attention_weights(
                scores,
                kept,
                group_size=size if spec.compensation else None,
                sinks=self.cache.sinks,
            )
            exact.out[rows] = reference.weighted_values(weights, value.double())
            exact.num_kept[rows] = kept.sum(-1).transpose(0, 1).int()
            exact.v_tiles_read[rows] = v_tiles(kept, spec.num_kv_heads)
            direct = reference.attention_weights(
                scores, kept, group_size=None, sinks=self.cache.sinks
            )
            row = reference.weighted_values(direct.float(), value.float())
            if spec.compensation:
                pad = (0, -spec.lens[seq] % size)
                spread = torch.nn.functional.pad((weights - direct).float(), pad)
                means = torch.stack([part.mean(0) for part in value.float().split(size)])
                lost = spread.unflatten(-1, (-1, size)).sum(-1)
                row = row + reference.weighted_values(lost, means.to(spec.dtype).float())
            low[rows] = row.to(spec.dtype)
        return exact, low

    def starts(self) -> list[int]:
        """First query token of each sequence."""
        return torch.tensor([0, *self.query_lens]).cumsum(0).tolist()[:-1]

    def empty(self, num_tokens: int, dtype: torch.dtype | None = None) -> PrefillResult:
        """Outputs, pre-filled with what must be overwritten."""
        spec = self.spec
        wide = torch.full(
            (num_tokens, spec.num_heads + 1, spec.head_dim), math.nan, dtype=dtype or spec.dtype
        )
        return PrefillResult(
            wide[:, 1:],
            torch.full((num_tokens, spec.num_heads), -7, dtype=torch.int32),
            torch.full((num_tokens, spec.num_kv_heads), -7, dtype=torch.int32),
        )


def v_tiles(kept: Tensor, num_kv_heads: int) -> Tensor:
    """V tiles that a group's heads read, from [num_heads, num_rows, num_keys] kept."""
    by_group = kept.unflatten(0, (num_kv_heads, -1)).any(1)
    padded = torch.nn.functional.pad(by_group, (0, -kept.shape[-1] % V_TILE))
    return padded.unflatten(-1, (-1, V_TILE)).any(-1).sum(-1).transpose(0, 1).int()


def unplaced_case(spec: Spec, query_lens: tuple[int, ...]) -> PrefillCase:
    """Random queries for the last tokens of every sequence; all thresholds 0."""
    cache = make_case(spec)
    generator = torch.Generator().manual_seed(spec.seed + 1)
    shape = (sum(query_lens), spec.num_heads, spec.head_dim)
    query = torch.randn(shape, generator=generator).to(spec.dtype)
    return PrefillCase(cache, query_lens, query, torch.zeros(shape[:2]))


def make_prefill_case(spec: Spec, query_lens: tuple[int, ...]) -> PrefillCase:
    """Random queries for the last tokens of every sequence; thresholds in gaps, row by row."""
    case = unplaced_case(spec, query_lens)
    for seq, query_len in enumerate(query_lens):
        scores, start = case.scores(seq), case.rows_of(seq).start
        for row in range(query_len):
            case.theta[start + row] = theta_in_gap(scores[:, row], spec.kept)
    return case


def put_on_scores(case: PrefillCase) -> PrefillCase:
    """Make every row's threshold the score of one of its keys, up to rounding; return the case.

    About an eighth is kept. Whether that key is depends on the last bit of its score, so a kernel
    that computed scores in another order somewhere would count another number of keys.
    """
    for seq in range(len(case.query_lens)):
        scores = case.scores(seq)
        for row, length in enumerate(case.row_lens(seq).tolist()):
            begin = max(length - case.spec.window, 0) if case.spec.window else 0
            # Sorting all keys of a row would take long.
            picked = scores[:, row, torch.linspace(begin, length - 1, 64).long()]
            limit = picked.topk(8, -1).values[:, -1]
            case.theta[case.rows_of(seq).start + row] = limit.float()
    return case


def check_prefill(case: PrefillCase, result: PrefillResult) -> None:
    """Counts equal the specification's; outputs err at most twice as much as low precision must."""
    exact, low = case.expected()
    assert torch.equal(result.num_kept, exact.num_kept)
    assert torch.equal(result.v_tiles_read, exact.v_tiles_read)
    assert result.out.isfinite().all()
    error = (result.out.double() - exact.out).abs().max()
    needed = (low.double() - exact.out).abs().max()
    assert error <= 2 * needed + 1e-5 * exact.out.abs().max()
