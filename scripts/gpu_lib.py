"""Paged caches, float64 references and timing for the GPU scripts; needs torch and triton only."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_toptheta.kernels.reference import (
    attention_scores,
    attention_weights,
    count_v_rows,
    select_by_theta,
    weighted_values,
)
from vllm_toptheta.kernels.triton_config import LaunchConfig, choose_config, choose_num_splits
from vllm_toptheta.kernels.triton_decode import DecodeScratch, decode_attention
from vllm_toptheta.kernels.triton_means import update_v_means


@dataclass
class Shape:
    """What one batch looks like.

    Attributes:
        lens: cached keys of every row.
        heads: query heads per kv head.
        k: keys a head keeps, about.
        dense: whether all rows run dense.
        best_only: whether every second head's theta lies above all scores.
    """

    lens: tuple[int, ...]
    num_kv_heads: int = 8
    heads: int = 4
    head_dim: int = 128
    block_size: int = 16
    group_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None
    k: int = 64
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    compensation: bool = True
    dense: bool = False
    best_only: bool = False

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.heads

    @property
    def stored(self) -> torch.dtype:
        return self.cache_dtype or self.dtype

    @property
    def cache_bytes(self) -> int:
        """Bytes of K and V."""
        per_token = 2 * self.num_kv_heads * self.head_dim * self.stored.itemsize
        return sum(self.lens) * per_token

    def describe(self) -> str:
        changed = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "lens" and value != field.default:
                changed.append(f"{field.name}={str(value).removeprefix('torch.')}")
        return f"{list(self.lens)} {' '.join(changed)}"


class Batch:
    """Tensors of a shape on a device, and the launch of the kernels on them."""

    def __init__(self, shape: Shape, device: torch.device, seed: int = 0, num_units: int = 1):
        self.shape, self.device = shape, device
        generator = torch.Generator(device=device).manual_seed(seed)
        size, dim, kv_heads = shape.block_size, shape.head_dim, shape.num_kv_heads
        blocks = [math.ceil(n / size) for n in shape.lens]
        num_blocks, width = sum(blocks) + 1, max(max(blocks), 1)
        self.block_table = torch.zeros(len(blocks), width, dtype=torch.int32, device=device)
        order = (torch.randperm(num_blocks - 1, generator=generator, device=device) + 1).int()
        start = 0
        for row, count in enumerate(blocks):
            self.block_table[row, :count] = order[start : start + count]
            start += count
        self.seq_lens = torch.tensor(shape.lens, dtype=torch.int32, device=device)
        self.row_lens = self.seq_lens
        kv = torch.empty(num_blocks, size, kv_heads, 2 * dim, dtype=shape.stored, device=device)
        for part in kv.split(max(1, (64 << 20) // kv[0].numel())):  # float32 noise in small pieces
            noise = torch.empty(part.shape, dtype=torch.float32, device=device)
            noise.normal_(generator=generator)
            noise[..., dim:] += 0.5  # so that the means of V matter
            part.copy_(noise)
        self.key_cache, self.value_cache = kv.transpose(1, 2).split(dim, dim=-1)
        self.v_means: Tensor | None = None
        if shape.compensation:
            self.v_means = torch.empty(
                num_blocks,
                kv_heads,
                size // shape.group_size,
                dim,
                dtype=shape.dtype,
                device=device,
            )
            slots = torch.arange(num_blocks * size, dtype=torch.int64, device=device)
            update_v_means(self.value_cache, self.v_means, slots)
        query = torch.empty(len(blocks), shape.num_heads, dim, device=device)
        self.query = query.normal_(generator=generator).to(shape.dtype)
        self.sm_scale = dim**-0.5
        self.scales = (0.5, 2.0) if shape.cache_dtype else (1.0, 1.0)
        self.k_scale, self.v_scale = (torch.tensor([s], device=device) for s in self.scales)
        self.sinks = None
        if shape.sinks:
            self.sinks = torch.linspace(-1, 2, shape.num_heads, device=device)
        self.dense = torch.full((len(blocks),), int(shape.dense), dtype=torch.int8, device=device)
        self.theta = self.gaussian_theta()
        self.num_units = num_units
        self.config = choose_config(
            head_dim=dim, group_size=shape.group_size, cache_bytes=shape.stored.itemsize
        )
        self._allocate_outputs()

    def _allocate_outputs(self) -> None:
        shape, num_seqs = self.shape, len(self.shape.lens)
        self.out = torch.empty_like(self.query)
        self.num_kept = torch.empty(
            num_seqs, shape.num_heads, dtype=torch.int32, device=self.device
        )
        self.v_rows_read = torch.empty(
            num_seqs, shape.num_kv_heads, dtype=torch.int32, device=self.device
        )
        self.scratch = DecodeScratch.allocate(
            num_seqs * 64, shape.num_heads, shape.num_kv_heads, shape.head_dim, self.device
        )

    def gaussian_theta(self) -> Tensor:
        """[num_rows, num_heads] thresholds that about k of a row's normally distributed scores
        reach.
        """
        deviation = self.query.float().norm(dim=-1) * self.sm_scale * self.scales[0]
        lens = self.row_lens.clamp(min=1).float()
        if self.shape.window is not None:
            lens = lens.clamp(max=self.shape.window)
        tail = (self.shape.k / lens).clamp(max=0.999)
        quantile = math.sqrt(2) * torch.erfinv(1 - 2 * tail)
        return deviation * quantile[:, None]

    def splits(self) -> int:
        """The number of splits serving would choose."""
        return choose_num_splits(
            len(self.shape.lens),
            self.shape.num_kv_heads,
            self.num_units,
            self.config.programs_per_unit,
        )

    def launch(
        self,
        *,
        num_splits: int | None = None,
        config: LaunchConfig | None = None,
        dense: Tensor | None = None,
        value_cache: Tensor | None = None,
        compensation: bool = True,
    ) -> None:
        """Both stages; results lie in out, num_kept and v_rows_read."""
        shape = self.shape
        quantised = shape.cache_dtype is not None
        decode_attention(
            self.query,
            self.key_cache,
            self.value_cache if value_cache is None else value_cache,
            self.v_means if compensation else None,
            self.block_table,
            self.seq_lens,
            self.theta,
            sm_scale=self.sm_scale,
            dense=self.dense if dense is None else dense,
            out=self.out,
            num_kept=self.num_kept,
            v_rows_read=self.v_rows_read,
            scratch=self.scratch,
            num_splits=num_splits or self.splits(),
            config=config or self.config,
            window=shape.window,
            soft_cap=shape.soft_cap,
            sinks=self.sinks,
            k_scale=self.k_scale if quantised else None,
            v_scale=self.v_scale if quantised else None,
        )

    def row(self, cache: Tensor, seq: int) -> Tensor:
        """[length, num_kv_heads, head_dim] of one row, as stored."""
        length = self.shape.lens[seq]
        blocks = self.block_table[seq, : math.ceil(length / self.shape.block_size)].long()
        return cache[blocks].transpose(1, 2).flatten(0, 1)[:length]

    def scores(self, seq: int) -> Tensor:
        """[num_heads, length] float64."""
        key = self.row(self.key_cache, seq).double() * self.scales[0]
        return attention_scores(
            self.query[seq : seq + 1].double(),
            key,
            torch.tensor([self.shape.lens[seq]], device=self.device),
            sm_scale=self.sm_scale,
            window=self.shape.window,
            soft_cap=self.shape.soft_cap,
        )[:, 0]

    def place_theta_in_gaps(self) -> None:
        """Move thresholds into gaps between scores near rank k that no rounding can bridge."""
        for seq, length in enumerate(self.shape.lens):
            if length == 0:
                continue
            ordered = self.scores(seq).sort(dim=-1, descending=True).values
            visible = int((ordered[0] > -math.inf).sum())
            first = min(self.shape.k, visible)
            if first == visible:
                self.theta[seq] = -1e30
                continue
            self.theta[seq] = self.theta_in_gap(ordered, first)

    def theta_in_gap(self, ordered: Tensor, first: int) -> Tensor:
        """[num_heads] thresholds in the widest gap between scores from rank `first` on, or above
        all of them where a shape wants the best key alone.

        Args:
            ordered: [num_heads, length] scores of a row, the highest first.
            first: keys to keep at least, fewer than are visible.
        """
        visible = int((ordered[0] > -math.inf).sum())
        last = min(first + 64, visible - 1)
        gaps = ordered[:, first - 1 : last] - ordered[:, first : last + 1]
        at = gaps.argmax(-1, keepdim=True) + first - 1
        theta = ((ordered.gather(-1, at) + ordered.gather(-1, at + 1)) / 2)[:, 0].float()
        if self.shape.best_only:
            theta[::2] = ordered[::2, 0].float() + 1
        return theta

    def specified(self, seq: int, scores: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """What the specification keeps, [num_heads, num_rows, length] bool, and its output,
        [num_rows, num_heads, head_dim] float64.

        Args:
            seq: whose V rows.
            scores: [num_heads, num_rows, length] float64.
            theta: [num_heads, num_rows] float64.
        """
        if self.shape.dense:
            theta = torch.full_like(theta, -math.inf)
        kept = select_by_theta(scores, theta)
        weights = attention_weights(
            scores,
            kept,
            group_size=self.shape.group_size if self.shape.compensation else None,
            sinks=None if self.sinks is None else self.sinks.double(),
        )
        value = self.row(self.value_cache, seq).double() * self.scales[1]
        return kept, weighted_values(weights, value)

    def expected(self, seq: int) -> tuple[Tensor, Tensor, Tensor]:
        """Output (float64), num_kept and v_rows_read of the specification."""
        theta = self.theta[seq].double()[:, None]
        kept, out = self.specified(seq, self.scores(seq)[:, None], theta)
        rows = count_v_rows(kept, self.shape.num_kv_heads)[0]
        return out[0], kept.sum(-1)[:, 0], rows

    def kept_sets(self, num_splits: int) -> Tensor:
        """[num_seqs, num_heads, longest] bool, read off outputs whose V rows tell the key's
        position.

        V is one-hot in the position modulo head_dim, for one stretch of head_dim positions at a
        time.
        """
        shape, longest = self.shape, max(self.shape.lens)
        kept = torch.zeros(len(shape.lens), shape.num_heads, longest, dtype=torch.bool)
        for start in range(0, longest, shape.head_dim):
            # Same strides as the cache, as K and V are halves of the same rows.
            whole = (*self.key_cache.shape[:3], 2 * shape.head_dim)
            value = torch.empty_strided(
                whole, self.key_cache.stride(), dtype=shape.stored, device=self.device
            )
            value = value.zero_()[..., : shape.head_dim]
            for seq, length in enumerate(shape.lens):
                stop = max(min(start + shape.head_dim, length), start)
                position = torch.arange(start, stop, device=self.device)
                block = self.block_table[seq, position // shape.block_size].long()
                value[block, :, position % shape.block_size, position - start] = 1
            self.launch(num_splits=num_splits, value_cache=value, compensation=False)
            piece = (self.out > 0).cpu()[..., : longest - start]
            kept[..., start : start + piece.shape[-1]] = piece
        return kept


def time_graphs(
    variants: dict[str, Callable[[], object]], device: torch.device, repeats: int = 30
) -> dict[str, tuple[float, float, float]]:
    """Milliseconds (p20, p50, p80) of each variant: graphs, cold cache, interleaved."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
    graphs = {}
    for name, variant in variants.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                variant()
        torch.cuda.current_stream().wait_stream(stream)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            variant()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 3):
        for name, graph in graphs.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat >= 3:
                times[name].append(begin.elapsed_time(end))
    points = torch.tensor([0.2, 0.5, 0.8])
    return {
        name: tuple(torch.tensor(values).quantile(points).tolist())  # type: ignore[misc]
        for name, values in times.items()
    }
