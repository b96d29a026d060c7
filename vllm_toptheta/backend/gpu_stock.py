"""Which of vLLM's own kernels attends the rows of a GPU batch that ours do not: prompts, and
requests that verify drafts.

FlashAttention 3 or 4 where vLLM has it for the device and it can read our pages, else Triton. Both
read the cache that our backend writes, and both are given those rows as batches of their own.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

logger = init_logger("vllm.toptheta.gpu")

_TMA_ALIGNMENT = 16


def flash_builder(
    impls: list[Any],
    spec: Any,
    layer_names: list[str],
    vllm_config: VllmConfig,
    device: torch.device,
) -> FlashAttentionMetadataBuilder | None:
    """FlashAttention's metadata builder for some layers, or None where they stay on Triton.

    Args:
        impls: their implementations; each gets FlashAttention's as its `flash`.
        spec: vLLM's `AttentionSpec` of their cache.
    """
    version = flash_version(impls, spec, vllm_config.model_config.dtype)
    if isinstance(version, str):
        logger.info_once("toptheta: prompts run on vLLM's Triton attention: %s", version)
        return None
    logger.info_once(
        "toptheta: prompts run on vLLM's FlashAttention %d; on its Triton attention with "
        """--attention-config '{"flash_attn_version": 2}'""",
        version,
    )
    for impl in impls:
        impl.flash = FlashAttentionImpl(
            impl.num_heads,
            impl.head_size,
            impl.scale,
            impl.num_kv_heads,
            None,
            impl.window,
            impl.kv_cache_dtype,
            impl.soft_cap,
            impl.attn_type,
            impl.kv_sharing_target_layer_name,
            impl.sinks,
        )
    builder = FlashAttentionMetadataBuilder(spec, layer_names, vllm_config, device)
    # A fixed number of splits is for captured graphs, which never hold these rows, and takes memory
    # that nobody set aside. 0 leaves it to the kernel.
    builder.max_num_splits = 0
    return builder


def flash_version(impls: list[Any], spec: Any, dtype: torch.dtype) -> int | str:
    """FlashAttention's version for all of some layers, or why they stay on Triton.

    Args:
        impls: their implementations.
        spec: vLLM's `AttentionSpec` of their cache.
        dtype: of queries.
    """
    if not current_platform.is_cuda():
        return f"FlashAttention is used on CUDA, this is {current_platform.device_name}"
    if spec.dtype != dtype:
        # Beside float8 it wants float8 queries, which ours must not be: scores decide what is kept.
        return f"FlashAttention wants K and V in the queries' {dtype}, got {spec.dtype}"
    has_sinks = any(impl.sinks is not None for impl in impls)
    # What it does not ask for here is refused of any model that our backend serves.
    reasons = FlashAttentionBackend.validate_configuration(
        head_size=spec.head_size,
        dtype=dtype,
        kv_cache_dtype=impls[0].kv_cache_dtype,
        block_size=spec.block_size,
        use_mla=False,
        has_sink=has_sinks,
        use_sparse=False,
        use_mm_prefix=False,
        use_per_head_quant_scales=False,
        device_capability=current_platform.get_device_capability(),
        attn_type=AttentionType.DECODER,
        has_sliding_window=any(impl.window is not None for impl in impls),
    )
    if reasons:
        return f"FlashAttention: {', '.join(reasons)}"
    version = get_flash_attn_version(
        head_size=spec.head_size,
        has_sinks=has_sinks,
        requires_softcap=any(impl.soft_cap is not None for impl in impls),
        supports_fa4_hd256=True,
    )
    if version is None:
        return "vLLM has no FlashAttention library for this device"
    if version < 3:
        return f"vLLM has FlashAttention {version} here, 3 or 4 would be used"
    return why_pages_do_not_suit(spec) or version


def why_pages_do_not_suit(spec: Any) -> str | None:
    """Why FlashAttention cannot read the pages of a cache, or None where it can.

    It hands K and V to Hopper's and Blackwell's tensor memory accelerator, which wants every
    address, and every stride but the innermost, in multiples of 16 bytes. Rows of K and V, and
    the strides between slots and heads, are multiples of head_dim elements, which our backend has
    in multiples of 16. Layers and blocks lie whole pages apart, so a page is what is left to check:
    vLLM pads it to the state of a Mamba layer, whatever that takes.

    Args:
        spec: vLLM's `AttentionSpec` as the cache is allocated.
    """
    sizes = FlashAttentionBackend.get_supported_kernel_block_sizes(spec)
    if not any(
        spec.block_size % size.base == 0
        if isinstance(size, MultipleOf)
        # vLLM would cut larger blocks into pages of this size; ours have their V means at the end.
        else spec.block_size == size
        for size in sizes
    ):
        return (
            f"FlashAttention wants pages of {sizes} tokens, got {spec.block_size}; "
            f"pass --block-size {sizes[0]}"
        )
    if spec.page_size_bytes % _TMA_ALIGNMENT:
        return (
            f"FlashAttention wants pages in multiples of {_TMA_ALIGNMENT} bytes, got "
            f"{spec.page_size_bytes}"
        )
    return None
