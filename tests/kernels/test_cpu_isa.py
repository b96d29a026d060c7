"""The native kernels with AVX2 and with AVX-512: right in both, and the same keys are kept."""

from typing import Any

import pytest
import torch
from cpu_cases import Case, Spec, check, make_case, needs_native, with_options
from prefill_cases import (
    PrefillCase,
    check_prefill,
    make_prefill_case,
    put_on_scores,
    unplaced_case,
)

from vllm_toptheta.kernels import cpu
from vllm_toptheta.kernels.api import available_impl

HAS_AVX512 = available_impl().impl == "native" and cpu.has_avx512()
ISAS = [
    False,
    pytest.param(True, marks=pytest.mark.skipif(not HAS_AVX512, reason="this CPU lacks AVX-512")),
]
OPTIONS = [
    {},
    {"compensation": False, "kept": 0.9},
    {"window": 100, "soft_cap": 2.0, "sinks": True},
    {"kept": 0.3},
    {"head_dim": 80, "block_size": 16},
    {"num_heads": 10, "head_dim": 128, "group_size": 128, "block_size": 128, "kept": 0.5},
]

pytestmark = needs_native


def use(avx512: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_avx512", lambda: avx512)


def run_on_both(case: Case | PrefillCase, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Results of AVX2 and of AVX-512, which keep as many keys and agree but for rounding."""
    use(False, monkeypatch)
    expected = case.run("native")
    use(True, monkeypatch)
    result = case.run("native")
    assert torch.equal(result.num_kept, expected.num_kept)
    close = 1e-5 if result.out.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result.out, expected.out, rtol=close, atol=close)
    return expected, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("avx512", ISAS)
def test_prefill_matches_the_specification(
    avx512: bool,
    options: dict[str, object],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(avx512, monkeypatch)
    spec = with_options(Spec(6, 2, 64, 64, 16, lens=(1, 220, 150)), dtype=dtype, **options)
    case = make_prefill_case(spec, (1, 220, 1))
    case.dense[5::9] = True
    check_prefill(case, case.run("native"))


@pytest.mark.skipif(not HAS_AVX512, reason="this CPU lacks AVX-512")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prefill_keeps_the_same_keys(
    options: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = with_options(Spec(6, 2, 64, 64, 16, lens=(1000, 40)), dtype=dtype, **options)
    case = put_on_scores(unplaced_case(spec, (1000, 7)))
    expected, result = run_on_both(case, monkeypatch)
    assert torch.equal(result.v_tiles_read, expected.v_tiles_read)


DECODE_OPTIONS = [
    {},
    {"compensation": False, "kept": 0.9},
    {"window": 300, "soft_cap": 2.0, "sinks": True},
    {"kept": 0.3, "num_heads": 8, "num_kv_heads": 1},
    {"num_heads": 11, "num_kv_heads": 1, "group_size": 64, "block_size": 64},
    {"num_heads": 4, "num_kv_heads": 4, "head_dim": 96, "kept": 0.02},
    {"head_dim": 80, "block_size": 16},
    {"num_heads": 10, "head_dim": 128, "group_size": 128, "block_size": 128},
]


def decode_case(options: dict[str, object], dtype: torch.dtype) -> Case:
    spec = with_options(Spec(6, 2, 64, 32, 16, lens=(1, 63, 0, 777)), dtype=dtype, **options)
    case = make_case(spec)
    case.dense[1] = True
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", DECODE_OPTIONS, ids=str)
@pytest.mark.parametrize("avx512", ISAS)
def test_decode_matches_the_specification(
    avx512: bool,
    options: dict[str, object],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(avx512, monkeypatch)
    case = decode_case(options, dtype)
    check(case, case.run("native"))


@pytest.mark.skipif(not HAS_AVX512, reason="this CPU lacks AVX-512")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", DECODE_OPTIONS, ids=str)
def test_decode_keeps_the_same_keys(
    options: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = decode_case(options, dtype)
    for seq in (1, 3):  # thresholds on scores: the last bit decides
        scores = case.scores(seq)[:, 0]
        case.theta[seq] = scores.sort(-1, descending=True).values[:, 20].float()
    expected, result = run_on_both(case, monkeypatch)
    assert torch.equal(result.v_rows_read, expected.v_rows_read)
