"""The C++ library over ctypes: how it is found, and what its functions take.

Arguments arrive validated from kernels/ops.py. What only tests and benchmarks set is not there: in
how many parts a row is cut, threads, and the instruction set (fields of DecodeLayerArgs).
"""

import ctypes
import functools
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from vllm_toptheta.kernels.cpu.build import LIBRARY_NAME
from vllm_toptheta.kernels.cpu.calls import BAD_LENGTHS, BLOCK_OUT_OF_RANGE, DTYPES
from vllm_toptheta.kernels.layout import PageLayout

Isa = Literal["avx2", "avx512"]

STATUS = {
    "unsupported_dtype": "unsupported dtype",
    "block_out_of_range": BLOCK_OUT_OF_RANGE,
    "out_of_memory": "out of memory",
    "bad_lengths": BAD_LENGTHS,
}
"""What the statuses of src/args.h mean, from 1 on."""

_ABI_VERSION = 7
_CALLER_ERRORS = ("block_out_of_range", "bad_lengths")
_REBUILD = "python -m vllm_toptheta.kernels.cpu.build"


class DecodeLayerArgs(ctypes.Structure):
    """Mirror of ToptDecodeLayer in src/args.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("kv_cache", "weights", "sinks")),
        *((name, ctypes.c_int64) for name in ("query_stride", "out_stride", "block_stride")),
        *((name, ctypes.c_int64) for name in ("head_stride", "num_blocks")),
        *((name, ctypes.c_int32) for name in ("slot", "num_heads", "num_kv_heads", "head_dim")),
        *((name, ctypes.c_int32) for name in ("block_size", "group_size", "amx", "sketch")),
        *((name, ctypes.c_int32) for name in ("window", "dtype", "num_splits", "num_threads")),
        ("avx512", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("sm_scale", "soft_cap")),
    )


class DecodeRowsArgs(ctypes.Structure):
    """Mirror of ToptDecodeRows in src/args.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("block_table", "seq_lens", "log_min_prob")),
        *((name, ctypes.c_void_p) for name in ("min_mass", "dense", "num_kept", "kept_mass")),
        ("lifts", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("block_table_stride", "log_min_prob_layer_stride")),
        ("log_min_prob_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("max_blocks", "num_seqs")),
    )


class _SideDataArgs(ctypes.Structure):
    """Mirror of ToptSideDataArgs in src/args.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("kv_cache", "slot_mapping")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_blocks")),
        *((name, ctypes.c_int64) for name in ("block_stride", "head_stride")),
        *((name, ctypes.c_int32) for name in ("num_kv_heads", "head_dim", "block_size")),
        *((name, ctypes.c_int32) for name in ("group_size", "amx", "sketch", "dtype")),
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
    return load_library(Path(__file__).resolve().parent / LIBRARY_NAME)


def load_library(path: Path) -> NativeLibrary:
    """Load a build of the native library."""
    if not path.exists():
        if platform.machine() not in ("x86_64", "AMD64"):
            return NativeLibrary(None, f"native kernels need x86-64, not {platform.machine()}")
        return NativeLibrary(None, f"{path} does not exist; build it with: {_REBUILD}")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return NativeLibrary(None, f"{path} cannot be loaded: {error}")
    for name in ("topt_abi_version", "topt_cpu_supported", "topt_avx512_supported"):
        getattr(library, name).restype = ctypes.c_int32
    for function, arguments in (
        (library.topt_decode, 4),
        (library.topt_prefill, 1),
        (library.topt_update_side_data, 1),
    ):
        function.restype = ctypes.c_int32
        function.argtypes = [ctypes.c_void_p] * arguments
    found = library.topt_abi_version()
    if found != _ABI_VERSION:
        reason = f"{path} has ABI {found}, expected {_ABI_VERSION}; rebuild it with: {_REBUILD}"
        return NativeLibrary(None, reason)
    if not library.topt_cpu_supported():
        return NativeLibrary(None, "this CPU lacks AVX2, FMA or F16C, which native kernels need")
    return NativeLibrary(library, None)


def native_library() -> ctypes.CDLL:
    """The library; RuntimeError says why there is none."""
    native = load_native()
    if native.library is None:
        raise RuntimeError(f'target="native" is not available: {native.reason}')
    return native.library


def has_avx512() -> bool:
    """Whether the native kernels may use AVX-512 here; elsewhere they are AVX2."""
    return bool(native_library().topt_avx512_supported())


def use_avx512(isa: Isa | None) -> bool:
    """Whether a call runs AVX-512 code; None for the best that the CPU has."""
    if isa == "avx512" and not has_avx512():
        raise RuntimeError('isa="avx512" is not available on this CPU')
    return isa == "avx512" or (isa is None and has_avx512())


def check_status(status: int) -> None:
    """Raise what a native function's status means; ValueError for the caller's mistakes."""
    if status == 0:
        return
    name = list(STATUS)[status - 1]
    if name in _CALLER_ERRORS:
        raise ValueError(STATUS[name])
    raise RuntimeError(f"native kernel failed: {STATUS[name]}")


def update_side_data(kv_cache: Tensor, layout: PageLayout, slot_mapping: Tensor) -> None:
    """`ops.update_side_data` in C++."""
    args = _SideDataArgs(
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
        layout.packing == "amx",
        layout.sketch is not None,
        DTYPES[kv_cache.dtype],
    )
    check_status(native_library().topt_update_side_data(ctypes.byref(args)))
