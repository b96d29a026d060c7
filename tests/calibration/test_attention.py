"""The adapter computes what the model's own attention computes, for every kind of model."""

import pytest
import torch
from tiny_models import CONFIGS, random_documents, tiny_model

from vllm_toptheta.calibration.attention import dense_attention, replaced_attention


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_dense_attention_equals_the_models_own(name: str) -> None:
    model = tiny_model(name)
    (ids,) = random_documents(1, 900)
    with torch.inference_mode():
        expected = model(ids[None], use_cache=False).logits
        with replaced_attention(model, dense_attention):
            got = model(ids[None], use_cache=False).logits
        again = model(ids[None], use_cache=False).logits
    assert torch.allclose(got, expected, atol=2e-3 * float(expected.abs().max()))
    assert torch.equal(again, expected)


def test_batches_are_refused() -> None:
    model = tiny_model()
    ids = torch.stack(random_documents(2, 20))
    with replaced_attention(model, dense_attention), pytest.raises(ValueError, match="batch of 2"):
        model(ids, use_cache=False)
