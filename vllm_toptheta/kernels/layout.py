"""What a page of the KV cache holds and how it is divided: the one place for every size that
kernels, cache specs and tests share. A leaf: it imports nothing of the package.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

V_TILE = 64
"""Keys of one V tile: what a pruned prompt reads or skips as a whole."""

LONG_GROUP = 256
"""Tokens of a long compensation group; its mean is the mean of the short groups in it."""

NUM_WEIGHTS = 5
"""Weights of the compensation, per query head: kept sum, kept sum divided by its mass, means of
short groups, means of long groups, mean of the whole row."""

UNCALIBRATED_WEIGHTS = (0.8, 0.2, 0.8, 0.0, 0.0)
UNCALIBRATED_MIN_MASS = 0.5
"""What rows of a model run with that nobody calibrated."""

RENORMALISE = (0.0, 1.0, 0.0, 0.0, 0.0)
"""Weights without compensation: the kept keys share the lost mass."""

PROMPT_WEIGHTS = (1.0, 0.0, 1.0, 0.0, 0.0)
"""Weights of pruned prompt rows: one pass knows a row's kept mass too late for the others."""

MAX_LIFTS = 12
"""How often a row's threshold may halve until `min_mass` is kept."""

MAX_BLOCK_SIZE = 512
CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Packing = Literal["vec", "amx"]
"""How K and V lie in a page; what vLLM's CPU kernels call the isa. "vec" (also its vec16): K
transposed, [head_dim][block_size], V [block_size][head_dim]. "amx": K [block_size / 16][head_dim /
2][16 tokens][2], V [head_dim / 16][block_size / 2][16 dims][2 tokens], bfloat16 only."""


def group_size_of(block_size: int) -> int:
    """Tokens of a short compensation group: 64, or what of 32 and 16 divides the block."""
    for size in (64, 32, 16):
        if block_size % size == 0:
            return size
    raise ValueError(f"block_size must be a multiple of 16, got {block_size}")


@dataclass(frozen=True)
class PageLayout:
    """What one (block, kv head) pair holds on a CPU: K, V, the mean V of token groups, and where it
    is wanted the sketch of K (sketch.py).

    Attributes:
        block_size: tokens per block, a multiple of 16 up to 512.
        head_dim: a multiple of 16.
        packing: how K and V lie.
        sketch: the cache dtype where pages hold a sketch of K; None where they do not.
    """

    block_size: int
    head_dim: int
    packing: Packing = "vec"
    sketch: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.block_size % 16 or not 16 <= self.block_size <= MAX_BLOCK_SIZE:
            raise ValueError(
                f"block_size must be a multiple of 16 up to {MAX_BLOCK_SIZE}, got {self.block_size}"
            )
        if self.head_dim <= 0 or self.head_dim % 16:
            raise ValueError(f"head_dim must be a multiple of 16, got {self.head_dim}")
        if self.packing == "amx" and (self.block_size % 32 or self.head_dim % 32):
            raise ValueError(
                "pages in AMX tiles need a block_size and a head_dim that are multiples of 32, got "
                f"{self.block_size} and {self.head_dim}"
            )

    @property
    def group_size(self) -> int:
        """Tokens per short compensation group."""
        return group_size_of(self.block_size)

    @property
    def num_groups(self) -> int:
        """Short compensation groups of a page."""
        return self.block_size // self.group_size

    @property
    def content_elements(self) -> int:
        """Elements of the cache dtype that a page holds per token slot."""
        size, dim, groups = self.block_size, self.head_dim, self.num_groups
        elements = (2 * size + groups) * dim
        if self.sketch is not None:
            # Codes and scales, then centres and bounds of groups.
            sketch = size * (dim + 2) + groups * (dim * self.sketch.itemsize + 8)
            elements += -(-sketch // self.sketch.itemsize)
        return -(-elements // size)

    def check(self, kv_cache: Tensor) -> None:
        """Raise ValueError unless `kv_cache` is [num_blocks, num_kv_heads, block_size,
        content_elements] on the CPU, its last two dimensions contiguous."""
        content = self.content_elements
        shape, strides = kv_cache.shape, kv_cache.stride()
        if len(shape) != 4 or shape[2:] != (self.block_size, content):
            raise ValueError(
                "kv_cache must be [num_blocks, num_kv_heads, "
                f"{self.block_size}, {content}] for {self}, got {list(shape)}"
            )
        if strides[2:] != (content, 1):
            raise ValueError(
                f"the last two dimensions of kv_cache must be contiguous, got strides {strides}"
            )
        allowed = (torch.bfloat16,) if self.packing == "amx" else CACHE_DTYPES
        if kv_cache.dtype not in allowed:
            raise ValueError(f"kv_cache must be one of {allowed}, got {kv_cache.dtype}")
        if self.sketch not in (None, kv_cache.dtype):
            raise ValueError(f"kv_cache must be {self.sketch} for {self}, got {kv_cache.dtype}")
        if not kv_cache.is_cpu:
            raise ValueError(f"kv_cache must be on the CPU, got {kv_cache.device}")

    def part(self, kv_cache: Tensor, dtype: torch.dtype, start: int, *sizes: int) -> Tensor:
        """A contiguous part of every page, as a view.

        Args:
            kv_cache: pages of this layout.
            dtype: of the part.
            start: bytes from the start of a page.
            sizes: the part's shape.

        Returns:
            [num_blocks, num_kv_heads, *sizes].
        """
        self.check(kv_cache)
        raw = kv_cache.view(torch.uint8)
        strides = [dtype.itemsize]
        for size in reversed(sizes[1:]):
            strides.insert(0, strides[0] * size)
        as_bytes = raw.as_strided(
            (*raw.shape[:2], *sizes, dtype.itemsize),
            (*raw.stride()[:2], *strides, 1),
            raw.storage_offset() + start,
        )
        return as_bytes.view(dtype).squeeze(-1)

    def _part(self, kv_cache: Tensor, offset: int, *sizes: int) -> Tensor:
        """`part` in the cache dtype, `offset` elements from the start of a page."""
        return self.part(kv_cache, kv_cache.dtype, offset * kv_cache.itemsize, *sizes)

    def keys(self, kv_cache: Tensor) -> Tensor:
        """K as [num_blocks, num_kv_heads, block_size, head_dim]; a view where the packing is
        "vec", else a copy."""
        size, dim = self.block_size, self.head_dim
        if self.packing == "vec":
            return self._part(kv_cache, 0, dim, size).transpose(2, 3)
        tiles = self._part(kv_cache, 0, size // 16, dim // 2, 16, 2).transpose(3, 4)
        return tiles.reshape(*kv_cache.shape[:2], size, dim)

    def values(self, kv_cache: Tensor) -> Tensor:
        """V as [num_blocks, num_kv_heads, block_size, head_dim]; a view where the packing is
        "vec", else a copy."""
        size, dim = self.block_size, self.head_dim
        if self.packing == "vec":
            return self._part(kv_cache, size * dim, size, dim)
        tiles = self._part(kv_cache, size * dim, dim // 16, size // 2, 16, 2)
        return tiles.permute(0, 1, 3, 5, 2, 4).reshape(*kv_cache.shape[:2], size, dim)

    def write(self, kv_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store K and V of tokens, as vLLM's own writer does.

        Args:
            kv_cache: pages.
            slots: [num_tokens] int64.
            key, value: [num_tokens, num_kv_heads, head_dim].
        """
        size, dim = self.block_size, self.head_dim
        block, slot = slots // size, slots % size
        if self.packing == "vec":
            self.keys(kv_cache)[block, :, slot] = key
            self.values(kv_cache)[block, :, slot] = value
            return
        tiles = self._part(kv_cache, 0, size // 16, dim // 2, 16, 2)
        tiles[block, :, slot // 16, :, slot % 16] = key.unflatten(-1, (-1, 2))
        pairs = self._part(kv_cache, size * dim, dim // 16, size // 2, 16, 2)
        pairs[block, :, :, slot // 2, :, slot % 2] = value.unflatten(-1, (-1, 16))

    def v_means(self, kv_cache: Tensor) -> Tensor:
        """[num_blocks, num_kv_heads, block_size // group_size, head_dim], a view; valid for
        complete groups, row-major in every packing."""
        size, dim = self.block_size, self.head_dim
        return self._part(kv_cache, 2 * size * dim, size // self.group_size, dim)
