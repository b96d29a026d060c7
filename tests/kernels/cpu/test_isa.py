"""CPU decode with AVX2 and with AVX-512: right in both, and what is kept is the same bit by bit.

Where the CPU lacks AVX-512 its intrinsics are emulated.
"""

from collections.abc import Iterator

import pytest
import torch
from decode_calls import check, decode, kept_keys, needs_native
from emulated import emulated_library

from vllm_toptheta.kernels.cpu import native
from vllm_toptheta.testing.cases import Spec, make_case

pytestmark = needs_native


@pytest.fixture(scope="module")
def _avx512(request: pytest.FixtureRequest) -> Iterator[None]:
    if native.has_avx512():
        yield
        return
    assert request.config.cache is not None
    found = emulated_library(request.config.cache.mkdir("toptheta_emulated"))
    assert found.library is not None, found.reason
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "native_library", lambda: found.library)
        yield


@pytest.mark.usefixtures("_avx512")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 200, "soft_cap": 6.0, "sinks": True, "min_mass": 0.7},
        {"num_heads": 1, "num_kv_heads": 1, "head_dim": 128, "block_size": 32},
        {"num_heads": 8, "num_kv_heads": 1, "head_dim": 32, "min_prob": 1e-5},
        {"num_heads": 11, "num_kv_heads": 1, "head_dim": 96, "dense_rows": (0, 3)},
        {"head_dim": 80, "block_size": 48},
    ],
    ids=str,
)
def test_avx512_keeps_what_avx2_keeps(options: dict[str, object], dtype: torch.dtype) -> None:
    case = make_case(Spec(dtype=dtype, **options))  # type: ignore[arg-type]
    narrow, wide = decode(case, isa="avx2"), decode(case, isa="avx512")
    check(case, narrow)
    check(case, wide)
    assert torch.equal(wide.num_kept, narrow.num_kept)
    assert torch.equal(wide.kept_mass, narrow.kept_mass)
    assert torch.equal(wide.lifts, narrow.lifts)


@pytest.mark.usefixtures("_avx512")
def test_the_lists_are_the_same() -> None:
    case = make_case(Spec(lens=(200,), min_prob=0.01))
    # On a key's own probability rounding decides, and must do so alike.
    log_p = case.select(0).probs.log().unflatten(0, (2, -1)).amax(1)[:, 0]
    for key in (3, 77, 150):
        case.log_min_prob[0] = log_p[:, key].float()
        assert torch.equal(kept_keys(case, isa="avx512"), kept_keys(case, isa="avx2"))


def test_an_instruction_set_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_avx512", lambda: False)
    with pytest.raises(RuntimeError, match="not available on this CPU"):
        decode(make_case(Spec(lens=(1,))), isa="avx512")
