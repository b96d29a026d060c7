"""The adapter computes what the model's own attention computes, for every kind of model."""

import pytest
import torch
from tiny_models import CONFIGS, random_documents, tiny_model

from vllm_toptheta.calibration.attention import dense_attention
from vllm_toptheta.evaluation.model import load_model, replaced_attention


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float33"}, "dtype is 'float33', expected float32"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
    ],
)
def test_no_model_is_loaded_for_what_is_not_there(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_model("/no/such/model", **options)
    assert "\n" not in str(caught.value)
