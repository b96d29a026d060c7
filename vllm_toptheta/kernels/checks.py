"""Checks of tensors that kernels take by their addresses: ValueErrors that name what was given and
what is wanted.
"""

import torch
from torch import Tensor


def check_block_table(block_table: Tensor, num_seqs: int) -> None:
    if block_table.dim() != 2:
        raise ValueError(
            f"block_table must be [num_seqs, max_blocks], got {list(block_table.shape)}"
        )
    table = (num_seqs, block_table.shape[1])
    check_rows("block_table", block_table, table, torch.int32, (1,))


def check_scores(window: int | None, soft_cap: float | None) -> None:
    if window is not None and window <= 0:
        raise ValueError(f"window must be positive or None, got {window}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive or None, got {soft_cap}")


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless the tensor has this shape and dtype and is contiguous."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        raise _wrong_tensor(name, tensor, shape, dtype)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def check_rows(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    row_strides: tuple[int, ...],
) -> None:
    """Like _check, with any stride between the rows."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        raise _wrong_tensor(name, tensor, shape, dtype)
    if tensor.stride()[1:] != row_strides and not tensor.is_contiguous():
        raise ValueError(f"the rows of {name} must be contiguous, got strides {tensor.stride()}")


def check_last(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Like _check, with any stride but the last."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        raise _wrong_tensor(name, tensor, shape, dtype)
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"the rows of {name} must be contiguous, got strides {tensor.stride()}")


def not_a_multiple(num_heads: int, num_kv_heads: int) -> ValueError:
    return ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")


def _wrong_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> ValueError:
    wanted = f"{list(shape)} {dtype} on the CPU"
    return ValueError(f"{name} must be {wanted}, got {describe(tensor)}")


def describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


def unknown_target(target: str) -> ValueError:
    return ValueError(f'target must be "native" or "eager", got {target!r}')
