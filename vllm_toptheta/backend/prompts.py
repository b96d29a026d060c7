"""The prompt rows of a step: vLLM's batch in, thresholds per token for the prefill kernel and
counts per request out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_toptheta.backend.counts import in_units
from vllm_toptheta.backend.dial import Dial
from vllm_toptheta.kernels.layout import V_TILE
from vllm_toptheta.requests import Resolved


@dataclass
class PromptRows:
    """The prompt tokens of one step, for all layers of one metadata builder, on either device.

    Attributes:
        block_table: [num_prompts, max_blocks] int32.
        query_start_loc: [num_prompts + 1] int32, first token of each prompt, from 0.
        seq_lens: [num_prompts] int32.
        log_min_prob: [num_layers, num_tokens, num_kv_heads] float32, natural logarithm.
        dense: [num_layers, num_tokens], rows that run without pruning; bool on a CPU, int8 on a
            GPU.
        num_kept: [num_layers, num_tokens, num_kv_heads] int32, written by the kernel.
        v_tiles_read: [num_layers, num_tokens, num_kv_heads] int32, written by the kernel.
        kept_mass: [num_layers, num_tokens, num_heads] float32, written by the kernel.
    """

    block_table: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    log_min_prob: torch.Tensor
    dense: torch.Tensor
    num_kept: torch.Tensor
    v_tiles_read: torch.Tensor
    kept_mass: torch.Tensor


@dataclass
class PromptStep(PromptRows):
    """Prompt tokens that are pruned and counted on a CPU.

    Attributes:
        visible: [num_layers, num_tokens] int64, keys a row sees.
        row_lens: [num_tokens] int64, position of each token plus one.
    """

    visible: torch.Tensor
    row_lens: torch.Tensor

    def _visible_tiles(self) -> torch.Tensor:
        """[num_layers, num_tokens] int64, V tiles with a key that a row sees."""
        begins = (self.row_lens - self.visible) // V_TILE
        return (self.row_lens + V_TILE - 1) // V_TILE - begins

    def keep_all(self) -> None:
        """Note what another kernel keeps, which does not prune and does not count."""
        self.num_kept.copy_(self.visible[..., None])
        self.v_tiles_read.copy_(self._visible_tiles()[..., None])
        self.kept_mass.fill_(1)

    def counts(self) -> dict[str, NDArray[np.int64]]:
        """Columns of every prompt in UNITS, each [num_layers, num_prompts]."""
        visible = self.visible.numpy()
        by_token = {
            "dense_prefill": self.dense.numpy(),
            "prefill_rows": np.ones_like(visible),
            "prefill_keys_scored": visible,
            "prefill_keys_kept": self.num_kept.sum(2).numpy(),
            "prefill_v_tiles": self._visible_tiles().numpy(),
            "prefill_v_tiles_read": self.v_tiles_read.sum(2).numpy(),
            "prefill_kept_mass": in_units(self.kept_mass.numpy()).sum(2, dtype=np.float64),
        }
        starts = self.query_start_loc.numpy()[:-1]
        return {
            name: np.add.reduceat(values, starts, axis=1, dtype=np.int64)
            for name, values in by_token.items()
        }


def dense_prompts(cam: Any, num_layers: int, num_heads: int, num_kv_heads: int) -> PromptRows:
    """Prompt tokens that keep every key.

    All layers share one of everything: nothing differs between them, and nobody counts.

    Args:
        cam: vLLM's `CommonAttentionMetadata` of the prompts.
        num_layers: of the builder.
        num_heads, num_kv_heads: of this rank.
    """
    tokens = cam.num_actual_tokens

    def by_layer(one: torch.Tensor) -> torch.Tensor:
        return one.expand(num_layers, *one.shape)

    return PromptRows(
        block_table=cam.block_table_tensor,
        query_start_loc=cam.query_start_loc_cpu.to(torch.int32),
        seq_lens=cam.seq_lens,
        log_min_prob=by_layer(torch.zeros(tokens, num_kv_heads)),
        dense=by_layer(torch.ones(tokens, dtype=torch.bool)),
        num_kept=by_layer(torch.empty((tokens, num_kv_heads), dtype=torch.int32)),
        v_tiles_read=by_layer(torch.empty((tokens, num_kv_heads), dtype=torch.int32)),
        kept_mass=by_layer(torch.empty(tokens, num_heads)),
    )


def plan_prompts(
    dial: Dial,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    options: Mapping[int, Resolved],
    num_heads: int,
) -> PromptStep:
    """Look up what every prompt token is to do.

    Args:
        dial: thresholds of the builder's layers.
        block_table: [num_prompts, max_blocks] int32.
        query_start_loc: [num_prompts + 1] int32 on the CPU, from 0.
        seq_lens: [num_prompts] int32.
        options: by prompt, where they are not the default ones.
        num_heads: query heads of this rank.
    """
    query_lens = query_start_loc.diff().to(torch.int64)
    # Row i of q sees n - q + i + 1 keys.
    first = seq_lens - query_lens + 1 - query_start_loc[:-1]
    tokens = int(query_start_loc[-1])
    row_lens = torch.arange(tokens) + first.repeat_interleave(query_lens)
    rows = dial.plan(row_lens, options, "prefill", query_lens)
    per_kv_head = rows.log_min_prob.shape
    return PromptStep(
        block_table=block_table,
        query_start_loc=query_start_loc.to(torch.int32),
        seq_lens=seq_lens,
        log_min_prob=rows.log_min_prob,
        dense=rows.dense,
        num_kept=torch.empty(per_kv_head, dtype=torch.int32),
        v_tiles_read=torch.empty(per_kv_head, dtype=torch.int32),
        kept_mass=torch.empty((*per_kv_head[:2], num_heads)),
        visible=rows.visible,
        row_lens=row_lens,
    )
