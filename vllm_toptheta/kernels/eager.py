"""The specification as a target: reference.py in float32 over the paged cache, one row at a time.

Slow and exact in what it keeps; for machines without the native library. Arguments arrive validated
from ops.py.
"""

import math
from typing import Any

import torch
from torch import Tensor

from vllm_toptheta.kernels import reference, sketch
from vllm_toptheta.kernels.cpu.calls import BLOCK_OUT_OF_RANGE, AttentionCall, DecodeCall
from vllm_toptheta.kernels.layout import LONG_GROUP, PROMPT_WEIGHTS, PageLayout


def update_side_data(kv_cache: Tensor, layout: PageLayout, slot_mapping: Tensor) -> None:
    """`ops.update_side_data` in PyTorch."""
    block_size, group_size = layout.block_size, layout.group_size
    last = slot_mapping[(slot_mapping >= 0) & ((slot_mapping + 1) % group_size == 0)]
    if last.numel() == 0:
        return
    if int(last.max()) >= kv_cache.shape[0] * block_size:
        raise ValueError(BLOCK_OUT_OF_RANGE)
    block, group = last // block_size, last % block_size // group_size
    groups = layout.values(kv_cache[block]).unflatten(2, (-1, group_size))
    means = groups[torch.arange(len(last)), :, group].float().mean(-2)
    # Two indices around a slice: what is assigned is [num_groups, num_kv_heads, head_dim].
    layout.v_means(kv_cache)[block, :, group] = means.to(kv_cache.dtype)
    if layout.sketch is not None:
        sketch.write_groups(kv_cache, layout, block, group)


def decode_attention(call: DecodeCall) -> None:
    """`decode.DecodeLayer.attend` in PyTorch."""
    group_size = call.layout.group_size
    for seq, end in enumerate(call.seq_lens.tolist()):
        if end <= 0:
            call.out[seq].zero_()
            call.num_kept[seq].zero_()
            call.kept_mass[seq] = 1
            call.lifts[seq].zero_()
            continue
        key, value, origin = visible_keys(call, seq, end, end)
        dense = bool(call.dense[seq])
        query, row_lens = call.query[seq : seq + 1].float(), torch.tensor([end - origin])
        options: dict[str, Any] = {
            "sm_scale": call.sm_scale,
            "window": call.window,
            "soft_cap": call.soft_cap,
        }
        if call.layout.sketch is not None and not dense:
            parts, bounds = sketches(call, seq, origin, end)
            scores = sketch.sketched_scores(
                query, key, parts, bounds, row_lens, group_size=group_size, **options
            )
        else:
            scores = reference.attention_scores(query, key, row_lens, **options)
        threshold, floor, weights = (
            call.log_min_prob[seq, :, None],
            call.min_mass[seq],
            call.weights,
        )
        if dense:
            threshold, floor = torch.full_like(threshold, -math.inf), torch.zeros(())
            weights = torch.tensor(PROMPT_WEIGHTS).expand_as(weights)
        chosen = reference.select(scores, threshold, floor, group_size=group_size, sinks=call.sinks)
        out = reference.compensated_output(chosen, value, weights, group_size=group_size)
        call.out[seq] = out[0].to(call.out.dtype)
        call.num_kept[seq] = chosen.kept[:, 0].sum(-1).int()
        call.kept_mass[seq] = 1 if dense else chosen.kept_mass[:, 0]
        call.lifts[seq] = chosen.lifts[:, 0].int()


def visible_keys(
    call: AttentionCall, seq: int, first_end: int, end: int
) -> tuple[Tensor, Tensor, int]:
    """K and V that the rows of a sequence see.

    Only visible slots are touched: the others may hold anything, NaN included.

    Args:
        call: the call.
        seq: row of the block table.
        first_end: keys that the first of the rows sees, without a window.
        end: keys that the last one sees.

    Returns:
        K and V, both [num_keys, num_kv_heads, head_dim] float32, and the position of the first one,
        which is that of a long group. What lies before the window is zero.

    Raises:
        ValueError: the block table names a block that does not exist.
    """
    size = call.layout.block_size
    begin = max(first_end - call.window, 0) if call.window else 0
    origin, first = begin // LONG_GROUP * LONG_GROUP, begin // size
    blocks = call.block_table[seq, first : -(-end // size)].long()
    if end > call.block_table.shape[1] * size or not (
        0 <= int(blocks.min()) <= int(blocks.max()) < call.kv_cache.shape[0]
    ):
        raise ValueError(BLOCK_OUT_OF_RANGE)
    pages = call.kv_cache[blocks]
    visible = slice(begin - first * size, end - first * size)

    def rows(x: Tensor) -> Tensor:
        seen = x.transpose(1, 2).flatten(0, 1)[visible].float()
        return torch.nn.functional.pad(seen, (0, 0, 0, 0, begin - origin, 0))

    return rows(call.layout.keys(pages)), rows(call.layout.values(pages)), origin


def sketches(call: AttentionCall, seq: int, origin: int, end: int) -> tuple[Tensor, Tensor]:
    """`sketch.parts_of` the keys of a sequence [end - origin, num_kv_heads, 2 * head_dim] and
    the bounds [groups, num_kv_heads, 2] of its groups, from position `origin` on; zeros in
    groups that are not complete or lie before the row's first block."""
    size, group_size = call.layout.block_size, call.layout.group_size
    begin = max(end - call.window, 0) if call.window else 0
    first = begin // size
    blocks = call.block_table[seq, first : -(-end // size)].long()
    parts, bounds = sketch.read_groups(call.kv_cache[blocks], call.layout)
    keys, of_groups = parts.transpose(1, 2).flatten(0, 1), bounds.transpose(1, 2).flatten(0, 1)
    complete = end // group_size * group_size - first * size
    # Slots of other groups may hold anything.
    keys[complete:], of_groups[complete // group_size :] = 0, 0
    skip = origin - first * size
    if skip < 0:
        keys = torch.nn.functional.pad(keys, (0, 0, 0, 0, -skip, 0))
        of_groups = torch.nn.functional.pad(of_groups, (0, 0, 0, 0, -skip // group_size, 0))
        skip = 0
    return keys[skip : skip + end - origin], of_groups[skip // group_size :]
