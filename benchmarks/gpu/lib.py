"""The device, caches laid out as vLLM serves them, and batches of the kernels on them, for the GPU
scripts; needs torch and triton only.
"""

import copy
import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shape import CLUSTER, CLUSTERED, Shape
from vllm_toptheta.kernels import reference
from vllm_toptheta.kernels.layout import (
    PROMPT_WEIGHTS,
    UNCALIBRATED_WEIGHTS,
    V_TILE,
    group_size_of,
)
from vllm_toptheta.kernels.sketch import (
    GPU_GROUP,
    Sketch,
    gpu_bytes,
    gpu_views,
    parts_of,
    sketched_scores,
)
from vllm_toptheta.kernels.triton.config import (
    choose_config,
    choose_num_splits,
    choose_prefill_config,
)
from vllm_toptheta.kernels.triton.decode import DecodeScratch, decode_attention
from vllm_toptheta.kernels.triton.means import update_v_means
from vllm_toptheta.kernels.triton.prefill import prefill_attention
from vllm_toptheta.kernels.triton.sketch import update_sketch
from vllm_toptheta.testing.cases import Result

E4M3 = torch.float8_e4m3fn
QUERY_SCALE = 2.0
"""Of random queries: probabilities about as uneven as those of models, spread over all keys."""


@dataclass(frozen=True)
class Machine:
    """What the scripts run on: a GPU, or Triton's interpreter on the CPU, which is for tiny shapes
    and measures nothing.

    Attributes:
        num_units: multiprocessors.
        has_e4m3: whether kernels can read a cache of that type.
    """

    device: torch.device
    name: str
    num_units: int
    has_e4m3: bool

    @classmethod
    def find(cls) -> "Machine":
        """The current GPU.

        Raises:
            RuntimeError: there is none, and TRITON_INTERPRET=1 is not set.
        """
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            # AMD has a type of its own before gfx950, which these scripts do not make.
            e4m3 = torch.version.hip is None and (properties.major, properties.minor) >= (8, 9)
            device = torch.device("cuda", 0)
            return cls(device, properties.name, properties.multi_processor_count, e4m3)
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                f"torch {torch.__version__} finds no GPU; with TRITON_INTERPRET=1 this script "
                "tries itself out on tiny shapes"
            )
        return cls(torch.device("cpu"), "no GPU, Triton's interpreter", 4, True)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def fits(self, size: float) -> bool:
        """Whether this many bytes are free, with a tenth of the memory to spare."""
        if not self.is_gpu:
            return True
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return size < free - 0.1 * total


def served_pages(
    sizes: tuple[int, int, int, int],
    stored: torch.dtype,
    dtype: torch.dtype,
    device: torch.device,
    *,
    sketch: bool = False,
) -> tuple[Tensor, Tensor, Sketch | None]:
    """A cache as vLLM holds it: every page is padded, with K and V of its tokens in front, their
    means behind these, and where asked the sketch of K behind the means. All of it is NaN.

    Args:
        sizes: num_blocks, num_kv_heads, block_size, head_dim.
        stored: dtype of K and V.
        dtype: of the means.

    Returns:
        K and V, [num_blocks, num_kv_heads, block_size, 2 * head_dim], slots before heads in memory,
        [num_blocks, num_kv_heads, block_size // group_size, head_dim], and the sketch's views.
    """
    blocks, heads, size, dim = sizes
    groups, kv_bytes = size // group_size_of(size), heads * size * 2 * dim * stored.itemsize
    used = kv_bytes + heads * groups * dim * dtype.itemsize
    page = (used + (gpu_bytes(*sizes[1:]) if sketch else 0)) // 128 * 128 + 256
    flat = torch.full((blocks * page,), 255, dtype=torch.uint8, device=device)
    kv_cache = flat.view(stored).as_strided(
        (blocks, heads, size, 2 * dim), (page // stored.itemsize, 2 * dim, heads * 2 * dim, 1)
    )
    means = flat.view(dtype).as_strided(
        (blocks, heads, groups, dim),
        (page // dtype.itemsize, groups * dim, dim, 1),
        kv_bytes // dtype.itemsize,
    )
    views = gpu_views(flat.view(blocks, page), used, *sizes[1:], dtype) if sketch else None
    return kv_cache, means, views


def error_of_budget(out: Tensor, expected: Tensor) -> float:
    """Largest error over what rounding outputs, probabilities and means to the outputs' dtype may
    cost, with a factor 2 to spare; infinite where an output is not a number.

    Args:
        expected: float64 outputs.
    """
    error = float((out.double() - expected).abs().max())
    budget = 2 * torch.finfo(out.dtype).eps * max(float(expected.abs().max()), 0.5)
    return math.inf if math.isnan(error) else error / budget


@dataclass
class Layer:
    """What the kernels of one layer are given, all on one device; names as in their contract.

    Attributes:
        options: what all launches are told: sm_scale, scales of a float8 cache, window and so on.
        is_prompt: whether rows follow the prompts' rule.
        config: launch parameters, serving's to begin with.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    means: Tensor
    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    log_min_prob: Tensor
    min_mass: Tensor
    dense: Tensor
    weights: Tensor
    options: dict[str, Any]
    is_prompt: bool
    machine: Machine
    max_len: int
    config: Any = None
    scratch: DecodeScratch | None = None
    sketch: Sketch | None = None

    def __post_init__(self) -> None:
        num_kv_heads, block_size, head_dim = self.key.shape[1:]
        if self.config is not None:
            return
        if self.is_prompt:
            self.config = choose_prefill_config(
                head_dim=head_dim,
                cache_bytes=self.key.itemsize,
                warp_size=64 if torch.version.hip else 32,
            )
            return
        self.config = choose_config(head_dim=head_dim, warp_size=64 if torch.version.hip else 32)
        # It serves all parts of a batch, as it serves all layers.
        self.scratch = DecodeScratch.allocate(
            num_rows=len(self.query),
            num_parts=max(64 * len(self.query), self.machine.num_units * 4),
            max_len=self.max_len,
            num_heads=self.query.shape[1],
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            device=self.query.device,
            sketch=self.sketch is not None,
        )

    def part(self, first: int, count: int) -> "Layer":
        """Some rows of a decode batch as a batch of their own on the same cache."""
        names = ("query", "block_table", "seq_lens", "log_min_prob", "min_mass", "dense")
        # Copies, because kernels are specialised for the alignment of what they are given.
        changed = {name: getattr(self, name)[first : first + count].clone() for name in names}
        starts = self.query_start_loc[: count + 1].clone()
        return dataclasses.replace(self, query_start_loc=starts, **changed)

    def result(self) -> Result:
        """Outputs that no kernel has written yet."""
        rows, heads, kv_heads = len(self.query), self.query.shape[1], self.key.shape[1]
        device = self.query.device
        counts = [
            torch.full((rows, kv_heads), -7, dtype=torch.int32, device=device) for _ in range(3)
        ]
        mass = torch.full((rows, heads), math.nan, device=device)
        return Result(torch.full_like(self.query, math.nan), counts[0], mass, *counts[1:])

    def attend(self, result: Result, num_splits: int | None = None) -> None:
        """Launch the kernels.

        Args:
            num_splits: of decode, as serving chooses by default.
        """
        cache = (self.key, self.value, self.means, self.block_table)
        common = {
            "dense": self.dense,
            "out": result.out,
            "num_kept": result.num_kept,
            "kept_mass": result.kept_mass,
            "config": self.config,
            **self.options,
        }
        if self.is_prompt:
            prefill_attention(
                self.query,
                *cache,
                self.query_start_loc,
                self.seq_lens,
                self.log_min_prob,
                v_tiles_read=result.v_tiles_read,
                **common,
            )
            return
        assert self.scratch is not None
        num_seqs, units = len(self.query), self.machine.num_units
        decode_attention(
            self.query,
            *cache,
            self.seq_lens,
            self.log_min_prob,
            self.min_mass,
            weights=self.weights,
            lifts=result.lifts,
            scratch=self.scratch,
            sketch=self.sketch,
            num_splits=num_splits
            or choose_num_splits(num_seqs, self.key.shape[1], units, self.config.programs_per_unit),
            **common,
        )


class Batch:
    """Random tensors of a shape on a device, and what float64 says of some of their rows."""

    def __init__(self, shape: Shape, machine: Machine, seed: int = 0):
        self.shape, device = shape, machine.device
        generator = torch.Generator(device=device).manual_seed(seed)
        size, dim, kv_heads = shape.block_size, shape.head_dim, shape.num_kv_heads
        blocks = [math.ceil(n / size) for n in shape.lens]
        num_blocks = sum(blocks) + 1
        block_table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32, device=device)
        order = (torch.randperm(num_blocks - 1, generator=generator, device=device) + 1).int()
        for row, own in enumerate(order.split(blocks)):
            block_table[row, : len(own)] = own
        sizes = (num_blocks, kv_heads, size, dim)
        kv_cache, means, sketch = served_pages(
            sizes, shape.stored, shape.dtype, device, sketch=shape.has_sketch
        )
        # float32 noise in small pieces.
        for part in kv_cache.split(max(1, (64 << 20) // kv_cache[0].numel())):
            noise = torch.empty(part.shape, dtype=torch.float32, device=device)
            noise.normal_(generator=generator)
            if shape.is_clustered:
                shared = noise[:, :, ::CLUSTER, :dim].repeat_interleave(CLUSTER, 2)
                own = torch.empty_like(shared).normal_(generator=generator)
                noise[..., :dim] = CLUSTERED**0.5 * shared + (1 - CLUSTERED) ** 0.5 * own
            noise[..., dim:] += 0.5  # so that the means of V matter
            part.copy_(noise)
        key, value = kv_cache.split(dim, dim=-1)
        slots = torch.arange(num_blocks * size, dtype=torch.int64, device=device)
        update_v_means(value, means, slots)
        if sketch is not None:
            update_sketch(key, sketch, slots)
        queries = shape.lens if shape.is_prompt else (1,) * len(blocks)
        spans = [torch.arange(n - q, n) + 1 for n, q in zip(shape.lens, queries, strict=True)]
        self.row_lens = torch.cat(spans).to(device)
        rows = len(self.row_lens)
        query = torch.empty(rows, shape.num_heads, dim, device=device)
        self.scales = (0.5, 2.0) if shape.cache_dtype else (1.0, 1.0)
        scales = [
            torch.tensor([s], device=device) if shape.cache_dtype else None for s in self.scales
        ]
        weights = PROMPT_WEIGHTS if shape.is_prompt else UNCALIBRATED_WEIGHTS
        self.layer = Layer(
            query=query.normal_(std=QUERY_SCALE, generator=generator).to(shape.dtype),
            key=key,
            value=value,
            means=means,
            block_table=block_table,
            query_start_loc=torch.tensor([0, *queries]).cumsum(0).to(device, torch.int32),
            seq_lens=torch.tensor(shape.lens, dtype=torch.int32, device=device),
            log_min_prob=torch.zeros(rows, kv_heads, device=device),
            min_mass=torch.zeros(rows, device=device),
            dense=(self.row_lens <= shape.min_kv_len).to(torch.int8),
            weights=torch.tensor(weights, device=device).repeat(shape.num_heads, 1),
            options={"sm_scale": dim**-0.5, "k_scale": scales[0], "v_scale": scales[1]},
            is_prompt=shape.is_prompt,
            machine=machine,
            max_len=max(shape.lens),
            sketch=sketch,
        )
        self._finish()

    def _finish(self) -> None:
        self.result = self.layer.result()
        everything = torch.ones_like(self.layer.dense)
        self.dense_layer = dataclasses.replace(self.layer, dense=everything)

    def part(self, first: int, count: int) -> "Batch":
        """Some rows of a decode batch as a batch of their own on the same cache."""
        part = copy.copy(self)
        part.shape = dataclasses.replace(self.shape, lens=self.shape.lens[first : first + count])
        part.layer = self.layer.part(first, count)
        part.row_lens = self.row_lens[first : first + count]
        part._finish()
        return part

    def run(self) -> Tensor:
        self.layer.attend(self.result)
        return self.result.out

    def run_dense(self) -> Tensor:
        self.dense_layer.attend(self.result)
        return self.result.out

    def row(self, cache: Tensor, seq: int) -> Tensor:
        """[length, num_kv_heads, head_dim] of one row, as stored."""
        length = self.shape.lens[seq]
        blocks = self.layer.block_table[seq, : math.ceil(length / self.shape.block_size)].long()
        # As integers: not every torch gathers float8.
        bits = cache.view({1: torch.uint8, 2: torch.int16}[cache.itemsize])[blocks]
        return bits.transpose(1, 2).flatten(0, 1)[:length].view(cache.dtype)

    def checked_rows(self) -> list[tuple[int, Tensor]]:
        """Sequences and rows of them that are compared with float64, the first and the last among
        them: all of a prompt would not fit."""
        starts = self.layer.query_start_loc.tolist()
        return [
            (seq, torch.linspace(starts[seq], starts[seq + 1] - 1, 8).long().unique())
            for seq in sorted({0, len(self.shape.lens) - 1})
        ]

    def expected(self, seq: int, rows: Tensor, *, dense: bool) -> tuple[Tensor, Tensor]:
        """Output, float64, and num_kept of the specification; of dense attention where asked."""
        shape, layer = self.shape, self.layer
        query, key = layer.query[rows].double(), self.row(layer.key, seq).double() * self.scales[0]
        row_lens, sm_scale = self.row_lens[rows], shape.head_dim**-0.5
        if layer.sketch is None or dense or layer.dense[rows].any():
            scores = reference.attention_scores(query, key, row_lens, sm_scale=sm_scale)
        else:
            blocks = layer.block_table[seq, : math.ceil(len(key) / shape.block_size)].long()
            own = Sketch(*(part[blocks] for part in layer.sketch))
            # Tokens before heads.
            parts = parts_of(own).permute(0, 2, 3, 1, 4).flatten(0, 2)
            scores = sketched_scores(
                query,
                key,
                parts[: len(key)],
                own.bounds.transpose(1, 2).flatten(0, 1)[: len(key) // GPU_GROUP],
                row_lens,
                group_size=GPU_GROUP,
                sm_scale=sm_scale,
            )
        threshold = layer.log_min_prob[rows].double().T
        threshold = threshold.masked_fill(layer.dense[rows].bool() | dense, -1e30)
        group_size = group_size_of(shape.block_size)
        if shape.is_prompt:
            chosen = reference.select_running(scores, threshold, group_size=group_size, tile=V_TILE)
        else:
            floor = layer.min_mass[rows].double() * (not dense)
            chosen = reference.select(scores, threshold, floor, group_size=group_size)
        value = self.row(layer.value, seq).double() * self.scales[1]
        out = reference.compensated_output(
            chosen, value, layer.weights.double(), group_size=group_size
        )
        return out, chosen.kept.sum(-1).T

    def verify(self) -> tuple[float, bool]:
        """Largest error of the last run over its budget, and whether counts are right but for keys
        within rounding of a threshold, which cases.py keeps away."""
        worst, counts = 0.0, True
        for seq, rows in self.checked_rows():
            out, kept = self.expected(seq, rows, dense=False)
            worst = max(worst, error_of_budget(self.result.out[rows], out))
            counts &= bool(((self.result.num_kept[rows] - kept).abs() <= 2).all())
        return worst, counts

    def dense_error(self, out: Tensor) -> float:
        """Largest error over its budget of what a dense kernel returned, as result.out."""
        return max(
            error_of_budget(out[rows], self.expected(seq, rows, dense=True)[0])
            for seq, rows in self.checked_rows()
        )

    def fractions(self) -> dict[str, float]:
        """Of the last run: the share of (key, kv head) pairs that rows kept, and of the probability
        that these hold."""
        keys = float(self.row_lens.sum()) * self.shape.num_kv_heads
        return {
            "kept": float(self.result.num_kept.sum()) / keys,
            "kept mass": float(self.result.kept_mass.mean()),
        }
