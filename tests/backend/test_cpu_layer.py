"""One attention layer of the backend against CPU_ATTN on the same tokens: mixed batches, windows,
soft caps, sinks."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

import torch  # noqa: E402
from vllm import _custom_ops as ops  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.attention.backends.cpu_attn import (  # noqa: E402
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

from vllm_toptheta.backend.cpu import GroupEnds, TopThetaCPUImpl, TopThetaCPUMetadata  # noqa: E402
from vllm_toptheta.backend.cpu_step import DecodeStep  # noqa: E402
from vllm_toptheta.backend.prompts import PromptStep  # noqa: E402
from vllm_toptheta.kernels.decode import DecodeRows  # noqa: E402
from vllm_toptheta.kernels.layout import UNCALIBRATED_WEIGHTS, PageLayout  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, BLOCK, NUM_BLOCKS = 6, 2, 64, 32, 40
LENS = [301, 33, 260]  # two decode rows, then a prompt chunk of 20 tokens
CHUNK = 20
LAYER = SimpleNamespace(isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 100},
    "soft cap": {"logits_soft_cap": 2.0},
    "sinks": {"sinks": torch.linspace(-1, 2, HEADS)},
}


@pytest.fixture(scope="module")
def vllm_config(smollm2: Path) -> VllmConfig:
    return EngineArgs(model=str(smollm2), dtype="float32").create_engine_config()


def metadata(
    first: int, lens: list[int], queries: list[int], table: torch.Tensor, window: int
) -> Any:
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lens),
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        seq_lens=seq_lens,
        dtype=torch.float32,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=window,
        isa="vec",
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )
    return CPUAttentionMetadata(
        num_actual_tokens=sum(queries),
        max_query_len=max(queries),
        query_start_loc=starts,
        max_seq_len=max(lens),
        seq_lens=seq_lens,
        block_table=table[first:],
        slot_mapping=torch.empty(0),
        scheduler_metadata=plan,
    )


def bind(layer: TopThetaCPUImpl) -> PageLayout:
    layout = PageLayout(BLOCK, HEAD_DIM)
    weights = torch.tensor(UNCALIBRATED_WEIGHTS).repeat(HEADS, 1)
    layer.bind(0, layout, weights, GroupEnds(layout.group_size))
    return layout


def decode_step(table: torch.Tensor, lens: list[int], dense: bool) -> DecodeStep:
    """Rows that keep every key."""
    rows = len(lens)
    counted = (1, rows, KV_HEADS)
    of_step = DecodeRows(
        block_table=table,
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        log_min_prob=torch.full(counted, -torch.inf),
        min_mass=torch.zeros(rows),
        dense=torch.full((1, rows), dense),
        num_kept=torch.empty(counted, dtype=torch.int32),
        kept_mass=torch.empty(1, rows, HEADS),
        lifts=torch.empty(counted, dtype=torch.int32),
    )
    return DecodeStep(rows, of_step, stock=[None])


def prompt_step(table: torch.Tensor, dense: bool) -> PromptStep:
    row_lens = torch.arange(LENS[2] - CHUNK, LENS[2]) + 1
    return PromptStep(
        block_table=table,
        query_start_loc=torch.tensor([0, CHUNK], dtype=torch.int32),
        seq_lens=torch.tensor(LENS[2:], dtype=torch.int32),
        log_min_prob=torch.full((1, CHUNK, KV_HEADS), -torch.inf),
        dense=torch.full((1, CHUNK), dense),
        visible=row_lens[None],
        row_lens=row_lens,
        num_kept=torch.empty((1, CHUNK, KV_HEADS), dtype=torch.int32),
        v_tiles_read=torch.empty((1, CHUNK, KV_HEADS), dtype=torch.int32),
        kept_mass=torch.empty(1, CHUNK, HEADS),
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompts", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_layer_agrees_with_cpu_attn(
    vllm_config: VllmConfig, case: str, dense: bool, prompts: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    arguments = (HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, None)
    options = {"sliding_window": None, "kv_cache_dtype": "auto", **CASES[case]}
    with set_current_vllm_config(vllm_config):
        stock = CPUAttentionBackendImpl(*arguments, **options)
        ours = TopThetaCPUImpl(*arguments, **options)
    layout = bind(ours)

    table = torch.randperm(NUM_BLOCKS - 1, generator=generator)[: 3 * 11].to(torch.int32) + 1
    table = table.view(3, 11)
    plain = torch.zeros(NUM_BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_DIM)
    paged = torch.full((NUM_BLOCKS, KV_HEADS, BLOCK, layout.content_elements), torch.nan)
    paged[table[2].long()] = 0  # CPU_ATTN, which runs the prompt rows, multiplies unwritten slots
    for row, length in enumerate(LENS):
        key, value = randn(length, KV_HEADS, HEAD_DIM), randn(length, KV_HEADS, HEAD_DIM)
        position = torch.arange(length)
        slots = table[row, position // BLOCK].long() * BLOCK + position % BLOCK
        stock.do_kv_cache_update(LAYER, key, value, plain, slots)
        ours.do_kv_cache_update(LAYER, key, value, paged, slots)

    query = randn(2 + CHUNK, HEADS, HEAD_DIM)
    expected, got = torch.empty_like(query), torch.full_like(query, torch.nan)
    window = stock.sliding_window
    whole = metadata(0, LENS, [1, 1, CHUNK], table, window)
    stock.forward(LAYER, query, None, None, plain, whole, expected)
    decode = decode_step(table[:2], LENS[:2], dense)
    step = TopThetaCPUMetadata(num_actual_tokens=2 + CHUNK, decode=decode, prefill=None)
    if prompts:
        step.prompts = prompt_step(table[2:], dense)
    else:
        step.prefill = metadata(2, LENS[2:], [CHUNK], table, window)
    ours.forward(LAYER, query, None, None, paged, step, got)

    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)
    visible = [min(length, window) if window > 0 else length for length in LENS[:2]]
    assert decode.rows.num_kept[0].tolist() == [[n] * KV_HEADS for n in visible]
    torch.testing.assert_close(decode.rows.kept_mass, torch.ones(1, 2, HEADS))
    assert decode.rows.lifts.tolist() == [[[0] * KV_HEADS] * 2]


def test_alibi_is_refused(vllm_config: VllmConfig) -> None:
    with set_current_vllm_config(vllm_config), pytest.raises(ValueError, match="ALiBi"):
        TopThetaCPUImpl(HEADS, HEAD_DIM, 0.125, KV_HEADS, [1.0] * HEADS, None, "auto")


def test_sinks_that_are_loaded_again_count(vllm_config: VllmConfig) -> None:
    sinks = torch.zeros(HEADS, dtype=torch.bfloat16)
    options = {"sliding_window": None, "kv_cache_dtype": "auto", "sinks": sinks}
    with set_current_vllm_config(vllm_config):
        layer = TopThetaCPUImpl(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, None, **options)
    layout = bind(layer)
    paged = torch.ones(1, KV_HEADS, BLOCK, layout.content_elements)
    decode = decode_step(torch.zeros(1, 1, dtype=torch.int32), [9], dense=True)
    step = TopThetaCPUMetadata(num_actual_tokens=1, decode=decode, prefill=None)
    query, out = torch.zeros(1, HEADS, HEAD_DIM), torch.empty(1, HEADS, HEAD_DIM)
    # Nine keys of score 0 and V of ones: their share of the denominator.
    for sink in (0.0, 3.0):
        sinks.fill_(sink)
        layer.forward(LAYER, query, None, None, paged, step, out)
        torch.testing.assert_close(out, torch.full_like(out, 9 / (9 + math.exp(sink))))
