"""The sketch of K, in PyTorch: what the native kernels must write and read.

Of every complete group of tokens a page may hold, beside K, a copy of 8 bits: K minus the group's
mean, rotated by a Hadamard matrix so that no dimension stands out, and divided by a scale per
token. Pruned rows scan it in K's place, which is half of the bytes, wherever the error that its
bounds allow for a row is small; other groups of the row, groups that the row sees in part, and
dense rows are scored with K itself.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_toptheta.kernels.layout import PageLayout
from vllm_toptheta.kernels.reference import attention_scores, whole_groups

SKETCH_ERROR = 0.2
"""Standard deviation, in units of scores, that the error of a group's scores may have by its
bounds; above it the group is scored with K. Mirrors kSketchError of src/sketch.h."""

_MAX_CODE = 127


class Sketch(NamedTuple):
    """Groups of keys in 8 bits.

    Attributes:
        codes: [..., group_size, head_dim] integers from -127 to 127.
        scales: [..., group_size], bfloat16 numbers.
        centre: [..., head_dim] mean key, in the cache dtype.
        bounds: [..., 2] float32: largest norm of a key's error, and of what its codes stand for.
    """

    codes: Tensor
    scales: Tensor
    centre: Tensor
    bounds: Tensor


def hadamard(head_dim: int) -> Tensor:
    """[head_dim, head_dim] float64, orthogonal and symmetric: blocks of the largest power of two
    that divides head_dim."""
    size = head_dim & -head_dim
    block = torch.ones(1, 1, dtype=torch.float64)
    while len(block) < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    blocks = [block / math.sqrt(size)] * (head_dim // size)
    whole: Tensor = torch.block_diag(*blocks)
    return whole


def sketch_of(keys: Tensor) -> Sketch:
    """Quantise groups of keys.

    Args:
        keys: [..., group_size, head_dim] in the cache dtype.
    """
    exact = keys.double()
    centre = exact.mean(-2).to(keys.dtype)
    rotated = (exact - centre.double()[..., None, :]) @ hadamard(keys.shape[-1])
    largest = (rotated.abs().amax(-1) / 127).clamp(min=1e-30).float()
    bits = (largest.view(torch.int32) + 0xFFFF) >> 16  # up, so that no code exceeds 127
    scales = (bits << 16).view(torch.float32).bfloat16()
    wide = scales.double()[..., None]
    codes = (rotated / wide).round()
    error = (rotated - codes * wide).norm(dim=-1).amax(-1)
    length = (codes * wide).norm(dim=-1).amax(-1)
    bounds = torch.stack([error, length], -1) * 1.00001  # whatever becomes float32 rounds
    return Sketch(codes, scales, centre, bounds.float())


def parts_of(sketch: Sketch) -> Tensor:
    """The centre of every key, and behind it what its codes add: [..., group_size, 2 * head_dim]
    float64. The sum of both halves is the key that the sketch stands for."""
    steps = sketch.codes.double() * sketch.scales.double()[..., None]
    centre = sketch.centre.double()[..., None, :].expand(steps.shape)
    return torch.cat([centre, steps @ hadamard(steps.shape[-1]).to(steps)], -1)


def page_views(kv_cache: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where a cache's sketches are: views of it.

    Args:
        kv_cache: pages of a layout with a sketch.

    Returns:
        Codes plus 128 [num_blocks, num_kv_heads, block_size / 16, head_dim / 4, 16, 4] uint8,
        scales [num_blocks, num_kv_heads, block_size] bfloat16, centres [num_blocks, num_kv_heads,
        groups, head_dim] in the cache dtype, bounds [num_blocks, num_kv_heads, groups, 2] float32.
    """
    size, dim, groups = layout.block_size, layout.head_dim, layout.num_groups
    start = (2 * size + groups) * dim * kv_cache.itemsize
    codes = layout.part(kv_cache, torch.uint8, start, size // 16, dim // 4, 16, 4)
    start += size * dim
    scales = layout.part(kv_cache, torch.bfloat16, start, size)
    start += 2 * size
    centres = layout.part(kv_cache, kv_cache.dtype, start, groups, dim)
    start += groups * dim * kv_cache.itemsize
    return codes, scales, centres, layout.part(kv_cache, torch.float32, start, groups, 2)


def write_groups(kv_cache: Tensor, layout: PageLayout, block: Tensor, group: Tensor) -> None:
    """Store the sketch of groups whose keys are complete.

    Args:
        kv_cache: pages of a layout with a sketch.
        block, group: [n] int64, a group's block and its place there.
    """
    keys = layout.keys(kv_cache[block]).unflatten(2, (layout.num_groups, -1))
    sketch = sketch_of(keys[torch.arange(len(block)), :, group])
    codes, scales, centres, bounds = page_views(kv_cache, layout)
    tiles = (sketch.codes + 128).to(torch.uint8).unflatten(-2, (-1, 16)).unflatten(-1, (-1, 4))
    per_group = layout.group_size // 16
    for i in range(per_group):
        codes[block, :, group * per_group + i] = tiles[:, :, i].transpose(2, 3)
    for i in range(layout.group_size):
        scales[block, :, group * layout.group_size + i] = sketch.scales[..., i]
    centres[block, :, group] = sketch.centre
    bounds[block, :, group] = sketch.bounds


def read_groups(kv_cache: Tensor, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """`parts_of` all sketches of a cache, and their bounds.

    Returns:
        [num_blocks, num_kv_heads, block_size, 2 * head_dim] float64 and [num_blocks, num_kv_heads,
        groups, 2]; valid for complete groups.
    """
    codes, scales, centres, bounds = page_views(kv_cache, layout)
    flat = codes.transpose(3, 4).flatten(4).flatten(2, 3).double() - 128
    by_group = (layout.num_groups, layout.group_size)
    sketch = Sketch(flat.unflatten(2, by_group), scales.unflatten(2, by_group), centres, bounds)
    return parts_of(sketch).flatten(2, 3), bounds


GPU_GROUP = 64
"""Tokens of a group on a GPU, where smaller ones have no sketch."""


def _gpu_parts(
    num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """What a page holds of codes, centres, scales and bounds."""
    groups = (num_kv_heads, block_size // GPU_GROUP)
    return [
        (torch.int8, (*groups, GPU_GROUP, head_dim)),
        (dtype, (*groups, head_dim)),
        (torch.float32, (*groups, 1)),
        (torch.float32, (*groups, 2)),
    ]


def gpu_bytes(num_kv_heads: int, block_size: int, head_dim: int) -> int:
    """Bytes of a page's sketch on a GPU, of a 16-bit cache."""
    parts = _gpu_parts(num_kv_heads, block_size, head_dim, torch.bfloat16)
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts)


def gpu_views(
    pages: Tensor, start: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
) -> Sketch:
    """The sketch in pages of a GPU: heads, then groups, codes by token.

    Args:
        pages: [num_blocks, page bytes] uint8, the first stride is free.
        start: bytes of a page before its sketch, a multiple of 16.
        dtype: of the cache.

    Returns:
        Views, [num_blocks, num_kv_heads, groups] groups: codes int8, scales [..., 1] float32, one
        for all keys of a group: what is read for each key by itself waits for memory.
    """
    found = []
    for kind, shape in _gpu_parts(num_kv_heads, block_size, head_dim, dtype):
        end = start + kind.itemsize * math.prod(shape)
        found.append(pages[:, start:end].view(kind).unflatten(1, shape))
        start = end
    codes, centre, scales, bounds = found
    return Sketch(codes, scales, centre, bounds)


def sketched_scores(
    query: Tensor,
    key: Tensor,
    parts: Tensor,
    bounds: Tensor,
    row_lens: Tensor,
    *,
    group_size: int,
    sm_scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """`reference.attention_scores` where pruned rows scan the sketch.

    Args:
        parts: [num_keys, num_kv_heads, 2 * head_dim] of sketches; key 0 is the first of a group,
            and what lies in groups that no row sees as a whole is not read.
        bounds: [groups, num_kv_heads, 2] of the sketches.
        group_size: tokens per group.

    Returns:
        [num_heads, num_rows, num_keys], units of q.k * sm_scale.
    """

    def scores(query: Tensor, key: Tensor) -> Tensor:
        return attention_scores(
            query, key, row_lens, sm_scale=sm_scale, window=window, soft_cap=soft_cap
        )

    exact = scores(query, key)
    rotation = hadamard(query.shape[-1]).to(query)
    rotated = query @ rotation
    step = (rotated.abs().amax(-1, keepdim=True) / _MAX_CODE).clamp(min=1e-30)
    # What the codes miss, and what is lost where the query becomes 8-bit integers.
    root = math.sqrt(query.shape[-1])
    norms = torch.cat([query.norm(dim=-1, keepdim=True), step / 2 * root], -1) * sm_scale
    num_kv_heads = key.shape[1]
    by_kv_head = norms.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
    worst = (by_kv_head @ bounds.to(query).permute(1, 2, 0)[:, None]).amax(1)
    whole = whole_groups((exact > -math.inf)[0], group_size)
    some = min(len(bounds), whole.shape[-1])
    trusted = (worst[..., :some] <= SKETCH_ERROR * root) & whole[:, :some]
    use = trusted.repeat_interleave(group_size, -1)[..., : exact.shape[-1]]
    use = torch.nn.functional.pad(use, (0, exact.shape[-1] - use.shape[-1]))
    use = use.repeat_interleave(query.shape[1] // num_kv_heads, 0)
    # The query meets the centre as it is, and the codes in 8 bits.
    rounded = (rotated / step).round() * step @ rotation
    near = scores(torch.cat([query, rounded], -1), parts.to(query))
    return torch.where(use, near, exact)
