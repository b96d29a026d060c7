"""Teacher forcing in vLLM's sampler: the tokens a request is to generate in, a distribution that
allows nothing else out.

vLLM computes the log-probabilities it reports before logits processors run ("raw_logprobs", its
default), so those of a forced token are the model's own. vLLM's V1 model runner only.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

KEY = "forced_tokens"
"""Entry of `SamplingParams.extra_args`: list of token ids, one per generated token from the first;
those after them are the model's own."""


class ForcedTokens(AdapterLogitsProcessor):
    """Makes a request generate given tokens; requests without the entry are left alone."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[[list[int], Tensor], Tensor] | None:
        forced: list[int] = (params.extra_args or {}).get(KEY, [])

        def force(output_ids: list[int], logits: Tensor) -> Tensor:
            if len(output_ids) >= len(forced):
                return logits
            only = torch.full_like(logits, -math.inf)
            only[forced[len(output_ids)]] = 0
            return only

        return force if forced else None
