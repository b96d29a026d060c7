"""Shapes that the GPU kernels are compiled for, and tensors of them that are never touched."""

from dataclasses import dataclass

import torch

from vllm_toptheta.kernels.layout import group_size_of
from vllm_toptheta.kernels.sketch import Sketch, gpu_bytes, gpu_views

NUM_KV_HEADS = 8


@dataclass(frozen=True)
class Shape:
    """One specialisation of the attention kernels."""

    head_dim: int = 128
    heads: int = 4
    block_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    sketch: bool = False

    @property
    def name(self) -> str:
        cache = str(self.cache_dtype or self.dtype).removeprefix("torch.")
        extra = ("+window" if self.window else "") + ("+cap" if self.soft_cap else "")
        extra += ("+sinks" if self.sinks else "") + ("+sketch" if self.sketch else "")
        query = str(self.dtype).removeprefix("torch.")
        return f"d{self.head_dim} h{self.heads} b{self.block_size} {query}/{cache}{extra}"


def pages(
    shape: Shape, heads: int = NUM_KV_HEADS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sketch | None]:
    """K, V, means and sketch as a server holds them, [blocks, kv heads, ...]; never touched, but
    too large for offsets of 32 bits, which the AMD backend would make use of.
    """
    dtype = shape.cache_dtype or shape.dtype
    size, dim = shape.block_size, shape.head_dim
    groups, item = size // group_size_of(size), dtype.itemsize
    kv_bytes = heads * size * 2 * dim * item
    used = kv_bytes + heads * groups * dim * 2
    page = (used + (gpu_bytes(heads, size, dim) if shape.sketch else 0)) // 128 * 128 + 256
    blocks = 2**31 // page + 1
    flat = torch.empty(blocks * page, dtype=torch.uint8)
    kv = flat.view(dtype).as_strided(
        (blocks, heads, size, 2 * dim), (page // item, 2 * dim, heads * 2 * dim, 1)
    )
    means = flat.view(shape.dtype).as_strided(
        (blocks, heads, groups, dim), (page // 2, groups * dim, dim, 1), kv_bytes // 2
    )
    raw, sketch = flat.view(blocks, page), None
    if shape.sketch:
        sketch = gpu_views(raw, used, heads, size, dim, shape.dtype)
    return *kv.split(dim, dim=-1), means, sketch
