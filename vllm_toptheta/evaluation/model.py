"""A Hugging Face model and an attention function in, the model running with that attention out.

Works for every model that takes its attention from transformers' `ALL_ATTENTION_FUNCTIONS`; there
is no code per model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from vllm_toptheta.calibration.attention import AttentionCall

_NAME = "toptheta"

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
        if query.shape[0] != 1 or query.shape[2] > key.shape[2]:
            raise ValueError(
                f"attention over a batch of {query.shape[0]} with {query.shape[2]} rows and "
                f"{key.shape[2]} keys; expected one document"
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


def load_model(
    model_name: str, *, dtype: str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model in eval mode, and its tokenizer.

    Args:
        model_name: repository or folder.
        dtype: torch dtype's name, or "auto" for the checkpoint's.
        device: torch device.

    Raises:
        OSError: there is no such model.
        ValueError: there is no such dtype or device; no weights were read.
    """
    kind = None if dtype == "auto" else getattr(torch, dtype, None)
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}, expected float32, bfloat16, float16 or auto")
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}") from error
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=kind or "auto")
    return model.to(device).eval(), tokenizer
