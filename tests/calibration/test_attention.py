"""The adapter computes what the model's own attention computes, for every kind of model."""

import pytest
import torch
from tiny_models import CONFIGS, random_documents, tiny_model

from vllm_toptheta.calibration.attention import (
    AttentionCall,
    dense_attention,
    pruned_attention,
    replaced_attention,
)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("chunked", [False, True])
def test_keeping_everything_equals_the_models_own_attention(name: str, chunked: bool) -> None:
    model = tiny_model(name)
    (ids,) = random_documents(1, 150)

    def attention(call: AttentionCall) -> torch.Tensor:
        if not chunked:
            return dense_attention(call)
        return pruned_attention(call, lambda scores, _: scores > -torch.inf, group_size=16)

    with torch.inference_mode():
        expected = model(ids[None], use_cache=False).logits
        with replaced_attention(model, attention):
            got = model(ids[None], use_cache=False).logits
        again = model(ids[None], use_cache=False).logits
    assert torch.allclose(got, expected, atol=2e-3 * float(expected.abs().max()))
    assert torch.equal(again, expected)


def test_window_offset_keeps_groups_aligned() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(300, heads, 8) for heads in (2, 1, 1))
    call = AttentionCall(0, query, key, value, 1.0, 50, None, None)

    def select(scores: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return scores > 1.5

    got = pruned_attention(call, select, group_size=16)
    from vllm_toptheta.kernels import reference

    scores = call.scores(torch.arange(300))
    weights = reference.attention_weights(scores, scores > 1.5, group_size=16)
    assert torch.allclose(got, reference.weighted_values(weights, value), atol=1e-5)


def test_batches_are_refused() -> None:
    model = tiny_model()
    ids = torch.stack(random_documents(2, 20))
    with replaced_attention(model, dense_attention), pytest.raises(ValueError, match="batch of 2"):
        model(ids, use_cache=False)
