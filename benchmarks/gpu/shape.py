"""What one timed batch of the GPU scripts looks like."""

from dataclasses import dataclass

import torch

CLUSTER, CLUSTERED = 16, 0.9


@dataclass(frozen=True)
class Shape:
    """What one timed batch looks like.

    Attributes:
        lens: cached keys of every row.
        heads: query heads per kv head.
        min_kv_len: rows that see at most so many keys run dense.
        is_prompt: all tokens are queries, not the last ones alone.
        is_clustered: keys come in runs of CLUSTER that share CLUSTERED of their variance, so that
            kept keys lie together as a model's do; each by itself is as random as otherwise.
        has_sketch: rows scan the sketch of K.
    """

    lens: tuple[int, ...]
    num_kv_heads: int = 8
    heads: int = 4
    head_dim: int = 128
    block_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None
    min_kv_len: int = 1024  # serving's default
    is_prompt: bool = False
    is_clustered: bool = False
    has_sketch: bool = False

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.heads

    @property
    def stored(self) -> torch.dtype:
        return self.cache_dtype or self.dtype

    @property
    def cache_bytes(self) -> int:
        """Bytes of K and V."""
        return sum(self.lens) * 2 * self.num_kv_heads * self.head_dim * self.stored.itemsize

    @property
    def bytes_needed(self) -> float:
        """Memory a timed batch takes without the contiguous copies for torch's kernels: the cache,
        the means, and float64 copies of one row for the reference.
        """
        row = max(self.lens) * self.num_kv_heads * self.head_dim * 8
        return 1.1 * self.cache_bytes + 6 * row + (1 << 30)

    @property
    def rows(self) -> str:
        """How many rows of which lengths."""
        rows = " + ".join(f"{self.lens.count(n)} x {n}" for n in dict.fromkeys(self.lens))
        rows += " clustered" if self.is_clustered else ""
        return rows + (" sketched" if self.has_sketch else "")

    @property
    def cache_name(self) -> str:
        return str(self.stored).removeprefix("torch.")

    def describe(self) -> str:
        kind = "prompts " if self.is_prompt else ""
        return f"{kind}{self.rows} gqa {self.heads} {self.cache_name}"
