"""Arguments of the attention calls as the targets receive them: validated, by name."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_toptheta.kernels.layout import PageLayout

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""ToptDtype of src/args.h."""

BLOCK_OUT_OF_RANGE = "a block table entry or slot lies outside the KV cache"
BAD_LENGTHS = (
    "query_start_loc must rise from 0 to the number of query tokens, by at most seq_lens tokens a "
    "sequence"
)


@dataclass(slots=True)
class AttentionCall:
    """What a decode and a prefill call share; shapes and meanings stand in ops.py."""

    query: Tensor
    kv_cache: Tensor
    layout: PageLayout
    block_table: Tensor
    seq_lens: Tensor
    log_min_prob: Tensor
    sm_scale: float
    dense: Tensor
    window: int | None
    soft_cap: float | None
    sinks: Tensor | None
    out: Tensor
    num_kept: Tensor
    kept_mass: Tensor

    def native_fields(self) -> dict[str, Any]:
        """Fields that the structures of both calls have, all but the instruction set."""
        num_blocks, num_kv_heads, _, _ = self.kv_cache.shape
        block_stride, head_stride, _, _ = self.kv_cache.stride()
        return {
            "query": self.query.data_ptr(),
            "kv_cache": self.kv_cache.data_ptr(),
            "block_table": self.block_table.data_ptr(),
            "seq_lens": self.seq_lens.data_ptr(),
            "log_min_prob": self.log_min_prob.data_ptr(),
            "dense": self.dense.data_ptr(),
            "sinks": None if self.sinks is None else self.sinks.data_ptr(),
            "out": self.out.data_ptr(),
            "num_kept": self.num_kept.data_ptr(),
            "kept_mass": self.kept_mass.data_ptr(),
            "query_stride": self.query.stride(0),
            "out_stride": self.out.stride(0),
            "block_stride": block_stride,
            "head_stride": head_stride,
            "block_table_stride": self.block_table.stride(0),
            "log_min_prob_stride": self.log_min_prob.stride(0),
            "num_blocks": num_blocks,
            "max_blocks": self.block_table.shape[1],
            "num_seqs": self.seq_lens.shape[0],
            "num_heads": self.query.shape[1],
            "num_kv_heads": num_kv_heads,
            "head_dim": self.layout.head_dim,
            "block_size": self.layout.block_size,
            "group_size": self.layout.group_size,
            "amx": self.layout.packing == "amx",
            "window": self.window or 0,
            "dtype": DTYPES[self.kv_cache.dtype],
            "sm_scale": self.sm_scale,
            "soft_cap": self.soft_cap or 0.0,
        }


@dataclass(slots=True)
class DecodeCall(AttentionCall):
    """Arguments of `ops.decode_attention`."""

    min_mass: Tensor
    weights: Tensor
    lifts: Tensor


@dataclass(slots=True)
class PrefillCall(AttentionCall):
    """Arguments of `ops.prefill_attention`."""

    query_start_loc: Tensor
    v_tiles_read: Tensor
