"""Our dense rows against vLLM's CPU kernel, on one cache that vLLM's own operator fills."""

import pytest
import torch
from decode_calls import needs_native

from vllm_toptheta.kernels.decode import DecodeLayer, DecodeRows
from vllm_toptheta.kernels.layout import RENORMALISE, PageLayout

pytest.importorskip("vllm", reason="vLLM is not installed")
import vllm.platforms  # noqa: E402, F401  registers the CPU operators
from vllm import _custom_ops as vllm_ops  # noqa: E402

pytestmark = [
    needs_native,
    pytest.mark.skipif(
        not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"),
        reason="this vLLM has no CPU operators",
    ),
]

LENS = (1, 63, 523, 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(9, 3, 64, 128), (8, 2, 128, 32), (4, 4, 80, 64), (8, 1, 256, 64)],
)
def test_agrees_with_vllm_on_its_own_cache(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    layout = PageLayout(block_size, head_dim)
    generator = torch.Generator().manual_seed(0)
    num_seqs = len(LENS)
    max_blocks = -(-max(LENS) // block_size)
    order = torch.randperm(num_seqs * max_blocks, generator=generator)
    block_table = order.view(num_seqs, max_blocks).to(torch.int32)
    pages = (order.numel(), num_kv_heads, block_size, layout.content_elements)
    kv_cache = torch.zeros(pages, dtype=dtype)
    values = layout.values(kv_cache)
    # The memory of K in the shape that vLLM's operators expect; not to be read as [token, dim].
    keys = kv_cache.as_strided(values.shape, values.stride(), kv_cache.storage_offset())
    isa = "vec" if head_dim % 32 == 0 else "vec16"
    slots = []
    for table, length in zip(block_table.long(), LENS, strict=True):
        position = torch.arange(length)
        slots.append(table[position // block_size] * block_size + position % block_size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    key, value = (normal(sum(LENS), num_kv_heads, head_dim) for _ in range(2))
    vllm_ops.cpu_attn_reshape_and_cache(key, value, keys, values, torch.cat(slots), isa)
    block, offset = slots[0] // block_size, slots[0] % block_size
    assert torch.equal(layout.keys(kv_cache)[block, :, offset], key[:1])
    query = normal(num_seqs, num_heads, head_dim)
    seq_lens = torch.tensor(LENS, dtype=torch.int32)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32)
    sliding_window = -1 if window is None else window
    metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=num_seqs,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        seq_lens=seq_lens,
        dtype=dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=sliding_window,
        isa=isa,
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )
    theirs, ours = torch.full_like(query, torch.nan), torch.full_like(query, torch.nan)
    vllm_ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=keys,
        value_cache=values,
        output=theirs,
        query_start_loc=starts,
        seq_lens=seq_lens,
        scale=head_dim**-0.5,
        causal=True,
        alibi_slopes=None,
        sliding_window=sliding_window,
        block_table=block_table,
        softcap=0,
        scheduler_metadata=metadata,
        s_aux=None,
    )
    num_kept = torch.empty(1, num_seqs, num_kv_heads, dtype=torch.int32)
    layer = DecodeLayer(
        0,
        layout,
        torch.tensor(RENORMALISE).repeat(num_heads, 1),
        sm_scale=head_dim**-0.5,
        window=window,
        soft_cap=None,
        target="native",
    )
    rows = DecodeRows(
        block_table=block_table,
        seq_lens=seq_lens,
        log_min_prob=torch.zeros(num_kept.shape),
        min_mass=torch.zeros(num_seqs),
        dense=torch.ones(1, num_seqs, dtype=torch.bool),
        num_kept=num_kept,
        kept_mass=torch.empty(1, num_seqs, num_heads),
        lifts=torch.empty_like(num_kept),
    )
    layer.attend(rows, query, kv_cache, ours)
    visible = seq_lens if window is None else seq_lens.clamp(max=window)
    assert torch.equal(num_kept[0], visible[:, None].expand_as(num_kept[0]))
    eps = torch.finfo(dtype).eps
    tolerance = 2e-6 if dtype == torch.float32 else 3 * eps
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
