"""What the GPU attention kernels ask of their arguments."""

from collections.abc import Iterable

import torch
from torch import Tensor

from vllm_toptheta.kernels.layout import group_size_of

MAX_HEADS_PER_KV_HEAD = 16
MIN_HEAD_DIM, MAX_HEAD_DIM = 32, 256
NO_WINDOW = 2**31 - 1
"""What kernels take for a window of all keys."""

_QUERY_DTYPES = (torch.bfloat16, torch.float16)
_FP8_DTYPES = tuple(
    getattr(torch, name) for name in ("float8_e4m3fn", "float8_e4m3fnuz") if hasattr(torch, name)
)


def check_supported(head_dim: int, num_heads: int, num_kv_heads: int, block_size: int) -> None:
    """Raise ValueError, naming what is wrong, unless the kernels can run these shapes."""
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim % 16:
        raise ValueError(
            f"head_dim must be a multiple of 16 from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got "
            f"{head_dim}"
        )
    if num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_HEADS_PER_KV_HEAD:
        raise ValueError(
            f"num_heads must be 1 to {MAX_HEADS_PER_KV_HEAD} times num_kv_heads, got "
            f"{num_heads} and {num_kv_heads}"
        )
    group_size_of(block_size)


def check_tensors(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    v_means: Tensor,
    block_table: Tensor,
    num_seqs: int,
    out: Tensor,
) -> None:
    """Raise ValueError unless queries, cache, means and output fit together.

    Args:
        query: [num_rows, num_heads, head_dim].
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, head_dim].
        v_means: [num_blocks, num_kv_heads, block_size // group_size, head_dim].
        block_table: [num_seqs, max_blocks].
        num_seqs: sequences of the batch.
        out: as query.
    """
    _, num_heads, head_dim = query.shape
    num_blocks, num_kv_heads, block_size, _ = key_cache.shape
    check_supported(head_dim, num_heads, num_kv_heads, block_size)
    if query.dtype not in _QUERY_DTYPES:
        raise ValueError(f"query must be one of {_QUERY_DTYPES}, got {query.dtype}")
    if key_cache.dtype not in (query.dtype, *_FP8_DTYPES):
        raise ValueError(
            f"the cache must be {query.dtype} like the query, or float8, got {key_cache.dtype}"
        )
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    for name, tensor in (("key_cache", key_cache), ("value_cache", value_cache)):
        if tensor.shape != shape or tensor.stride(3) != 1 or tensor.dtype != key_cache.dtype:
            raise ValueError(
                f"{name} must be {list(shape)} with a contiguous last dimension, got "
                f"{list(tensor.shape)}"
            )
    if key_cache.stride() != value_cache.stride():
        raise ValueError("key_cache and value_cache must have the same strides")
    check_means(v_means, value_cache, query.dtype)
    if block_table.dtype != torch.int32 or block_table.shape[0] != num_seqs:
        raise ValueError(
            f"block_table must be [{num_seqs}, max_blocks] int32, got {list(block_table.shape)} "
            f"{block_table.dtype}"
        )
    for name, row in (("query", query), ("out", out)):
        if row.shape != query.shape or row.stride()[1:] != (head_dim, 1):
            raise ValueError(
                f"{name} must be {list(query.shape)}, contiguous but for the first stride, "
                f"got {list(row.shape)} with strides {row.stride()}"
            )


def check_means(v_means: Tensor, value_cache: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless the means belong to the cache and are of this dtype."""
    num_blocks, num_kv_heads, block_size, head_dim = value_cache.shape
    groups = block_size // group_size_of(block_size)
    shape = (num_blocks, num_kv_heads, groups, head_dim)
    if v_means.shape != shape or v_means.stride(3) != 1 or v_means.dtype != dtype:
        raise ValueError(
            f"v_means must be {list(shape)} {dtype} with a contiguous last dimension, got "
            f"{list(v_means.shape)} {v_means.dtype}"
        )


def check_slots(slot_mapping: Tensor) -> None:
    """Raise ValueError unless the slots are [num_tokens] int64."""
    if slot_mapping.dtype != torch.int64 or slot_mapping.dim() != 1:
        raise ValueError(
            f"slot_mapping must be [num_tokens] int64, got {list(slot_mapping.shape)} "
            f"{slot_mapping.dtype}"
        )


def check_contiguous(
    wanted: Iterable[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]],
) -> None:
    """Raise ValueError unless each tensor that is given is contiguous, of its shape and dtype."""
    for name, tensor, shape, dtype in wanted:
        if tensor is not None and (
            tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be contiguous {list(shape)} {dtype}, got {list(tensor.shape)} "
                f"{tensor.dtype}"
            )


def check_log_min_prob(log_min_prob: Tensor, num_rows: int, num_kv_heads: int) -> None:
    """Raise ValueError unless thresholds are [num_rows, num_kv_heads] float32, contiguous but for
    the first stride."""
    shape = (num_rows, num_kv_heads)
    fits = log_min_prob.shape == shape and log_min_prob.stride(1) == 1
    if not fits or log_min_prob.dtype != torch.float32:
        raise ValueError(
            f"log_min_prob must be {list(shape)} torch.float32, contiguous but for the first "
            f"stride, got {list(log_min_prob.shape)} {log_min_prob.dtype} with strides "
            f"{log_min_prob.stride()}"
        )


def check_scales(k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """Raise ValueError unless both scales are given, or neither."""
    if (k_scale is None) != (v_scale is None):
        raise ValueError("give k_scale and v_scale together")
