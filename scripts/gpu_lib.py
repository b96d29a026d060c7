"""The device, paged caches and their float64 references for the GPU scripts; needs torch and triton
only.
"""

import copy
import dataclasses
import math
import os
from collections.abc import Iterable
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
from vllm_toptheta.kernels.triton_config import (
    MAX_SPLITS,
    LaunchConfig,
    choose_config,
    choose_num_splits,
)
from vllm_toptheta.kernels.triton_decode import DecodeScratch, decode_attention
from vllm_toptheta.kernels.triton_means import update_v_means

E4M3 = torch.float8_e4m3fn

ALL_DENSE = 2**30
"""As a shape's min_kv_len: no row is pruned."""


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


def error_of_budget(out: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest error over what rounding outputs, probabilities and means to the outputs' dtype may
    cost, with a factor 2 to spare; infinite where an output is not a number.

    Args:
        expected: float64 outputs.
        floor: magnitude of what is rounded on the way, where outputs may be smaller.
    """
    error = float((out.double() - expected).abs().max())
    budget = 2 * torch.finfo(out.dtype).eps * max(float(expected.abs().max()), floor)
    return math.inf if math.isnan(error) else error / budget


@dataclass
class Shape:
    """What one batch looks like.

    Attributes:
        lens: cached keys of every row.
        heads: query heads per kv head.
        k: keys a head keeps, about.
        min_kv_len: rows that see at most so many keys run dense.
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
    min_kv_len: int = 0
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

    @property
    def means_ratio(self) -> float:
        """Bytes of the V means over bytes of V: 1 / group_size, twice that beside float8."""
        if not self.compensation:
            return 0.0
        return self.dtype.itemsize / self.stored.itemsize / self.group_size

    @property
    def rows(self) -> str:
        """How many rows of which lengths."""
        lens = dict.fromkeys(self.lens)
        return " + ".join(f"{self.lens.count(length)} x {length}" for length in lens)

    @property
    def cache_name(self) -> str:
        return str(self.stored).removeprefix("torch.")

    def describe(self) -> str:
        changed = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "lens" and value != field.default:
                changed.append(f"{field.name}={str(value).removeprefix('torch.')}")
        return f"{list(self.lens)} {' '.join(changed)}"


class Batch:
    """Tensors of a shape on a device, and the launch of the kernels on them."""

    def __init__(self, shape: Shape, machine: Machine, seed: int = 0):
        self.shape, self.machine, self.device = shape, machine, machine.device
        device = self.device
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
        self.dense = self.dense_flags()
        self.theta = self.gaussian_theta()
        self.config = choose_config(
            head_dim=dim,
            group_size=shape.group_size,
            cache_bytes=shape.stored.itemsize,
            device=machine.name,
        )
        # One scratch serves all parts, as it serves all layers.
        self.scratch = DecodeScratch.allocate(
            len(blocks) * MAX_SPLITS, shape.num_heads, kv_heads, dim, device
        )
        self._allocate_outputs()

    def _allocate_outputs(self) -> None:
        shape, num_seqs = self.shape, len(self.shape.lens)
        self.all_dense = torch.ones_like(self.dense)
        self.out = torch.empty_like(self.query)
        self.num_kept = torch.empty(
            num_seqs, shape.num_heads, dtype=torch.int32, device=self.device
        )
        self.v_rows_read = torch.empty(
            num_seqs, shape.num_kv_heads, dtype=torch.int32, device=self.device
        )

    def part(self, first: int, count: int) -> "Batch":
        """Some rows as a batch of their own on the same cache, with their own outputs."""
        part = copy.copy(self)
        lens = self.shape.lens[first : first + count]
        part.shape = dataclasses.replace(self.shape, lens=lens)
        # Copies, because kernels are specialised for the alignment of what they are given.
        for name in ("query", "block_table", "seq_lens", "row_lens", "theta", "dense"):
            setattr(part, name, getattr(self, name)[first : first + count].clone())
        part._allocate_outputs()
        return part

    def visible(self) -> Tensor:
        """Keys that each row sees."""
        return self.row_lens.clamp(max=self.shape.window or ALL_DENSE)

    def dense_flags(self) -> Tensor:
        """[num_rows] int8, rows that are too short to be pruned."""
        return (self.visible() <= self.shape.min_kv_len).to(torch.int8)

    def gaussian_theta(self) -> Tensor:
        """[num_rows, num_heads] thresholds that about k of a row's normally distributed scores
        reach.
        """
        deviation = self.query.float().norm(dim=-1) * self.sm_scale * self.scales[0]
        tail = (self.shape.k / self.visible().clamp(min=1).float()).clamp(max=0.999)
        quantile = math.sqrt(2) * torch.erfinv(1 - 2 * tail)
        return deviation * quantile[:, None]

    def splits(self) -> int:
        """The number of splits serving would choose."""
        return choose_num_splits(
            len(self.shape.lens),
            self.shape.num_kv_heads,
            self.machine.num_units,
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
        # As integers: not every torch gathers float8.
        bits = cache.view({1: torch.uint8, 2: torch.int16}[cache.itemsize])[blocks]
        return bits.transpose(1, 2).flatten(0, 1)[:length].view(cache.dtype)

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

    def place_theta_in_gaps(self, seqs: Iterable[int] | None = None, ranks: int = 64) -> None:
        """Move thresholds into gaps between scores that no rounding can bridge.

        Args:
            seqs: rows, all by default.
            ranks: the gap is among so many from rank k on.
        """
        for seq in range(len(self.shape.lens)) if seqs is None else seqs:
            if self.shape.lens[seq] == 0:
                continue
            ordered = self.scores(seq).sort(dim=-1, descending=True).values
            visible = int((ordered[0] > -math.inf).sum())
            first = min(self.shape.k, visible)
            if first == visible:
                self.theta[seq] = -1e30
                continue
            self.theta[seq] = self.theta_in_gap(ordered, first, ranks)

    def theta_in_gap(self, ordered: Tensor, first: int, ranks: int) -> Tensor:
        """[num_heads] thresholds in the widest gap between scores from rank `first` on, or above
        all of them where a shape wants the best key alone.

        Args:
            ordered: [num_heads, length] scores of a row, the highest first.
            first: keys to keep at least, fewer than are visible.
            ranks: keys to keep at most beyond these.
        """
        visible = int((ordered[0] > -math.inf).sum())
        last = min(first + ranks, visible - 1)
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
        kept = select_by_theta(scores, theta)
        weights = attention_weights(
            scores,
            kept,
            group_size=self.shape.group_size if self.shape.compensation else None,
            sinks=None if self.sinks is None else self.sinks.double(),
        )
        value = self.row(self.value_cache, seq).double() * self.scales[1]
        return kept, weighted_values(weights, value)

    def expected(self, seq: int, *, dense: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Output (float64), num_kept and v_rows_read of the specification; of dense attention where
        asked.
        """
        theta = self.theta[seq].double()[:, None]
        if dense or self.dense[seq]:
            theta = torch.full_like(theta, -math.inf)
        kept, out = self.specified(seq, self.scores(seq)[:, None], theta)
        rows = count_v_rows(kept, self.shape.num_kv_heads)[0]
        return out[0], kept.sum(-1)[:, 0], rows

    # What the benchmarks need of a batch; prompts have their own.

    def checked_seqs(self) -> list[int]:
        """Rows that a benchmark compares with float64."""
        return sorted({0, len(self.shape.lens) - 1})

    def prepare(self, k: int) -> None:
        """Thresholds for k; those of the compared rows lie in gaps."""
        self.shape.k = k
        self.theta.copy_(self.gaussian_theta())
        self.place_theta_in_gaps(self.checked_seqs(), ranks=max(4, k // 8))

    def run(self) -> Tensor:
        self.launch()
        return self.out

    def run_dense(self) -> Tensor:
        self.launch(dense=self.all_dense)
        return self.out

    def verify(self) -> tuple[float, bool]:
        """Largest error of the last run over its budget, and whether counts are right."""
        worst, counts = 0.0, True
        for seq in self.checked_seqs():
            out, kept, rows = self.expected(seq)
            worst = max(worst, error_of_budget(self.out[seq], out))
            counts &= torch.equal(self.num_kept[seq].long(), kept)
            counts &= torch.equal(self.v_rows_read[seq].long(), rows)
        return worst, counts

    def dense_error(self, out: Tensor) -> float:
        """Largest error over its budget of what a dense kernel returned, as self.out."""
        seqs = self.checked_seqs()
        return max(error_of_budget(out[seq], self.expected(seq, dense=True)[0]) for seq in seqs)

    def fractions(self) -> dict[str, float]:
        """Of the last run: keys that heads kept, and V rows that were read."""
        keys = sum(self.shape.lens)
        return {
            "kept_fraction": float(self.num_kept.sum()) / (keys * self.shape.num_heads),
            "v_row_fraction": float(self.v_rows_read.sum()) / (keys * self.shape.num_kv_heads),
        }

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
