"""A Hugging Face model and an attention function in, the model running with that attention out.

Works for every model that takes its attention from transformers' `ALL_ATTENTION_FUNCTIONS`; there
is no code per model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from vllm_toptheta.kernels.reference import attention_scores, attention_weights, weighted_values

_NAME = "toptheta"
_CHUNK_ELEMENTS = 1 << 19
"""Scores in flight: few enough for the cache, which makes the chunked reference about twice as
fast.
"""


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention over one whole document, causal.

    Attributes:
        layer: index of the layer.
        query: [num_rows, num_heads, head_dim].
        key: [num_rows, num_kv_heads, head_dim].
        value: [num_rows, num_kv_heads, head_dim].
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
            self.query[rows],
            self.key[first_key:end],
            rows + 1 - first_key,
            sm_scale=self.sm_scale,
            window=self.window,
            soft_cap=self.soft_cap,
        )


Attention = Callable[[AttentionCall], Tensor]
"""Computes the layer's output, [num_rows, num_heads, head_dim]."""


@contextmanager
def replaced_attention(model: PreTrainedModel, attention: Attention) -> Iterator[None]:
    """Run the model with another attention inside the block.

    Raises:
        ValueError: from the model's forward: it does something an AttentionCall cannot express.
    """
    previous = model.config._attn_implementation
    AttentionInterface.register(_NAME, _adapter(attention))
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(previous or "eager")


def _adapter(attention: Attention) -> Callable[..., tuple[Tensor, None]]:
    def forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        layer = getattr(module, "layer_idx", None)
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if layer is None or not causal or attention_mask is not None or position_bias is not None:
            raise ValueError(
                f"{type(module).__name__} is not a plain causal decoder attention (layer {layer}, "
                f"causal {causal}, mask {attention_mask is not None}, bias "
                f"{position_bias is not None}); Top-theta cannot be calibrated for it"
            )
        if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
            raise ValueError(
                f"attention over a batch of {query.shape[0]} with {query.shape[2]} rows and "
                f"{key.shape[2]} keys; expected one document without a cache"
            )
        call = AttentionCall(
            layer=int(layer),
            query=query[0].transpose(0, 1),
            key=key[0].transpose(0, 1),
            value=value[0].transpose(0, 1),
            sm_scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            window=sliding_window,
            soft_cap=softcap,
            sinks=s_aux,
        )
        return attention(call)[None].contiguous(), None

    return forward


def dense_attention(call: AttentionCall) -> Tensor:
    """The layer's own attention, by PyTorch's fused kernel where that can express it."""
    if call.window is None and call.soft_cap is None and call.sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(
            call.query.transpose(0, 1)[None],
            call.key.transpose(0, 1)[None],
            call.value.transpose(0, 1)[None],
            is_causal=True,
            scale=call.sm_scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    return pruned_attention(call, lambda scores, rows: scores > -torch.inf, group_size=None)


Select = Callable[[Tensor, Tensor], Tensor]
"""Scores [num_heads, n, num_keys] and their rows' positions [n] to the kept mask of the scores'
shape.
"""


def pruned_attention(
    call: AttentionCall,
    select: Select,
    *,
    group_size: int | None,
    renormalize: bool = False,
    observe: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """The layer's attention by the reference, a cache-sized chunk of rows at a time.

    Args:
        call: the layer's inputs.
        select: decides which keys a row keeps.
        group_size: tokens per compensation group; None drops the lost mass.
        renormalize: take the softmax over the kept keys alone, so that no mass is lost.
        observe: sees every chunk's kept mask [num_heads, n, num_keys] and rows [n].

    Returns:
        [num_rows, num_heads, head_dim].
    """
    align = group_size or 1
    output = torch.empty_like(call.query)
    start = 0
    while start < call.num_rows:
        first_key = 0 if call.window is None else max(0, start + 1 - call.window) // align * align
        step = max(8, _CHUNK_ELEMENTS // (call.num_heads * (start + 8 - first_key)))
        stop = min(call.num_rows, start + min(step, 256))
        rows = torch.arange(start, stop, device=call.query.device)
        scores = call.scores(rows, first_key)
        kept = select(scores, rows)
        if observe is not None:
            observe(kept, rows)
        if renormalize:
            scores = scores.masked_fill_(~kept, -torch.inf)
        weights = attention_weights(scores, kept, group_size=group_size, sinks=call.sinks)
        output[start:stop] = weighted_values(weights, call.value[first_key:stop])
        start = stop
    return output
