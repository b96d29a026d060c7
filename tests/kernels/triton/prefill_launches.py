"""What a layer of pruned prompts launches on a GPU, recorded."""

import torch
from compile_shapes import NUM_KV_HEADS, Shape, pages
from launches import Recorder, recorded

from vllm_toptheta.kernels.triton import prefill
from vllm_toptheta.kernels.triton.config import choose_prefill_config

KERNELS = [(prefill, "_prefill_kernel")]


def launches(shape: Shape) -> list[Recorder]:
    """A prefill step of two rows."""
    num_heads, cache_dtype = NUM_KV_HEADS * shape.heads, shape.cache_dtype or shape.dtype
    key, value, v_means, _ = pages(shape)
    query = torch.empty(2, num_heads, shape.head_dim, dtype=shape.dtype)
    scale = torch.ones(1) if shape.cache_dtype else None
    with recorded(*KERNELS) as recorders:
        prefill.prefill_attention(
            query,
            key,
            value,
            v_means,
            torch.empty(2, 32, dtype=torch.int32),
            torch.empty(3, dtype=torch.int32),
            torch.empty(2, dtype=torch.int32),
            torch.empty(2, NUM_KV_HEADS),
            sm_scale=0.1,
            dense=torch.empty(2, dtype=torch.int8),
            out=torch.empty_like(query),
            num_kept=torch.empty(2, NUM_KV_HEADS, dtype=torch.int32),
            v_tiles_read=torch.empty(2, NUM_KV_HEADS, dtype=torch.int32),
            kept_mass=torch.empty(2, num_heads),
            config=choose_prefill_config(
                head_dim=shape.head_dim,
                cache_bytes=cache_dtype.itemsize,
                # AMD's own float8.
                warp_size=64 if cache_dtype == torch.float8_e4m3fnuz else 32,
            ),
            window=shape.window,
            soft_cap=shape.soft_cap,
            sinks=torch.empty(num_heads) if shape.sinks else None,
            k_scale=scale,
            v_scale=scale,
        )
    return recorders
