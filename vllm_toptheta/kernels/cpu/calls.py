"""Arguments of the attention calls as the targets receive them: validated, by name."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vllm_toptheta.kernels.layout import PageLayout

Target = Literal["native", "eager"]

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""ToptDtype of src/args.h."""

BLOCK_OUT_OF_RANGE = "a block table entry or slot lies outside the KV cache"
BAD_LENGTHS = (
    "query_start_loc must rise from 0 to the number of query tokens, by at most seq_lens tokens a "
    "sequence"
)


@dataclass(slots=True)
class AttentionCall:
    """What a decode and a prefill call share; shapes and meanings stand in decode.py and ops.py."""

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


@dataclass(slots=True)
class DecodeCall(AttentionCall):
    """One layer's decode rows, for `eager.decode_attention`."""

    min_mass: Tensor
    weights: Tensor
    lifts: Tensor


@dataclass(slots=True)
class PrefillCall(AttentionCall):
    """Arguments of `ops.prefill_attention`."""

    query_start_loc: Tensor
    v_tiles_read: Tensor
