"""The GPU kernel and the CPU kernel keep the same keys on the same inputs."""

import pytest
import torch
from triton_cases import Case, run
from triton_interpreter import needs_interpreter

from vllm_toptheta.kernels import api

pytestmark = needs_interpreter

CASES = {
    "plain": Case([75, 33, 1, 0, 64], seed=50),
    "window": Case([90, 39], window=37, seed=51),
    "soft cap, sinks, dense row": Case(
        [75, 50], soft_cap=3.0, with_sinks=True, dense_rows=(1,), seed=52
    ),
    "best key only": Case([90, 39, 64], best_only_rows=(0, 1, 2), seed=53),
    "group 32": Case([110], block_size=64, group_size=32, head_dim=80, seed=54),
    "fp16": Case([75], dtype=torch.float16, heads=5, seed=55),
}


def run_on_cpu(case: Case, impl: api.Impl) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The CPU kernel on the same cache content in the CPU's page layout."""
    layout = api.PageLayout(case.block_size, case.head_dim, case.group_size)
    num_blocks, num_kv_heads = case.kv_cache.shape[:2]
    pages = torch.zeros(
        num_blocks, num_kv_heads, case.block_size, layout.content_elements, dtype=case.dtype
    )
    views = layout.views(pages)
    views.key_cache.copy_(case.key_cache.transpose(2, 3))
    views.value_cache.copy_(case.value_cache)
    api.update_v_means(pages, layout, case.slots(), impl=impl)
    num_seqs = len(case.lens)
    out = torch.empty(num_seqs, case.num_heads, case.head_dim, dtype=case.dtype)
    num_kept = torch.empty(num_seqs, case.num_heads, dtype=torch.int32)
    v_rows_read = torch.empty(num_seqs, num_kv_heads, dtype=torch.int32)
    api.decode_attention(
        case.query,
        pages,
        layout,
        case.block_table,
        case.seq_lens,
        case.theta,
        sm_scale=case.sm_scale,
        dense=case.dense.bool(),
        compensation=case.compensation,
        window=case.window,
        soft_cap=case.soft_cap,
        sinks=case.sinks,
        out=out,
        num_kept=num_kept,
        v_rows_read=v_rows_read,
        impl=impl,
    )
    return out, num_kept, v_rows_read


@pytest.mark.parametrize("name", CASES)
def test_same_counts_and_same_output(name: str) -> None:
    case = CASES[name]
    gpu = run(case)
    out, num_kept, v_rows_read = run_on_cpu(case, api.available_impl().impl)
    assert torch.equal(gpu.num_kept, num_kept)
    assert torch.equal(gpu.v_rows_read, v_rows_read)
    unit = torch.finfo(case.dtype).eps
    scale = float(out.float().abs().max().clamp(min=1))
    torch.testing.assert_close(gpu.out.float(), out.float(), rtol=0, atol=3 * unit * scale)


def test_same_keys_are_kept() -> None:
    """V rows that are one-hot in the key's position: the output shows which keys were kept."""
    case = Case([64], num_kv_heads=1, heads=2, compensation=True, seed=56)
    hot = torch.eye(64).to(case.dtype)
    for position in range(64):
        block = int(case.block_table[0, position // 16])
        case.value_cache[block, 0, position % 16] = hot[position]
    case.values[0] = hot[:, None].double()
    case.compensation = False
    gpu = run(case).out[0] > 0
    cpu = run_on_cpu(case, api.available_impl().impl)[0][0] > 0
    assert torch.equal(gpu, cpu)
    assert gpu.sum(-1).tolist() == [case.k, case.k]
