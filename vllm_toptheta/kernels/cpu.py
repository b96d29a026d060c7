"""CPU implementations: the paged cache and a step's queries in, attention outputs and counts out.

`native` runs the C++ library over ctypes; `torch` is the same mathematics in plain PyTorch for
machines without it. Arguments arrive validated from api.py.
"""

import ctypes
import functools
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_toptheta.kernels.build_native import LIBRARY_NAME

if TYPE_CHECKING:
    from vllm_toptheta.kernels.api import PageLayout

_ABI_VERSION = 3
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
STATUS = {
    "unsupported_dtype": "unsupported dtype",
    "block_out_of_range": "a block table entry or slot lies outside the KV cache",
    "out_of_memory": "out of memory",
    "bad_lengths": (
        "query_start_loc must rise from 0 to the number of query tokens, by at most seq_lens "
        "tokens a sequence"
    ),
}
"""What the statuses of native/kernel_args.h mean, from 1 on."""

_CALLER_ERRORS = ("block_out_of_range", "bad_lengths")


class _DecodeArgs(ctypes.Structure):
    """Mirror of ToptDecodeArgs in native/kernel_args.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "kv_cache", "block_table", "seq_lens")),
        *((name, ctypes.c_void_p) for name in ("theta", "dense", "sinks")),
        *((name, ctypes.c_void_p) for name in ("out", "num_kept", "v_rows_read")),
        *((name, ctypes.c_int64) for name in ("query_stride", "out_stride", "block_stride")),
        *((name, ctypes.c_int64) for name in ("head_stride", "block_table_stride")),
        *((name, ctypes.c_int64) for name in ("theta_stride", "num_blocks")),
        *((name, ctypes.c_int32) for name in ("max_blocks", "num_seqs", "num_heads")),
        *((name, ctypes.c_int32) for name in ("num_kv_heads", "head_dim", "block_size")),
        *((name, ctypes.c_int32) for name in ("group_size", "compensation", "window")),
        *((name, ctypes.c_int32) for name in ("dtype", "num_splits", "num_threads", "avx512")),
        *((name, ctypes.c_float) for name in ("sm_scale", "soft_cap")),
    )


class _MeansArgs(ctypes.Structure):
    """Mirror of ToptMeansArgs in native/kernel_args.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("kv_cache", "slot_mapping")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_blocks")),
        *((name, ctypes.c_int64) for name in ("block_stride", "head_stride")),
        *((name, ctypes.c_int32) for name in ("num_kv_heads", "head_dim", "block_size")),
        *((name, ctypes.c_int32) for name in ("group_size", "dtype")),
    )


@dataclass(frozen=True)
class NativeLibrary:
    """The loaded library, or the reason why there is none.

    Attributes:
        library: the ctypes handle; None when unavailable.
        reason: why it is unavailable; None when it is loaded.
    """

    library: ctypes.CDLL | None
    reason: str | None


@functools.cache
def load_native() -> NativeLibrary:
    """Load the native library once per process.

    torch is imported before this runs, so that the library binds to torch's OpenMP runtime and
    shares its threads.
    """
    path = Path(__file__).resolve().parent / LIBRARY_NAME
    if not path.exists():
        if platform.machine() not in ("x86_64", "AMD64"):
            return NativeLibrary(None, f"native kernels need x86-64, not {platform.machine()}")
        hint = "build it with: python -m vllm_toptheta.kernels.build_native"
        return NativeLibrary(None, f"{path} does not exist; {hint}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return NativeLibrary(None, f"{path} cannot be loaded: {error}")
    library.topt_abi_version.restype = ctypes.c_int32
    library.topt_cpu_supported.restype = ctypes.c_int32
    library.topt_avx512_supported.restype = ctypes.c_int32
    for function in (library.topt_decode, library.topt_prefill, library.topt_update_v_means):
        function.restype = ctypes.c_int32
        function.argtypes = [ctypes.c_void_p]
    found = library.topt_abi_version()
    if found != _ABI_VERSION:
        hint = "rebuild it with: python -m vllm_toptheta.kernels.build_native"
        return NativeLibrary(None, f"{path} has ABI {found}, expected {_ABI_VERSION}; {hint}")
    if not library.topt_cpu_supported():
        return NativeLibrary(None, "this CPU lacks AVX2, FMA or F16C, which native kernels need")
    return NativeLibrary(library, None)


def native_library() -> ctypes.CDLL:
    """The library; RuntimeError says why there is none."""
    native = load_native()
    if native.library is None:
        raise RuntimeError(f'impl="native" is not available: {native.reason}')
    return native.library


@functools.cache
def has_avx512() -> bool:
    """Whether the native kernels may use AVX-512 here; elsewhere they are AVX2."""
    return bool(native_library().topt_avx512_supported())


def check_status(status: int) -> None:
    """Raise what a native function's status means; ValueError for the caller's mistakes."""
    if status == 0:
        return
    name = list(STATUS)[status - 1]
    if name in _CALLER_ERRORS:
        raise ValueError(STATUS[name])
    raise RuntimeError(f"native kernel failed: {STATUS[name]}")


def update_v_means_native(kv_cache: Tensor, layout: "PageLayout", slot_mapping: Tensor) -> None:
    """`api.update_v_means` in C++."""
    args = _MeansArgs(
        kv_cache.data_ptr(),
        slot_mapping.data_ptr(),
        slot_mapping.shape[0],
        kv_cache.shape[0],
        kv_cache.stride(0),
        kv_cache.stride(1),
        kv_cache.shape[1],
        layout.head_dim,
        layout.block_size,
        layout.group_size,
        DTYPES[kv_cache.dtype],
    )
    check_status(native_library().topt_update_v_means(ctypes.byref(args)))


@dataclass(slots=True)
class AttentionCall:
    """What a decode and a prefill call share; shapes and meanings stand in api.py."""

    query: Tensor
    kv_cache: Tensor
    layout: "PageLayout"
    block_table: Tensor
    seq_lens: Tensor
    theta: Tensor
    dense: Tensor
    out: Tensor
    num_kept: Tensor
    sm_scale: float
    compensation: bool
    window: int | None
    soft_cap: float | None
    sinks: Tensor | None

    def native_fields(self) -> dict[str, Any]:
        """Fields that the structures of both calls have."""
        _, num_heads, _ = self.query.shape
        num_blocks, num_kv_heads, _, _ = self.kv_cache.shape
        block_stride, head_stride, _, _ = self.kv_cache.stride()
        return {
            "query": self.query.data_ptr(),
            "kv_cache": self.kv_cache.data_ptr(),
            "block_table": self.block_table.data_ptr(),
            "seq_lens": self.seq_lens.data_ptr(),
            "theta": self.theta.data_ptr(),
            "dense": self.dense.data_ptr(),
            "sinks": None if self.sinks is None else self.sinks.data_ptr(),
            "out": self.out.data_ptr(),
            "num_kept": self.num_kept.data_ptr(),
            "query_stride": self.query.stride(0),
            "out_stride": self.out.stride(0),
            "block_stride": block_stride,
            "head_stride": head_stride,
            "block_table_stride": self.block_table.stride(0),
            "theta_stride": self.theta.stride(0),
            "num_blocks": num_blocks,
            "max_blocks": self.block_table.shape[1],
            "num_seqs": self.seq_lens.shape[0],
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": self.layout.head_dim,
            "block_size": self.layout.block_size,
            "group_size": self.layout.group_size,
            "compensation": self.compensation,
            "window": self.window or 0,
            "dtype": DTYPES[self.kv_cache.dtype],
            "avx512": has_avx512(),
            "sm_scale": self.sm_scale,
            "soft_cap": self.soft_cap or 0.0,
        }


@dataclass(slots=True)
class DecodeCall(AttentionCall):
    """Arguments of `api.decode_attention`."""

    v_rows_read: Tensor


def decode_attention_native(
    call: DecodeCall, num_splits: int | None, num_threads: int | None
) -> None:
    """`api.decode_attention` in C++.

    Args:
        call: what to compute.
        num_splits: parts a row is cut into; None lets the kernel choose. Outputs differ by rounding
            only.
        num_threads: None for as many as torch uses.
    """
    args = _DecodeArgs(
        v_rows_read=call.v_rows_read.data_ptr(),
        num_splits=num_splits or 0,
        num_threads=num_threads or 0,
        **call.native_fields(),
    )
    check_status(native_library().topt_decode(ctypes.byref(args)))


def update_v_means_torch(kv_cache: Tensor, layout: "PageLayout", slot_mapping: Tensor) -> None:
    """`api.update_v_means` in PyTorch."""
    block_size, group_size = layout.block_size, layout.group_size
    last = slot_mapping[(slot_mapping >= 0) & ((slot_mapping + 1) % group_size == 0)]
    if last.numel() == 0:
        return
    if int(last.max()) >= kv_cache.shape[0] * block_size:
        raise ValueError(STATUS["block_out_of_range"])
    views = layout.views(kv_cache)
    groups = views.value_cache.view(*kv_cache.shape[:2], -1, group_size, layout.head_dim)
    block, group = last // block_size, last % block_size // group_size
    # Two indices around a slice: the result is [num_groups, num_kv_heads, group_size, head_dim].
    means = groups[block, :, group].float().mean(-2)
    views.v_means[block, :, group] = means.to(kv_cache.dtype)


def decode_attention_torch(call: DecodeCall) -> None:
    """`api.decode_attention` in PyTorch, in float32, one row of the batch at a time.

    It spreads a group's lost mass over the V rows themselves, so it does not read the stored means.
    """
    layout, kv_cache, query, out = call.layout, call.kv_cache, call.query, call.out
    block_table, window = call.block_table, call.window
    num_kv_heads, block_size = kv_cache.shape[1], layout.block_size
    views = layout.views(kv_cache)
    lens = call.seq_lens.tolist()
    for seq, end in enumerate(lens):
        if end <= 0:
            out[seq].zero_()
            call.num_kept[seq].zero_()
            call.v_rows_read[seq].zero_()
            continue
        begin = max(end - window, 0) if window else 0
        first = begin // block_size
        blocks = block_table[seq, first : (end + block_size - 1) // block_size].long()
        if end > block_table.shape[1] * block_size or not (
            0 <= int(blocks.min()) <= int(blocks.max()) < kv_cache.shape[0]
        ):
            raise ValueError(STATUS["block_out_of_range"])
        visible = slice(begin - first * block_size, end - first * block_size)
        # Only visible slots are touched: the others may hold anything, NaN included.
        key = views.key_cache[blocks].permute(1, 2, 0, 3).flatten(2)[..., visible].float()
        value = views.value_cache[blocks].transpose(0, 1).flatten(1, 2)[:, visible].float()
        grouped = query[seq].float().view(num_kv_heads, -1, layout.head_dim)
        scores = (grouped @ key) * call.sm_scale
        if call.soft_cap:
            scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
        row_theta = None if call.dense[seq] else call.theta[seq].view(num_kv_heads, -1)
        weights, kept = _weights(
            scores, row_theta, call.sinks, layout.group_size, begin, call.compensation
        )
        out[seq] = (weights @ value).flatten(0, 1).to(out.dtype)
        call.num_kept[seq] = kept.sum(-1).flatten().int()
        call.v_rows_read[seq] = kept.any(1).sum(-1).int()


def _weights(
    scores: Tensor,
    theta: Tensor | None,
    sinks: Tensor | None,
    group_size: int,
    first_position: int,
    compensation: bool,
) -> tuple[Tensor, Tensor]:
    """Weights on the visible V rows and the kept mask.

    Args:
        scores: [num_kv_heads, group, num_visible].
        theta: [num_kv_heads, group]; None keeps everything.
        sinks: [num_heads] or None.
        group_size: tokens per compensation group, aligned to absolute positions.
        first_position: position of the first visible key.
        compensation: whether the lost mass is spread over its group.

    Returns:
        Weights and kept mask, both [num_kv_heads, group, num_visible].
    """
    if sinks is None:
        probs = torch.softmax(scores, dim=-1)
    else:
        logits = torch.cat([scores, sinks.view(*scores.shape[:2], 1)], dim=-1)
        probs = torch.softmax(logits, dim=-1)[..., :-1]
    if theta is None:
        return probs, torch.ones_like(scores, dtype=torch.bool)
    kept = (scores >= theta[..., None]).scatter_(-1, scores.argmax(-1, keepdim=True), True)
    weights = probs * kept
    if not compensation:
        return weights, kept
    group = (first_position + torch.arange(scores.shape[-1])) // group_size
    group -= first_position // group_size
    lost = probs.new_zeros(*scores.shape[:2], int(group[-1]) + 1)
    lost.index_add_(-1, group, probs - weights)
    return weights + (lost / torch.bincount(group))[..., group], kept
