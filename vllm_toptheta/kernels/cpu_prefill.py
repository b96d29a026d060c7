"""CPU implementations of prefill attention: the paged cache and a step's query tokens in, attention
outputs and counts out.

Arguments arrive validated from api.py.
"""

import ctypes
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_toptheta.kernels.cpu import STATUS, AttentionCall, check_status, native_library

V_TILE = 64
"""Keys in a tile of the V statistics (native/prefill_tile.h: kVTile)."""

_CHUNK_ELEMENTS = 1 << 22
"""Scores that the PyTorch implementation holds at once."""


class _PrefillArgs(ctypes.Structure):
    """Mirror of ToptPrefillArgs in native/kernel_args.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "kv_cache", "block_table")),
        *((name, ctypes.c_void_p) for name in ("query_start_loc", "seq_lens", "theta", "dense")),
        *((name, ctypes.c_void_p) for name in ("sinks", "out", "num_kept", "v_tiles_read")),
        *((name, ctypes.c_int64) for name in ("query_stride", "out_stride", "block_stride")),
        *((name, ctypes.c_int64) for name in ("head_stride", "block_table_stride")),
        *((name, ctypes.c_int64) for name in ("theta_stride", "num_blocks")),
        *((name, ctypes.c_int32) for name in ("max_blocks", "num_tokens", "num_seqs")),
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_dim")),
        *((name, ctypes.c_int32) for name in ("block_size", "group_size", "compensation")),
        *((name, ctypes.c_int32) for name in ("window", "dtype", "num_threads", "avx512")),
        *((name, ctypes.c_float) for name in ("sm_scale", "soft_cap")),
    )


@dataclass(slots=True)
class PrefillCall(AttentionCall):
    """Arguments of `api.prefill_attention`."""

    query_start_loc: Tensor
    v_tiles_read: Tensor


def prefill_attention_native(call: PrefillCall, num_threads: int | None) -> None:
    """`api.prefill_attention` in C++; num_threads None for as many as torch uses."""
    args = _PrefillArgs(
        query_start_loc=call.query_start_loc.data_ptr(),
        v_tiles_read=call.v_tiles_read.data_ptr(),
        num_tokens=call.query.shape[0],
        num_threads=num_threads or 0,
        **call.native_fields(),
    )
    check_status(native_library().topt_prefill(ctypes.byref(args)))


def prefill_attention_torch(call: PrefillCall) -> None:
    """`api.prefill_attention` in PyTorch, in float32, some rows of one sequence at a time.

    It spreads a group's lost mass over the V rows themselves, so it does not read the stored means.
    """
    query, kv_cache, layout, window = call.query, call.kv_cache, call.layout, call.window
    starts, lens = call.query_start_loc.tolist(), call.seq_lens.tolist()
    spans = list(zip(starts[:-1], starts[1:], lens, strict=True))
    if starts[0] != 0 or starts[-1] != len(query) or any(not 0 <= e - s <= n for s, e, n in spans):
        raise ValueError(STATUS["bad_lengths"])
    num_kv_heads, block_size = kv_cache.shape[1], layout.block_size
    views = layout.views(kv_cache)
    for seq, (start, stop, length) in enumerate(spans):
        if start == stop:
            continue
        row_lens = torch.arange(length - (stop - start), length) + 1
        begin = max(int(row_lens[0]) - window, 0) if window else 0
        first = begin // block_size
        blocks = call.block_table[seq, first : -(-length // block_size)].long()
        if length > call.block_table.shape[1] * block_size or not (
            0 <= int(blocks.min()) <= int(blocks.max()) < kv_cache.shape[0]
        ):
            raise ValueError(STATUS["block_out_of_range"])
        # Whole V tiles, and so whole compensation groups, from the first one that is seen.
        origin = begin // V_TILE * V_TILE if layout.group_size <= V_TILE else begin // 128 * 128
        visible = slice(begin - first * block_size, length - first * block_size)
        pad = (begin - origin, 0)
        key = views.key_cache[blocks].permute(1, 2, 0, 3).flatten(2)[..., visible].float()
        value = views.value_cache[blocks].transpose(0, 1).flatten(1, 2)[:, visible].float()
        key = torch.nn.functional.pad(key, pad)
        value = torch.nn.functional.pad(value, (0, 0, *pad))
        step = max(_CHUNK_ELEMENTS // (query.shape[1] * key.shape[-1]), 1)
        for at in range(start, stop, step):
            rows = slice(at, min(at + step, stop))
            sees = row_lens[rows.start - start : rows.stop - start, None]
            position = origin + torch.arange(key.shape[-1])
            hidden = (position < begin) | (position >= sees)
            if window:
                hidden |= position < sees - window
            grouped = query[rows].float().unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
            scores = (grouped @ key[:, None]) * call.sm_scale
            if call.soft_cap:
                scores = call.soft_cap * torch.tanh(scores / call.soft_cap)
            scores = scores.masked_fill_(hidden, -math.inf)
            limit = call.theta[rows].masked_fill(call.dense[rows, None], -math.inf)
            limit = limit.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0)
            group_size = layout.group_size if call.compensation else None
            weights, kept = _weights(scores, limit, call.sinks, group_size)
            result = (weights @ value[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
            call.out[rows] = result.to(call.out.dtype)
            call.num_kept[rows] = kept.sum(-1).permute(2, 0, 1).flatten(1).int()
            tiles = torch.nn.functional.pad(kept.any(1), (0, -kept.shape[-1] % V_TILE))
            read = tiles.unflatten(-1, (-1, V_TILE)).any(-1).sum(-1)
            call.v_tiles_read[rows] = read.transpose(0, 1).int()


def _weights(
    scores: Tensor, theta: Tensor, sinks: Tensor | None, group_size: int | None
) -> tuple[Tensor, Tensor]:
    """Weights on V rows and the kept mask.

    Args:
        scores: [num_kv_heads, group, num_rows, num_keys], -inf where hidden; keys start at a
            compensation group.
        theta: [num_kv_heads, group, num_rows]; -inf keeps every visible key.
        sinks: [num_heads] or None.
        group_size: tokens per compensation group; None drops the lost mass.

    Returns:
        Weights and kept mask, both of the shape of the scores.
    """
    if sinks is None:
        probs = torch.softmax(scores, dim=-1)
    else:
        column = sinks.view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
        probs = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    kept = (scores >= theta[..., None]).scatter_(-1, scores.argmax(-1, keepdim=True), True)
    seen = scores > -math.inf
    kept &= seen
    weights = probs * kept
    if group_size is None:
        return weights, kept
    pad = (0, -scores.shape[-1] % group_size)
    lost = torch.nn.functional.pad(probs - weights, pad).unflatten(-1, (-1, group_size)).sum(-1)
    size = torch.nn.functional.pad(seen.float(), pad).unflatten(-1, (-1, group_size)).sum(-1)
    share = (lost / size.clamp(min=1)).repeat_interleave(group_size, -1)[..., : scores.shape[-1]]
    return weights + share * seen, kept
