"""One layer's attention over one document, as calibration and evaluation look at it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_toptheta.kernels.layout import LONG_GROUP
from vllm_toptheta.kernels.reference import attention_scores, softmax, weighted_values

_CHUNK_ELEMENTS = 1 << 19
"""Scores in flight: few enough for the cache, which makes the chunked reference about twice as
fast.
"""


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention over one document, causal. The rows are its last tokens: all of them,
    or those that follow what a cache holds.

    Attributes:
        layer: index of the layer.
        query: [num_rows, num_heads, head_dim].
        key: [num_keys, num_kv_heads, head_dim].
        value: [num_keys, num_kv_heads, head_dim].
        sm_scale: factor on q.k.
        window: keys a row sees at most; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for none.
        sinks: [num_heads] extra logit in the denominator; None for none.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    sm_scale: float
    window: int | None
    soft_cap: float | None
    sinks: Tensor | None

    @property
    def num_rows(self) -> int:
        return self.query.shape[0]

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    @property
    def first_row(self) -> int:
        """Position of the first row."""
        return self.key.shape[0] - self.query.shape[0]

    def scores(self, rows: Tensor, first_key: int = 0) -> Tensor:
        """Scores of some rows against keys first_key to the last one that any of them sees.

        Args:
            rows: [n] integer positions, ascending.
            first_key: the first key to score.

        Returns:
            [num_heads, n, num_keys], -inf where hidden.
        """
        end = int(rows[-1]) + 1
        return attention_scores(
            self.query[rows - self.first_row],
            self.key[first_key:end],
            rows + 1 - first_key,
            sm_scale=self.sm_scale,
            window=self.window,
            soft_cap=self.soft_cap,
        )


def dense_attention(call: AttentionCall) -> Tensor:
    """The layer's own attention, by PyTorch's fused kernel where that can express it."""
    if call.window is None and call.soft_cap is None and call.sinks is None:
        mask = None
        if call.first_row:
            keys = torch.arange(call.key.shape[0], device=call.key.device)
            mask = keys <= keys[call.first_row :, None]
        return torch.nn.functional.scaled_dot_product_attention(
            call.query.transpose(0, 1)[None],
            call.key.transpose(0, 1)[None],
            call.value.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=call.sm_scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    output = torch.empty_like(call.query)
    positions = torch.arange(call.first_row, call.key.shape[0], device=output.device)
    for rows, first_key in row_chunks(call, positions):
        probs = softmax(call.scores(rows, first_key), call.sinks)
        value = call.value[first_key : int(rows[-1]) + 1]
        output[rows - call.first_row] = weighted_values(probs, value)
    return output


def row_chunks(call: AttentionCall, rows: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Cut rows into runs whose scores stay in the cache.

    Args:
        call: the layer's inputs.
        rows: [n] integer positions, ascending.

    Yields:
        Some of the rows, and the first key to score for them: the first of a long compensation
        group.
    """
    start = 0
    while start < len(rows):
        first_key = 0
        if call.window is not None:
            first_key = max(0, int(rows[start]) + 1 - call.window) // LONG_GROUP * LONG_GROUP
        reach = min(len(rows), start + 256)
        longest = int(rows[reach - 1]) + 1 - first_key
        stop = min(reach, start + max(8, _CHUNK_ELEMENTS // (call.num_heads * longest)))
        yield rows[start:stop], first_key
        start = stop
