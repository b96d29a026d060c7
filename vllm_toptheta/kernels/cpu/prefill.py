"""The targets of `ops.prefill_attention`: the C++ prompt kernel over ctypes, and the specification
in float32. Arguments arrive validated from kernels/ops.py.
"""

import ctypes
import math

import torch

from vllm_toptheta.kernels import eager, reference
from vllm_toptheta.kernels.cpu.calls import BAD_LENGTHS, DTYPES, PrefillCall
from vllm_toptheta.kernels.cpu.native import Isa, check_status, native_library, use_avx512
from vllm_toptheta.kernels.layout import PROMPT_WEIGHTS, V_TILE

KEY_TILE = 128
"""Keys of a tile of `reference.select_running` (src/prefill_tiles_avx2.h: kKeyTile)."""

_CHUNK_ELEMENTS = 1 << 20
"""Scores that the eager target holds at once."""


class _PrefillArgs(ctypes.Structure):
    """Mirror of ToptPrefillArgs in src/prefill_args.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "kv_cache", "block_table")),
        *((name, ctypes.c_void_p) for name in ("query_start_loc", "seq_lens", "log_min_prob")),
        *((name, ctypes.c_void_p) for name in ("dense", "sinks", "out", "num_kept")),
        *((name, ctypes.c_void_p) for name in ("v_tiles_read", "kept_mass")),
        *((name, ctypes.c_int64) for name in ("query_stride", "out_stride", "block_stride")),
        *((name, ctypes.c_int64) for name in ("head_stride", "block_table_stride")),
        *((name, ctypes.c_int64) for name in ("log_min_prob_stride", "num_blocks")),
        *((name, ctypes.c_int32) for name in ("max_blocks", "num_tokens", "num_seqs")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim")),
        *((name, ctypes.c_int32) for name in ("block_size", "group_size", "amx", "window")),
        *((name, ctypes.c_int32) for name in ("dtype", "num_threads", "avx512")),
        *((name, ctypes.c_float) for name in ("sm_scale", "soft_cap")),
    )


def prefill_native(
    call: PrefillCall, *, num_threads: int | None = None, isa: Isa | None = None
) -> None:
    """`ops.prefill_attention` in C++.

    Args:
        call: what to compute.
        num_threads: None for as many as torch uses.
        isa: None for the best one here.
    """
    num_blocks, num_kv_heads, _, _ = call.kv_cache.shape
    block_stride, head_stride, _, _ = call.kv_cache.stride()
    args = _PrefillArgs(
        query=call.query.data_ptr(),
        kv_cache=call.kv_cache.data_ptr(),
        block_table=call.block_table.data_ptr(),
        query_start_loc=call.query_start_loc.data_ptr(),
        seq_lens=call.seq_lens.data_ptr(),
        log_min_prob=call.log_min_prob.data_ptr(),
        dense=call.dense.data_ptr(),
        sinks=None if call.sinks is None else call.sinks.data_ptr(),
        out=call.out.data_ptr(),
        num_kept=call.num_kept.data_ptr(),
        v_tiles_read=call.v_tiles_read.data_ptr(),
        kept_mass=call.kept_mass.data_ptr(),
        query_stride=call.query.stride(0),
        out_stride=call.out.stride(0),
        block_stride=block_stride,
        head_stride=head_stride,
        block_table_stride=call.block_table.stride(0),
        log_min_prob_stride=call.log_min_prob.stride(0),
        num_blocks=num_blocks,
        max_blocks=call.block_table.shape[1],
        num_tokens=call.query.shape[0],
        num_seqs=call.seq_lens.shape[0],
        num_heads=call.query.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=call.layout.head_dim,
        block_size=call.layout.block_size,
        group_size=call.layout.group_size,
        amx=call.layout.packing == "amx",
        window=call.window or 0,
        dtype=DTYPES[call.kv_cache.dtype],
        num_threads=num_threads or 0,
        avx512=use_avx512(isa),
        sm_scale=call.sm_scale,
        soft_cap=call.soft_cap or 0.0,
    )
    check_status(native_library().topt_prefill(ctypes.byref(args)))


def prefill_eager(call: PrefillCall) -> None:
    """`ops.prefill_attention` in PyTorch, some rows of one sequence at a time."""
    starts, lens = call.query_start_loc.tolist(), call.seq_lens.tolist()
    spans = list(zip(starts[:-1], starts[1:], lens, strict=True))
    if starts[0] != 0 or starts[-1] != len(call.query):
        raise ValueError(BAD_LENGTHS)
    if any(not 0 <= stop - start <= length for start, stop, length in spans):
        raise ValueError(BAD_LENGTHS)
    group_size = call.layout.group_size
    limits = call.log_min_prob.masked_fill(call.dense[:, None], -math.inf)
    for seq, (start, stop, length) in enumerate(spans):
        if start == stop:
            continue
        key, value, origin = eager.visible_keys(call, seq, length - (stop - start) + 1, length)
        if origin:  # not the first tile of the sequence: an empty one takes its place
            pad = (0, 0, 0, 0, KEY_TILE, 0)
            key, value = (torch.nn.functional.pad(x, pad) for x in (key, value))
            origin -= KEY_TILE
        weights = torch.tensor(PROMPT_WEIGHTS).expand(call.query.shape[1], -1)
        step = max(_CHUNK_ELEMENTS // (call.query.shape[1] * len(key)), 1)
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            scores = reference.attention_scores(
                call.query[rows].float(),
                key,
                torch.arange(rows.start, rows.stop) + 1 + length - stop - origin,
                sm_scale=call.sm_scale,
                window=call.window,
                soft_cap=call.soft_cap,
            )
            chosen = reference.select_running(
                scores, limits[rows].T, group_size=group_size, tile=KEY_TILE, sinks=call.sinks
            )
            # Rows may keep nothing.
            some = chosen._replace(kept_mass=chosen.kept_mass.clamp(min=1e-30))
            out = reference.compensated_output(some, value, weights, group_size=group_size)
            call.out[rows] = out.to(call.out.dtype)
            call.num_kept[rows] = chosen.kept.sum(-1).T.int()
            call.kept_mass[rows] = chosen.kept_mass.T.float()
            tiles = torch.nn.functional.pad(chosen.kept, (0, -len(key) % V_TILE))
            call.v_tiles_read[rows] = tiles.unflatten(-1, (-1, V_TILE)).any(-1).sum(-1).T.int()
