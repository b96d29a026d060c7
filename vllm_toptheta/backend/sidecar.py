"""Side data that lives beside K and V inside every page of the paged cache: a cache spec in, a
larger page out.

Because it is part of the page, vLLM accounts for its memory, shares it through the prefix cache,
and moves it with the block. There are the V means of compensation groups, and the sketch of K. On
CPU it follows K and V of each kv head, where the page is an opaque run of bytes per head. On
GPU the rows of K and V are strided tensors that other kernels read too, so the page keeps them as
they are and grows at its end.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.utils.torch_utils import get_dtype_size

from vllm_toptheta.config import TopThetaConfig
from vllm_toptheta.kernels.layout import MAX_BLOCK_SIZE, PageLayout, group_size_of
from vllm_toptheta.kernels.ops import available_target
from vllm_toptheta.kernels.sketch import GPU_GROUP, Sketch, gpu_bytes, gpu_views

_USUAL_BLOCK_SIZE = 128
"""What vLLM takes on a CPU unless told otherwise."""


def sketches_keys(config: TopThetaConfig) -> bool:
    """Whether pages hold the sketch of K, which only generated tokens that are pruned scan."""
    if config.phases == "prefill":
        return False
    if config.k_sketch != "auto":
        return config.k_sketch
    # Faster wherever it was measured, which no GPU is.
    return current_platform.is_cpu() and available_target().target == "native"


def kernel_block_size(block_size: int) -> int:
    """Tokens of the blocks that the CPU kernels see: vLLM's own, or a part of one, where it
    enlarges them to the size of a Mamba state.

    Raises:
        ValueError: the block has no such part.
    """
    if block_size <= MAX_BLOCK_SIZE:
        return block_size
    parts = [size for size in range(32, MAX_BLOCK_SIZE + 1, 32) if block_size % size == 0]
    if parts:
        return max(parts, key=lambda size: (group_size_of(size), size))
    raise ValueError(
        f"toptheta: blocks of {block_size} tokens cannot be cut into parts of 32 to "
        f"{MAX_BLOCK_SIZE}; pass --block-size {_USUAL_BLOCK_SIZE}"
    )


def enlarge_page(spec: Any, *, sketch: bool = False) -> Any:
    """Make room for the side data in a layer's cache spec; does nothing the second time.

    Args:
        spec: vLLM's `AttentionSpec` of one layer, with K and V of the same width.
        sketch: of K as well.
    """
    if spec.state_content_bytes is not None:
        return spec
    if spec.head_size_v != spec.head_size:
        raise ValueError(
            f"toptheta needs K and V of one width, this model has {spec.head_size} and "
            f"{spec.head_size_v}; serve it with another --attention-backend"
        )
    # vLLM asks for the bytes of a token before it knows the block size.
    block_size = _USUAL_BLOCK_SIZE if spec.block_size == 1 else spec.block_size
    layout = PageLayout(
        kernel_block_size(block_size), spec.head_size, sketch=spec.dtype if sketch else None
    )
    return replace(spec, state_content_bytes=layout.content_elements * get_dtype_size(spec.dtype))


def check_page(spec: Any, layout: PageLayout) -> None:
    """Raise ValueError unless a CPU page still has the room that `enlarge_page` made.

    vLLM may change the block of a layer to bring layers of different kinds together, and the room
    that a token takes depends on the block.

    Args:
        spec: vLLM's `AttentionSpec` as the cache is allocated.
        layout: of its pages.
    """
    needed = layout.content_elements * get_dtype_size(spec.dtype)
    if spec.state_content_size_bytes != needed:
        raise ValueError(
            f"toptheta: tokens in pages of {spec.block_size} take {needed} bytes, vLLM planned "
            f"{spec.state_content_size_bytes}; pass --block-size {_USUAL_BLOCK_SIZE}"
        )


MEAN_BYTES = 2
"""Bytes of one element of a mean on GPU: bfloat16 or float16, also where K and V are quantised."""

_ALIGNMENT = 128


def pad_page(spec: Any, *, sketch: bool = False) -> Any:
    """Make room for V means behind K and V of a layer's page, and behind these for a sketch of K;
    does nothing the second time.

    vLLM brings the pages of all layers of a model to one size. Where the largest page is a multiple
    of a smaller one it enlarges the smaller one's block instead of padding it, which padded pages
    forbid. The tail added here keeps pages of different layers from being multiples of each other,
    so that vLLM always pads.

    Args:
        spec: vLLM's `AttentionSpec` of one layer, with K and V of the same width.

    Raises:
        ValueError: the page cannot hold the side data.
    """
    if spec.block_size == 1:  # vLLM asks for the bytes of a token before it knows the block size
        return spec
    check_plain(spec)
    used = _used_bytes(spec, sketch)
    size = -(-used // _ALIGNMENT) * _ALIGNMENT + _ALIGNMENT
    if spec.page_size_padded is not None and spec.page_size_padded >= size:
        return spec
    return replace(spec, page_size_padded=size)


def check_plain(spec: Any) -> None:
    """Raise ValueError unless a GPU page holds K and V as they are and of one width."""
    if spec.head_size_v != spec.head_size or spec.state_content_bytes is not None:
        raise ValueError(
            "toptheta needs plain K and V of one width in its pages; serve this model, or "
            "this --kv-cache-dtype, with "
            "another --attention-backend"
        )


def _used_bytes(spec: Any, sketch: bool) -> int:
    """Bytes of a page that K, V and their side data take."""
    groups = spec.block_size // group_size_of(spec.block_size)
    means = spec.num_kv_heads * groups * spec.head_size * MEAN_BYTES
    of_sketch = gpu_bytes(spec.num_kv_heads, spec.block_size, spec.head_size) if sketch else 0
    return int(spec.unpadded_page_size_bytes) + means + of_sketch


def check_room(spec: Any, *, sketch: bool = False) -> None:
    """Raise ValueError unless pages still have the room that `pad_page` made.

    vLLM changes the block of a layer to bring layers of different kinds together, and where pages
    of several layers lie between a page and the layer's next one, the cache itself does not tell.

    Args:
        spec: vLLM's `AttentionSpec` as the cache is allocated.
        sketch: whether pages have a sketch of K.
    """
    if sketch and (spec.block_size % GPU_GROUP or get_dtype_size(spec.dtype) != 2):
        raise ValueError(
            "toptheta: option 'k_sketch' = true needs blocks of a multiple of 64 tokens and a "
            f"16-bit cache, got blocks of {spec.block_size} and {spec.dtype}; set it to false, or "
            "pass --block-size 64"
        )
    used = _used_bytes(spec, sketch)
    if spec.page_size_bytes < used:
        raise ValueError(
            f"toptheta: pages of {spec.block_size} tokens have {spec.page_size_bytes} bytes, with "
            f"V means{' and a sketch of K' * sketch} they need {used}. Keep toptheta "
            "for one kind of layer: "
            """--attention-config '{"backend_per_kind": {"full_attention": "toptheta"}}'"""
        )


def v_means_view(kv_cache: Tensor, dtype: torch.dtype) -> Tensor:
    """The V means behind K and V of every page.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_dim] of a spec from `pad_page`.
        dtype: of the means, two bytes wide.

    Returns:
        [num_blocks, num_kv_heads, block_size // group_size, head_dim], a view of the same memory.

    Raises:
        RuntimeError: the pages have no room, or K and V of a page are not one run of bytes.
    """
    sizes = _means_of(kv_cache)
    means = _behind(kv_cache, math.prod(sizes) * dtype.itemsize, dtype.itemsize)
    return means.view(dtype).unflatten(1, sizes)


def sketch_view(kv_cache: Tensor) -> Sketch:
    """The sketch of K behind the V means of every page, as `v_means_view`; see `gpu_views`."""
    _, num_kv_heads, block_size, width = kv_cache.shape
    sizes = (num_kv_heads, block_size, width // 2)
    start = math.prod(_means_of(kv_cache)) * MEAN_BYTES
    tail = _behind(kv_cache, start + gpu_bytes(*sizes), 4)
    return gpu_views(tail, start, *sizes, kv_cache.dtype)


def _means_of(kv_cache: Tensor) -> tuple[int, int, int]:
    """kv heads, groups and width of a page's V means."""
    _, num_kv_heads, block_size, width = kv_cache.shape
    return num_kv_heads, block_size // group_size_of(block_size), width // 2


def _behind(kv_cache: Tensor, size: int, alignment: int) -> Tensor:
    """[num_blocks, size] uint8: the bytes of every page behind its K and V."""
    num_blocks, num_kv_heads, block_size, width = kv_cache.shape
    item = kv_cache.element_size()
    real = num_kv_heads * block_size * width * item
    heads, slots = kv_cache.stride(1), kv_cache.stride(2)
    extent = ((num_kv_heads - 1) * heads + (block_size - 1) * slots + width) * item
    page = kv_cache.stride(0) * item
    start = kv_cache.storage_offset() * item + real
    if extent != real or page < real + size:
        raise RuntimeError(
            f"toptheta: the KV cache {list(kv_cache.shape)} with strides "
            f"{kv_cache.stride()} has no room for V means. Unset VLLM_KV_CACHE_LAYOUT, or "
            "keep toptheta for one kind of layer: "
            """--attention-config '{"backend_per_kind": {"full_attention": "toptheta"}}'"""
        )
    if page % alignment or start % alignment:
        raise RuntimeError(
            f"toptheta: pages of {page} bytes, their tails at {start}, do not align what takes "
            f"{alignment} bytes an element"
        )
    return torch.empty(0, dtype=torch.uint8, device=kv_cache.device).set_(
        kv_cache.untyped_storage(), start, (num_blocks, size), (page, 1)
    )


def no_means(query: Tensor, value_cache: Tensor) -> Tensor:
    """What kernels take for V means where all weights of means are 0, so that they read none.

    Args:
        query: [num_tokens, num_heads, head_dim], at least one token.
        value_cache: [num_blocks, num_kv_heads, block_size, head_dim].

    Returns:
        In the shape of `v_means_view`, without memory of its own.
    """
    num_blocks, num_kv_heads, block_size, head_dim = value_cache.shape
    groups = block_size // group_size_of(block_size)
    return query[0, 0].expand(num_blocks, num_kv_heads, groups, head_dim)
