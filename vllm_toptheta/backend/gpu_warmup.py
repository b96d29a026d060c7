"""Compiles the GPU kernels of a builder's layers, and connects the ranks that add up counts, before
requests arrive.

vLLM's own warm-up reaches most kernels, but not with `--enforce-eager`, where it has none, and not
the counters, whose dummy steps are never counted.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata


@torch.inference_mode()
def warm_up(builder: Any, layers: list[Attention]) -> None:
    """Run one step on a cache of one page.

    No kernel is compiled anew for another number of rows or tokens, so one size stands for all.

    Args:
        builder: `TopThetaGPUMetadataBuilder` of the layers.
        layers: with their weights.
    """
    # A token that is generated, and two of a prompt where that compiles something: our kernel, or
    # FlashAttention 4, which then also shows that it can read our pages.
    queries = [1, 2] if builder.prunes_prompts or builder.flash is not None else [1]
    num_tokens = sum(queries)
    common = _batch(queries, builder.device)
    metadata = builder.build(0, common)
    kv_cache = _page(builder)
    shape, dtype = builder.tensors.shape, builder.vllm_config.model_config.dtype

    def rows(num_heads: int) -> Tensor:
        size = (num_tokens, num_heads, shape.head_dim)
        return torch.zeros(size, dtype=dtype, device=builder.device)

    query, key = rows(shape.num_heads), rows(shape.num_kv_heads)
    kinds = {(layer.impl.soft_cap is None, layer.impl.sinks is None): layer for layer in layers}
    for layer in kinds.values():
        layer.impl.do_kv_cache_update(layer, key, key, kv_cache, common.slot_mapping)
        layer.impl.forward(layer, query, key, key, kv_cache, metadata, torch.empty_like(query))
    builder.counts(common, metadata, []).totals()
    builder.heads.sums.zero_()


def _batch(queries: list[int], device: torch.device) -> CommonAttentionMetadata:
    """Requests whose tokens are all in one page, and are not to be stored."""
    starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lens = torch.tensor(queries, dtype=torch.int32, device=device)
    return CommonAttentionMetadata(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lens,
        num_reqs=len(queries),
        num_actual_tokens=sum(queries),
        max_query_len=max(queries),
        max_seq_len=max(queries),
        block_table_tensor=torch.zeros(len(queries), 1, dtype=torch.int32, device=device),
        slot_mapping=torch.full((sum(queries),), -1, dtype=torch.int64, device=device),
    )


def _page(builder: Any) -> Tensor:
    """A cache of one page, [1, num_kv_heads, block_size, 2 * head_dim]."""
    spec, width = builder.kv_cache_spec, 2 * builder.tensors.shape.head_dim
    heads, page = builder.tensors.shape.num_kv_heads, spec.page_size_bytes
    raw = torch.zeros(page, dtype=torch.int8, device=builder.device).view(spec.dtype)
    strides = (page // spec.dtype.itemsize, width, heads * width, 1)
    return raw.as_strided((1, heads, spec.block_size, width), strides)
