"""What vLLM's FlashAttention computes, in float64, for machines without its library."""

from typing import Any

import torch
from torch import Tensor


def flash_attn_varlen_func(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: Tensor,
    fa_version: int,
    window_size: list[int] | None = None,
    softcap: float = 0,
    s_aux: Tensor | None = None,
    num_splits: int = 0,
    scheduler_metadata: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """vLLM's function of the name, over paged K and V [num_blocks, block_size, num_kv_heads,
    head_dim]; a ValueError where the library would refuse, or read something else.
    """
    unknown = {
        name for name, value in others.items() if value is not None and "descale" not in name
    }
    if unknown or not causal or fa_version not in (3, 4) or scheduler_metadata is not None:
        raise ValueError(f"not what a prompt of ours asks for: {unknown or vars()}")
    for cache in (k, v):
        sizes = [cache.data_ptr(), *(stride * cache.itemsize for stride in cache.stride()[:-1])]
        if any(size % 16 for size in sizes) or cache.stride(-1) != 1 or cache.dtype != q.dtype:
            raise ValueError(
                f"the library does not read {cache.dtype} with strides {cache.stride()}"
            )
    queries = cu_seqlens_q.diff()
    if queries.max() > max_seqlen_q or seqused_k.max() > max_seqlen_k or cu_seqlens_q[-1] != len(q):
        raise ValueError("lengths that the library would not look at")
    size, heads = k.shape[1], q.shape[1] // k.shape[2]
    left = -1 if window_size is None else window_size[0]
    for seq, (start, count, length) in enumerate(
        zip(cu_seqlens_q.tolist(), queries.tolist(), seqused_k.tolist(), strict=False)
    ):
        table = block_table[seq, : -(-length // size)].long()
        key, value = (
            cache[table].flatten(0, 1)[:length].double().repeat_interleave(heads, 1)
            for cache in (k, v)
        )
        rows = slice(start, start + count)
        scores = torch.einsum("qhd,khd->hqk", q[rows].double(), key) * softmax_scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        behind = torch.arange(length - count, length)[:, None] - torch.arange(length)
        hidden = (behind < 0) | ((behind > left) if left >= 0 else False)
        scores = scores.masked_fill(hidden, -torch.inf)
        if s_aux is not None:
            sink = s_aux.double()[:, None, None].expand(-1, count, 1)
            scores = torch.cat([scores, sink], -1)
        shares = scores.softmax(-1)[..., :length]
        out[rows] = torch.einsum("hqk,khd->qhd", shares, value).to(out.dtype)
    return out
