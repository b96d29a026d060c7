"""What a layer of single-token rows launches on a GPU, recorded."""

import torch
from compile_shapes import NUM_KV_HEADS, Shape, pages
from launches import Recorder, recorded
from triton.backends.compiler import GPUTarget

from vllm_toptheta.kernels.layout import NUM_WEIGHTS
from vllm_toptheta.kernels.triton import decode, means, sketch
from vllm_toptheta.kernels.triton.config import choose_config

KERNELS = [
    *((decode, f"_{step}_kernel") for step in ("scan", "select", "floor", "gather", "merge")),
    (decode, "_centres_kernel"),
    (means, "_update_v_means_kernel"),
    (sketch, "_update_sketch_kernel"),
]


def launches(shape: Shape, target: GPUTarget) -> list[Recorder]:
    """A decode step of two rows, and the update of the means."""
    num_heads = NUM_KV_HEADS * shape.heads
    config = choose_config(head_dim=shape.head_dim, warp_size=target.warp_size)
    key, value, v_means, of_keys = pages(shape)
    query = torch.empty(2, num_heads, shape.head_dim, dtype=shape.dtype)
    scale = torch.ones(1) if shape.cache_dtype else None
    scratch = decode.DecodeScratch.allocate(
        num_rows=2,
        num_parts=8,
        max_len=2048,
        num_heads=num_heads,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=shape.head_dim,
        block_size=shape.block_size,
        device="cpu",
        sketch=shape.sketch,
    )
    with recorded(*KERNELS) as recorders:
        decode.decode_attention(
            query,
            key,
            value,
            v_means,
            torch.empty(2, 32, dtype=torch.int32),
            torch.empty(2, dtype=torch.int32),
            torch.empty(2, NUM_KV_HEADS),
            torch.empty(2),
            sm_scale=0.1,
            dense=torch.empty(2, dtype=torch.int8),
            weights=torch.empty(num_heads, NUM_WEIGHTS),
            out=torch.empty_like(query),
            num_kept=torch.empty(2, NUM_KV_HEADS, dtype=torch.int32),
            kept_mass=torch.empty(2, num_heads),
            lifts=torch.empty(2, NUM_KV_HEADS, dtype=torch.int32),
            scratch=scratch,
            num_splits=4,
            config=config,
            sketch=of_keys,
            window=shape.window,
            soft_cap=shape.soft_cap,
            sinks=torch.empty(num_heads) if shape.sinks else None,
            k_scale=scale,
            v_scale=scale,
        )
        slots = torch.zeros(1, dtype=torch.int64)
        means.update_v_means(value, v_means, slots)
        if of_keys is not None:
            sketch.update_sketch(key, of_keys, slots)
    return recorders
