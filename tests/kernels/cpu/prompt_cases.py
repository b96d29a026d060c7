"""Prompts on a paged cache for the tests of the CPU prompt kernel: a whole sequence's thresholds
and float64 outcome at once, and calls of some of its query tokens at a time.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_toptheta.kernels import ops, reference
from vllm_toptheta.kernels.cpu.calls import PrefillCall
from vllm_toptheta.kernels.cpu.prefill import KEY_TILE, prefill_native
from vllm_toptheta.kernels.layout import PROMPT_WEIGHTS, V_TILE, Packing, PageLayout
from vllm_toptheta.testing.cases import GAP, Case, Result, Spec, error_budget, make_case

needs_native = pytest.mark.skipif(
    ops.available_target().target != "native",
    reason=f"no native kernels: {ops.available_target().reason}",
)
TARGETS = [pytest.param("native", marks=needs_native), "eager"]


@dataclass
class Prompts:
    """A case of prompt rows with its pages."""

    case: Case
    pages: Tensor
    layout: PageLayout

    @property
    def spec(self) -> Spec:
        return self.case.spec

    @property
    def query_lens(self) -> tuple[int, ...]:
        assert self.spec.query_lens is not None
        return self.spec.query_lens

    def write_pages(self, packing: Packing = "vec") -> None:
        """Write the case's keys and values, and the means of their groups."""
        self.pages, self.layout = self.case.cpu_pages(packing)
        ops.update_side_data(self.pages, self.layout, self.case.slots(), target="eager")

    def rows_of(self, seq: int) -> slice:
        """The sequence's query tokens."""
        start, stop = self.case.query_start_loc[seq : seq + 2].tolist()
        return slice(start, stop)

    def scores(self, seq: int) -> Tensor:
        """[num_heads, query_len, len] float64."""
        spec, length = self.spec, self.spec.lens[seq]
        return reference.attention_scores(
            self.case.query[self.rows_of(seq)].double(),
            self.case.keys[seq].double(),
            torch.arange(length - self.query_lens[seq], length) + 1,
            sm_scale=spec.sm_scale,
            window=spec.window,
            soft_cap=spec.soft_cap,
        )

    def select(self, scores: Tensor, threshold: Tensor) -> reference.Selection:
        """What rows keep at thresholds [num_rows, num_kv_heads]."""
        sinks = self.case.sinks
        return reference.select_running(
            scores,
            threshold.double().T,
            group_size=self.spec.group_size,
            tile=KEY_TILE,
            sinks=None if sinks is None else sinks.double(),
        )

    def expected(self) -> Result:
        """The specification in float64."""
        spec = self.spec
        result = Result.empty(spec, torch.float64)
        result.lifts.zero_()
        weights = torch.tensor(PROMPT_WEIGHTS).expand(spec.num_heads, -1)
        limits = self.case.log_min_prob.masked_fill(self.case.dense[:, None], -math.inf)
        for seq, query_len in enumerate(self.query_lens):
            if query_len == 0:
                continue
            rows, value = self.rows_of(seq), self.case.values[seq].double()
            chosen = self.select(self.scores(seq), limits[rows])
            some = chosen._replace(kept_mass=chosen.kept_mass.clamp(min=1e-30))
            result.out[rows] = reference.compensated_output(
                some, value, weights, group_size=spec.group_size
            )
            result.num_kept[rows] = chosen.kept.sum(-1).T.int()
            result.kept_mass[rows] = chosen.kept_mass.T.float()
            tiles = torch.nn.functional.pad(chosen.kept, (0, -len(value) % V_TILE))
            read = tiles.unflatten(-1, (-1, V_TILE)).any(-1).sum(-1)
            result.v_tiles_read[rows] = read.T.int()
        return result

    def run(self, target: str = "native", **options: Any) -> Result:
        """All query tokens in one call; options as those of `prefill_native`."""
        return self.run_chunk(self.query_lens, self.query_lens, target, **options)

    def run_in_chunks(self, chunk: int, **options: Any) -> Result:
        """`chunk` query tokens of every sequence at a time, on the same full cache."""
        result, done = Result.empty(self.spec), (0,) * len(self.query_lens)
        while done != self.query_lens:
            upto = tuple(min(d + chunk, q) for d, q in zip(done, self.query_lens, strict=True))
            take = tuple(u - d for u, d in zip(upto, done, strict=True))
            part, rows = self.run_chunk(upto, take, **options), self.chunk(upto, take)
            for name in ("out", "num_kept", "v_tiles_read", "kept_mass"):
                getattr(result, name)[rows] = getattr(part, name)
            done = upto
        return result

    def chunk(self, upto: tuple[int, ...], take: tuple[int, ...]) -> Tensor:
        """Rows of the query tokens upto - take to upto - 1 of every sequence."""
        ends = [self.rows_of(seq).start + u for seq, u in enumerate(upto)]
        return torch.cat([torch.arange(e - t, e) for e, t in zip(ends, take, strict=True)])

    def run_chunk(
        self,
        upto: tuple[int, ...],
        take: tuple[int, ...],
        target: str = "native",
        **options: Any,
    ) -> Result:
        """Query tokens upto - take to upto - 1 of every sequence."""
        starts = torch.tensor([0, *take]).cumsum(0).to(torch.int32)
        spans = zip(self.spec.lens, self.query_lens, upto, strict=True)
        lens = torch.tensor([n - q + u for n, q, u in spans], dtype=torch.int32)
        return self.call(self.chunk(upto, take), starts, lens, target, **options)

    def call(
        self, rows: Tensor, starts: Tensor, lens: Tensor, target: str, **options: Any
    ) -> Result:
        """Some rows of the batch with these query_start_loc and seq_lens."""
        spec, case = self.spec, self.case
        result = rows_of_result(Result.empty(spec), slice(0, len(rows)))
        # Rows of wider tensors, as vLLM passes them.
        shape = (2, len(rows), spec.num_heads + 2, spec.head_dim)
        wide = torch.full(shape, math.nan, dtype=spec.dtype)
        query, result.out = wide[0, :, 1:-1], wide[1, :, : spec.num_heads]
        query.copy_(case.query[rows])
        call = PrefillCall(
            query=query,
            kv_cache=self.pages,
            layout=self.layout,
            block_table=case.block_table,
            seq_lens=lens,
            log_min_prob=case.log_min_prob[rows],
            sm_scale=spec.sm_scale,
            dense=case.dense[rows],
            window=spec.window,
            soft_cap=spec.soft_cap,
            sinks=case.sinks,
            out=result.out,
            num_kept=result.num_kept,
            kept_mass=result.kept_mass,
            query_start_loc=starts,
            v_tiles_read=result.v_tiles_read,
        )
        if options:
            prefill_native(call, **options)
        else:
            names = PrefillCall.__dataclass_fields__
            ops.prefill_attention(**{name: getattr(call, name) for name in names}, target=target)
        return result

    def place_on_keys(self) -> None:
        """Make every threshold the log p of one of the row's keys, up to rounding.

        About an eighth of a tile is above it. Whether that key is kept depends on the last bits of
        its score and of the running denominator, so that a kernel that computed either in another
        order somewhere would keep another number of keys.
        """
        for seq, query_len in enumerate(self.query_lens):
            scores = self.scores(seq)
            for i in range(query_len):
                visible = self.spec.lens[seq] - query_len + i + 1
                own = (visible - 1) // KEY_TILE
                # The first tile that a row meets, or the last: what it has seen is plain there.
                first = i % 2 == 0 and self.spec.window is None
                tile = 0 if first else max(own - 1, 0) if own != 1 else 1
                keys = slice(tile * KEY_TILE, (tile + 1) * KEY_TILE)
                seen = scores[:, i, keys] if first else scores[:, i]
                if self.case.sinks is not None:
                    seen = torch.cat([seen, self.case.sinks.double()[:, None]], -1)
                log_probs = scores[:, i, keys] - seen.logsumexp(-1, keepdim=True)
                wanted = log_probs.unflatten(0, (self.spec.num_kv_heads, -1)).amax(1)
                rank = max(int((wanted[0] > -math.inf).sum()) // 8, 1)
                row = self.rows_of(seq).start + i
                self.case.log_min_prob[row] = wanted.topk(rank).values[:, -1].float()


def unplaced_prompts(spec: Spec, packing: Packing = "vec") -> Prompts:
    """A case whose thresholds are all `min_prob`."""
    case = make_case(replace(spec, dense_rows=tuple(range(len(spec.rows)))))
    case.spec = spec
    case.dense.zero_()
    case.dense[list(spec.dense_rows)] = True
    prompts = Prompts(case, *case.cpu_pages(packing))
    prompts.write_pages(packing)
    return prompts


def make_prompts(spec: Spec, packing: Packing = "vec") -> Prompts:
    """A case with thresholds that no key is close to."""
    prompts = unplaced_prompts(spec, packing)
    for seq, query_len in enumerate(prompts.query_lens):
        scores, rows = prompts.scores(seq), prompts.rows_of(seq)
        limits = prompts.case.log_min_prob[rows]
        left = torch.arange(query_len)
        while len(left):
            # Rows without a close key are done; the others try a lower threshold.
            fewer = prompts.select(scores[:, left], limits[left] + GAP).kept
            more = prompts.select(scores[:, left], limits[left] - GAP).kept
            left = left[(fewer != more).any(-1).any(0)]
            limits[left] -= 0.7 * GAP
    return prompts


def rows_of_result(result: Result, rows: slice) -> Result:
    """Some rows of a result."""
    return Result(**{name: tensor[rows] for name, tensor in vars(result).items()})


def check(prompts: Prompts, result: Result) -> None:
    """Counts equal the specification's, outputs and masses do up to rounding."""
    expected = prompts.expected()
    assert torch.equal(result.num_kept, expected.num_kept)
    assert torch.equal(result.v_tiles_read, expected.v_tiles_read)
    torch.testing.assert_close(result.kept_mass, expected.kept_mass, rtol=0, atol=1e-5)
    error = (result.out.double() - expected.out).abs()
    assert (error <= error_budget(prompts.case, expected.out)).all(), float(error.max())


def assert_same(result: Result, expected: Result) -> None:
    """Equal counts; the rest up to the rounding of another cut of the work."""
    assert torch.equal(result.num_kept, expected.num_kept)
    assert torch.equal(result.v_tiles_read, expected.v_tiles_read)
    torch.testing.assert_close(result.kept_mass, expected.kept_mass, rtol=0, atol=1e-6)
    close = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[result.out.dtype]
    torch.testing.assert_close(result.out, expected.out, rtol=close, atol=close)
