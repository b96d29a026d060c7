"""Random attention over a paged cache, for every kernel target: pages as each device stores them,
thresholds in the gaps between probabilities, and what float64 says the outcome is.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vllm_toptheta.kernels import reference
from vllm_toptheta.kernels.layout import (
    PROMPT_WEIGHTS,
    RENORMALISE,
    UNCALIBRATED_WEIGHTS,
    Packing,
    PageLayout,
    group_size_of,
)
from vllm_toptheta.kernels.sketch import Sketch, gpu_bytes, gpu_views, sketched_scores

GAP = 2e-3
"""Distance, in log p, that thresholds keep from every key: wider than any kernel's rounding."""


@dataclass(frozen=True)
class Spec:
    """The shape and options of a case.

    Attributes:
        lens: keys of every sequence, those of its queries included; 0 for padding.
        query_lens: query tokens of every sequence; None for one each, which are decode rows. Rows
            of a case with query_lens follow the prompts' rule.
        cache_dtype: of K and V where it is not `dtype`; then they have scales.
        min_prob: what the thresholds are near.
        dense_rows: rows without pruning.
        compensation: False renormalises.
        tile: tokens per tile of the prompts' rule.
    """

    num_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 64
    lens: tuple[int, ...] = (1, 63, 0, 523)
    query_lens: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    min_prob: float = 0.005
    min_mass: float = 0.0
    compensation: bool = True
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    dense_rows: tuple[int, ...] = ()
    tile: int = 128
    query_scale: float = 2.0
    seed: int = 0

    @property
    def group_size(self) -> int:
        return group_size_of(self.block_size)

    @property
    def sm_scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(sequence, keys it sees without a window) of every query token."""
        if self.query_lens is None:
            return list(enumerate(self.lens))
        return [
            (seq, n - q + i + 1)
            for seq, (n, q) in enumerate(zip(self.lens, self.query_lens, strict=True))
            for i in range(q)
        ]


@dataclass
class Result:
    """What a kernel writes.

    Attributes:
        out: [num_rows, num_heads, head_dim].
        num_kept: [num_rows, num_kv_heads] int32, keys on the list.
        kept_mass: [num_rows, num_heads] float32.
        lifts: [num_rows, num_kv_heads] int32.
        v_tiles_read: [num_rows, num_kv_heads] int32, V tiles with a kept key; prompts only.
    """

    out: Tensor
    num_kept: Tensor
    kept_mass: Tensor
    lifts: Tensor
    v_tiles_read: Tensor

    @classmethod
    def empty(cls, spec: Spec, dtype: torch.dtype | None = None) -> "Result":
        """Outputs for a kernel, filled with what must be overwritten."""
        rows = len(spec.rows)
        per_kv_head = (rows, spec.num_kv_heads)
        shape = (rows, spec.num_heads, spec.head_dim)
        return cls(
            torch.full(shape, math.nan, dtype=dtype or spec.dtype),
            torch.full(per_kv_head, -7, dtype=torch.int32),
            torch.full((rows, spec.num_heads), math.nan),
            torch.full(per_kv_head, -7, dtype=torch.int32),
            torch.full(per_kv_head, -7, dtype=torch.int32),
        )


@dataclass
class Case:
    """Queries, keys, values and thresholds.

    Attributes:
        spec: the shape.
        query: [num_rows, num_heads, head_dim].
        keys, values: per sequence [len, num_kv_heads, head_dim] in the cache's dtype; what they
            stand for is that times the scale.
        scales: of K and of V.
        block_table: [num_seqs, max_blocks + 1] int32; unused entries are out of range.
        num_blocks: blocks of the cache.
        log_min_prob: [num_rows, num_kv_heads] float32, away from every key's log p.
        min_mass: [num_rows] float32.
        weights: [num_heads, NUM_WEIGHTS] float32.
        dense: [num_rows] bool.
        sinks: [num_heads] float32, or None.
        sketches: where rows scan the sketch of K, per sequence its parts [len, num_kv_heads, 2 *
            head_dim] and its bounds [groups, num_kv_heads, 2].
    """

    spec: Spec
    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    scales: tuple[float, float]
    block_table: Tensor
    num_blocks: int
    log_min_prob: Tensor
    min_mass: Tensor
    weights: Tensor
    dense: Tensor
    sinks: Tensor | None
    sketches: list[tuple[Tensor, Tensor]] | None = None
    seq_lens: Tensor = field(init=False)
    query_start_loc: Tensor = field(init=False)

    def __post_init__(self) -> None:
        lens = self.spec.lens
        self.seq_lens = torch.tensor(lens, dtype=torch.int32)
        counts = self.spec.query_lens or (1,) * len(lens)
        self.query_start_loc = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)

    def scores(self, row: int) -> Tensor:
        """[num_heads, 1, len] float64 of one query token."""
        spec = self.spec
        seq, visible = spec.rows[row]
        query, row_lens = self.query[row : row + 1].double(), torch.tensor([visible])
        key = self.keys[seq][:visible].double() * self.scales[0]
        options: dict[str, Any] = {
            "sm_scale": spec.sm_scale,
            "window": spec.window,
            "soft_cap": spec.soft_cap,
        }
        if self.sketches is None or self.dense[row]:
            return reference.attention_scores(query, key, row_lens, **options)
        parts, bounds = self.sketches[seq]
        return sketched_scores(
            query, key, parts[:visible], bounds, row_lens, group_size=spec.group_size, **options
        )

    def select(self, row: int) -> reference.Selection:
        """What one query token keeps, float64."""
        spec, scores = self.spec, self.scores(row)
        sinks = None if self.sinks is None else self.sinks.double()
        threshold = self.log_min_prob[row].double()[:, None]
        if self.dense[row]:
            threshold = torch.full_like(threshold, -math.inf)
        if spec.query_lens is None:
            floor = float(self.min_mass[row])
            return reference.select(
                scores, threshold, floor, group_size=spec.group_size, sinks=sinks
            )
        return reference.select_running(
            scores, threshold, group_size=spec.group_size, tile=spec.tile, sinks=sinks
        )

    def expected(self) -> Result:
        """The specification in float64."""
        spec = self.spec
        result = Result.empty(spec, torch.float64)
        for row, (seq, visible) in enumerate(spec.rows):
            if visible == 0:
                for tensor in vars(result).values():
                    tensor[row] = 0
                result.kept_mass[row] = 1
                continue
            chosen = self.select(row)
            weights = self.weights
            if self.dense[row] or spec.query_lens is not None:
                weights = torch.tensor(PROMPT_WEIGHTS).expand(spec.num_heads, -1)
            value = self.values[seq][:visible].double() * self.scales[1]
            result.out[row] = reference.compensated_output(
                chosen, value, weights, group_size=spec.group_size
            )[0]
            result.num_kept[row] = chosen.kept.sum(-1)[:, 0]
            result.kept_mass[row] = chosen.kept_mass[:, 0].float()
            result.lifts[row] = chosen.lifts[:, 0]
            tiles = torch.nn.functional.pad(chosen.kept[:, 0], (0, -visible % 64))
            result.v_tiles_read[row] = tiles.unflatten(-1, (-1, 64)).any(-1).sum(-1)
        return result

    def cpu_pages(
        self, packing: Packing = "vec", *, sketch: bool = False
    ) -> tuple[Tensor, PageLayout]:
        """The cache as CPU kernels read it. Whatever no token was written to holds NaN, and so does
        side data: `update_side_data` is the kernels'."""
        spec = self.spec
        layout = PageLayout(
            spec.block_size, spec.head_dim, packing, sketch=spec.dtype if sketch else None
        )
        pages = torch.full(
            (self.num_blocks, spec.num_kv_heads, spec.block_size, layout.content_elements),
            math.nan,
            dtype=spec.dtype,
        )
        layout.write(pages, self.slots(), torch.cat(self.keys), torch.cat(self.values))
        return pages, layout

    def gpu_pages(self, *, head_major: bool = False) -> Tensor:
        """[num_blocks, num_kv_heads, block_size, 2 * head_dim] as GPU kernels read it: K then V of
        a token. Whatever no token was written to holds NaN.

        Args:
            head_major: heads before slots in memory.
        """
        spec = self.spec
        shape = (self.num_blocks, spec.num_kv_heads, spec.block_size, 2 * spec.head_dim)
        pages = torch.full(shape, math.nan)
        block, slot = self.slots() // spec.block_size, self.slots() % spec.block_size
        both = torch.cat([torch.cat(self.keys), torch.cat(self.values)], -1)
        pages[block, :, slot] = both.float()
        stored = pages.to(spec.cache_dtype or spec.dtype)
        return stored if head_major else stored.transpose(1, 2).contiguous().transpose(1, 2)

    def sketched_gpu_pages(self) -> tuple[Tensor, Sketch]:
        """`gpu_pages` with room behind them, and views of it: NaN, and codes of 77."""
        spec, kv_cache = self.spec, self.gpu_pages()
        plain = kv_cache[0].numel() * kv_cache.element_size()
        sizes = (spec.num_kv_heads, spec.block_size, spec.head_dim)
        raw = torch.empty(self.num_blocks, plain + gpu_bytes(*sizes), dtype=torch.uint8)
        pages = (
            raw[:, :plain]
            .view(kv_cache.dtype)
            .as_strided(
                kv_cache.shape, (raw.shape[1] // kv_cache.element_size(), *kv_cache.stride()[1:])
            )
        )
        sketch = gpu_views(raw, plain, *sizes, spec.dtype)
        for part, number in zip(sketch, (77, math.nan, math.nan, math.nan), strict=True):
            part.fill_(number)
        return pages.copy_(kv_cache), sketch

    def slots(self) -> Tensor:
        """Slots of all cached tokens, as one slot_mapping, int64."""
        size = self.spec.block_size
        position = [torch.arange(n) for n in self.spec.lens]
        table = self.block_table.long()
        return torch.cat([table[s, p // size] * size + p % size for s, p in enumerate(position)])


def make_case(spec: Spec, *, num_spare_blocks: int = 3) -> Case:
    """Random queries, keys and values in randomly chosen blocks."""
    generator = torch.Generator().manual_seed(spec.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    num_seqs, num_rows = len(spec.lens), len(spec.rows)
    max_blocks = max(-(-n // spec.block_size) for n in spec.lens)
    num_blocks = num_seqs * max_blocks + num_spare_blocks
    stored = spec.cache_dtype or spec.dtype
    kv_shape = (spec.num_kv_heads, spec.head_dim)
    block_table = torch.full((num_seqs, max_blocks + 2), 1 << 30, dtype=torch.int32)
    order = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    for seq, n in enumerate(spec.lens):
        used = -(-n // spec.block_size)
        block_table[seq, :used] = order[seq * max_blocks : seq * max_blocks + used]
    # Rows of a wider tensor, as vLLM passes them.
    wide = normal(num_rows, spec.num_heads + 2, spec.head_dim) * spec.query_scale
    weights = UNCALIBRATED_WEIGHTS if spec.compensation else RENORMALISE
    drift = normal(spec.num_heads, 5) * 0.1 if spec.compensation else torch.zeros(spec.num_heads, 5)
    drift[:, 1] = -drift[:, 0]
    case = Case(
        spec=spec,
        query=wide.to(spec.dtype)[:, : spec.num_heads],
        keys=[normal(n, *kv_shape).to(stored) for n in spec.lens],
        # V has an offset, so that means matter.
        values=[(normal(n, *kv_shape) + 0.5).to(stored) for n in spec.lens],
        scales=(0.5, 2.0) if spec.cache_dtype else (1.0, 1.0),
        block_table=block_table[:, : max_blocks + 1],
        num_blocks=num_blocks,
        log_min_prob=torch.full((num_rows, spec.num_kv_heads), math.log(spec.min_prob)),
        min_mass=torch.full((num_rows,), spec.min_mass),
        weights=torch.tensor(weights) + drift,
        dense=torch.zeros(num_rows, dtype=torch.bool),
        sinks=normal(spec.num_heads) if spec.sinks else None,
    )
    case.dense[list(spec.dense_rows)] = True
    for row, (_, visible) in enumerate(spec.rows):
        if visible and not case.dense[row]:
            _move_into_gap(case, row)
    return case


def with_sketches(case: Case, parts: Tensor, bounds: Tensor) -> Case:
    """The case of decode rows that scan the sketches in pages that a kernel has written, its
    thresholds away from what is near to being decided otherwise.

    Args:
        parts: [num_blocks, num_kv_heads, block_size, 2 * head_dim] of `sketch.parts_of`.
        bounds: [num_blocks, num_kv_heads, groups, 2].
    """
    size, groups = case.spec.block_size, bounds.shape[2]
    sketches = []
    for seq, length in enumerate(case.spec.lens):
        position = torch.arange(length)
        block = case.block_table[seq, position // size].long()
        first = torch.arange(length // case.spec.group_size)
        of_group = case.block_table[seq, first // groups].long()
        sketches.append(
            (parts[block, :, position % size], bounds[of_group, :, first % groups].double())
        )
    # What belongs to no complete group may be anything, and meets no weight but must be a number.
    for keys, of_groups in sketches:
        keys[len(of_groups) * case.spec.group_size :] = 0
    sketched = replace(case, sketches=sketches, log_min_prob=case.log_min_prob.clone())
    for row, (_, visible) in enumerate(case.spec.rows):
        if visible and not case.dense[row]:
            _move_into_gap(sketched, row)
    return sketched


def _move_into_gap(case: Case, row: int) -> None:
    """Lower a row's thresholds until no key and no floor is close to being decided otherwise."""
    start = case.log_min_prob[row].clone()
    for step in range(400):
        case.log_min_prob[row] = start - 0.005 * step
        near = case.log_min_prob[row].clone()
        case.log_min_prob[row] = near + GAP
        fewer = case.select(row)
        case.log_min_prob[row] = near - GAP
        more = case.select(row)
        case.log_min_prob[row] = near
        chosen = case.select(row)
        floor = case.min_mass[row]
        case.min_mass[row] = floor + 1e-4 * (floor > 0)
        lifted = case.select(row)
        case.min_mass[row] = floor
        if all(torch.equal(other.kept, chosen.kept) for other in (fewer, more, lifted)):
            return
    raise AssertionError(f"row {row} of {case.spec} has no gap for a threshold; change its seed")


def error_budget(case: Case, expected: Tensor) -> Tensor:
    """[num_rows, 1, 1] largest absolute error that rounding explains, for outputs of the case's
    dtype: means and the output are rounded to it, sums are float32."""
    scale = expected.abs().amax((1, 2), keepdim=True).clamp(min=1e-3)
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-20}
    return scale * unit[case.spec.dtype] * 2 + 2e-5
