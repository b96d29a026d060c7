"""CPU decode over pages in AMX tiles: right, and what is kept is the same as in other pages, bit by
bit. Nothing here needs a processor with AMX but the last test.
"""

import math

import pytest
import torch
from decode_calls import BASE, OPTIONS, TARGETS, check, decode, kept_keys, needs_native
from test_invariance import on_a_key

from vllm_toptheta.kernels import ops
from vllm_toptheta.kernels.cpu import native
from vllm_toptheta.kernels.layout import PageLayout
from vllm_toptheta.testing.cases import Spec, make_case

ISAS = [
    None,
    "avx2",
    pytest.param(
        "avx512",
        marks=pytest.mark.skipif(
            ops.available_target().target == "native" and not native.has_avx512(),
            reason="this CPU has no AVX-512",
        ),
    ),
]


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_as_other_pages(options: dict[str, object], isa: native.Isa | None) -> None:
    case = on_a_key(make_case(Spec(**{**BASE, **options})))  # type: ignore[arg-type]
    tiles = decode(case, packing="amx", isa=isa, num_threads=2)
    assert_same_lists(tiles, decode(case, isa=isa))


def assert_same_lists(result, other) -> None:  # type: ignore[no-untyped-def]
    assert torch.equal(result.num_kept, other.num_kept)
    assert torch.equal(result.lifts, other.lifts)
    assert torch.equal(result.kept_mass, other.kept_mass)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(result.out, other.out, rtol=eps, atol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_matches_the_specification(target: ops.Target, options: dict[str, object]) -> None:
    case = make_case(Spec(**{**BASE, **options}))  # type: ignore[arg-type]
    check(case, decode(case, target, packing="amx"))


@needs_native
def test_the_list_and_the_cut() -> None:
    case = on_a_key(make_case(Spec(lens=(523, 90), min_prob=0.003, **BASE)))  # type: ignore[arg-type]
    assert torch.equal(kept_keys(case, packing="amx"), kept_keys(case))
    base = decode(case, packing="amx", num_splits=1, num_threads=1)
    for splits in (2, 5, 16):
        result = decode(case, packing="amx", num_splits=splits)
        assert torch.equal(result.kept_mass, base.kept_mass)
        assert torch.equal(result.num_kept, base.num_kept)


@pytest.mark.parametrize("target", TARGETS)
def test_nan_that_the_row_does_not_see_never_reaches_the_output(target: ops.Target) -> None:
    """A token's V lies between the elements of its neighbour's, which may be as stale as can be."""
    lens, window = (1, 63, 523), 91
    case = make_case(Spec(lens=lens, window=window, min_prob=1e-6, **BASE))  # type: ignore[arg-type]
    expected = decode(case, target, packing="amx")
    pages, layout = case.cpu_pages("amx")
    ops.update_side_data(pages, layout, case.slots(), target=target)
    raw = pages.flatten(2)[..., : 2 * 64 * 64].view(*pages.shape[:2], 2, -1)
    for seq, length in enumerate(lens):
        for position in range(max(length - window, 0)):
            block, slot = int(case.block_table[seq, position // 64]), position % 64
            keys = raw[block, :, 0].view(-1, 4, 32, 16, 2)
            keys[:, slot // 16, :, slot % 16] = math.nan
            values = raw[block, :, 1].view(-1, 4, 32, 16, 2)
            values[:, :, slot // 2, :, slot % 2] = math.nan
            if position % 64 == 63:
                layout.v_means(pages)[block, :, 0] = math.nan
    result = decode(case, target, pages=pages, packing="amx")
    assert result.out.isfinite().all()
    assert torch.equal(result.out, expected.out)


@needs_native
def test_means_are_those_of_other_pages() -> None:
    case = make_case(Spec(**BASE))  # type: ignore[arg-type]
    means = []
    for packing in ("vec", "amx"):
        pages, layout = case.cpu_pages(packing)
        ops.update_side_data(pages, layout, case.slots(), target="native")
        means.append(layout.v_means(pages))
    assert torch.equal(*(mean.nan_to_num() for mean in means))


def test_vllm_writes_such_pages() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    import vllm.platforms  # noqa: F401  registers the CPU operators
    from vllm import _custom_ops as vllm_ops

    if not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"):
        pytest.skip("this vLLM has no CPU operators")
    if not torch.cpu._is_avx512_supported():
        pytest.skip("the library that vLLM loads without AVX-512 knows no such pages")
    layout = PageLayout(64, 96, "amx")
    kv_cache = torch.zeros(4, 2, 64, layout.content_elements, dtype=torch.bfloat16)
    views = [
        kv_cache.as_strided((4, 2, 64, 96), (*kv_cache.stride()[:2], 96, 1), offset)
        for offset in (0, 64 * 96)
    ]
    key, value = torch.randn(2, 150, 2, 96).bfloat16()
    slots = torch.randperm(4 * 64)[:150]
    vllm_ops.cpu_attn_reshape_and_cache(key, value, *views, slots, "amx")
    assert torch.equal(layout.keys(kv_cache)[slots // 64, :, slots % 64], key)
    assert torch.equal(layout.values(kv_cache)[slots // 64, :, slots % 64], value)
