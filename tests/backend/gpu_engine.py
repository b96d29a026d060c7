"""What a GPU worker sets up around the backend, on the CPU: vLLM's own configuration, attention
layers, cache specs and metadata builders, without a model. Only its distributed state and its own
kernels are stubbed.
"""

import copy
import functools
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

import torch
from tables import save_flat_table
from transformers import LlamaConfig
from triton_cases import Case
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend
from vllm.v1.worker.utils import AttentionGroup

import vllm_toptheta
from vllm_toptheta.backend import gpu, gpu_tensors, step
from vllm_toptheta.backend.gpu import (
    TopThetaGPUBackend,
    TopThetaGPUImpl,
    TopThetaGPUMetadataBuilder,
)
from vllm_toptheta.telemetry.counters import FIELDS

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 64, 16
THETA = 1.5
WINDOW = 40
WINDOWS = (None, WINDOW, None)
NAMES = [f"model.layers.{index}.self_attn.attn" for index in range(len(WINDOWS))]
MAX_ROWS = 6
MIN_KV_LEN = 20
LAYER = SimpleNamespace(_k_scale=torch.ones(1), _v_scale=torch.ones(1))


@functools.cache
def _model() -> Path:
    """A configuration of the layers above and a table for it, in a folder for this process."""
    folder = Path(tempfile.mkdtemp(prefix="toptheta-gpu-"))
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=len(WINDOWS),
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=64,
        vocab_size=128,
    ).save_pretrained(folder)
    save_flat_table(folder, THETA, folder / "table.safetensors")
    return folder


@functools.cache
def _configure() -> VllmConfig:
    vllm_toptheta.register()
    arguments = EngineArgs(
        model=str(_model()),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=MAX_ROWS,
        attention_backend="toptheta",
        additional_config={"toptheta": _options()},
    )
    return arguments.create_engine_config()


def _options(**changes: Any) -> dict[str, Any]:
    defaults = {
        "thresholds": str(_model() / "table.safetensors"),
        "k": 16,
        "min_kv_len": MIN_KV_LEN,
        "layers": {"2": {"dense": True}},
    }
    return defaults | changes


def configure(**options: Any) -> VllmConfig:
    """vLLM's configuration as it would be on a GPU, with options of ours."""
    config: VllmConfig = copy.deepcopy(_configure())
    config.additional_config = {"toptheta": _options(**options)}
    config.cache_config.block_size = BLOCK
    config.cache_config.kv_cache_layout = "LBNHC"
    config.scheduler_config.disable_hybrid_kv_cache_manager = True
    config.compilation_config.static_forward_context = {}
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.cudagraph_capture_sizes = [1, 2, 4, 8]
    return config


def make_layer(
    config: VllmConfig,
    name: str = NAMES[0],
    window: int | None = None,
    backend: Any = TopThetaGPUBackend,
    num_heads: int = HEADS,
    **kwargs: Any,
) -> Attention:
    """One of vLLM's attention layers on the GPU backend."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(config):
            return Attention(
                num_heads,
                HEAD_DIM,
                HEAD_DIM**-0.5,
                num_kv_heads=KV_HEADS,
                cache_config=config.cache_config,
                prefix=name,
                per_layer_sliding_window=window,
                attn_backend=backend,
                **kwargs,
            )
    finally:
        torch.set_default_dtype(before)


def make_groups(
    monkeypatch: pytest.MonkeyPatch, config: VllmConfig, num_blocks: int = 4
) -> tuple[list[AttentionGroup], KVCacheConfig]:
    """vLLM's groups of the layers that were made, with their metadata builders."""
    monkeypatch.setattr(gpu, "install_on_worker", lambda *args, **kwargs: None)
    monkeypatch.setattr(gpu_tensors, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(step, "get_tp_group", lambda: SimpleNamespace(world_size=1))
    with set_current_vllm_config(config):
        config.cache_config.num_gpu_blocks_override = num_blocks
        cache = get_kv_cache_config_from_groups(
            config, get_kv_cache_groups(config, get_kv_cache_spec(config)), available_memory=0
        )
        groups, _, _ = init_attn_backend(cache, config, torch.device("cpu"))
    return [group for part in groups for group in part], cache


def make_builder(
    monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[TopThetaGPUMetadataBuilder, list[TopThetaGPUImpl]]:
    """The builder of three layers, the second one windowed, and their implementations."""
    config = configure(**options)
    layers = [make_layer(config, name, window) for name, window in zip(NAMES, WINDOWS, strict=True)]
    (group,), _ = make_groups(monkeypatch, config)
    assert group.layer_names == NAMES
    return group.get_metadata_builder(), [layer.impl for layer in layers]


class Batch:
    """A case's cache in vLLM's padded pages, and the common metadata of a step over it."""

    def __init__(self, lens: list[int], queries: list[int], prefilling: list[bool] | None = None):
        self.case = Case(lens, num_kv_heads=KV_HEADS, heads=HEADS // KV_HEADS, head_dim=HEAD_DIM)
        self.case.theta.fill_(THETA)
        self.queries, self.prefilling = queries, prefilling or [q > 1 for q in queries]
        spec = TopThetaGPUBackend.customize_spec(
            FullAttentionSpec(
                block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=torch.bfloat16
            )
        )
        num_blocks = self.case.kv_cache.shape[0]
        raw = torch.zeros(num_blocks * spec.page_size_bytes, dtype=torch.int8)
        self.kv_cache = (
            raw.view(torch.bfloat16)
            .as_strided(
                (num_blocks, BLOCK, KV_HEADS, 2 * HEAD_DIM),
                (spec.page_size_bytes // 2, KV_HEADS * 2 * HEAD_DIM, 2 * HEAD_DIM, 1),
            )
            .transpose(1, 2)
        )
        self.kv_cache.copy_(self.case.kv_cache)

    def common(self) -> CommonAttentionMetadata:
        starts = torch.tensor([0, *self.queries]).cumsum(0).to(torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.clone(),
            seq_lens=self.case.seq_lens.clone(),
            num_reqs=len(self.queries),
            num_actual_tokens=sum(self.queries),
            max_query_len=max(self.queries),
            max_seq_len=max(self.case.lens),
            block_table_tensor=self.case.block_table,
            slot_mapping=torch.full((sum(self.queries),), -1, dtype=torch.int64),
            is_prefilling=torch.tensor(self.prefilling),
        )

    def expected(self, layer: int, dense: tuple[int, ...] = ()) -> Case:
        """The case as one of the layers sees it, with the rows that run dense marked."""
        self.case.window = WINDOWS[layer]
        spans = [min(n, WINDOWS[layer] or n) for n in self.case.lens]
        self.case.dense = torch.tensor(
            [layer == 2 or n <= MIN_KV_LEN or i in dense for i, n in enumerate(spans)]
        ).to(torch.int8)
        return self.case


def stub_stock_kernels(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace vLLM's own kernels: the cache is written already, and prompt rows are noted and
    marked.
    """
    calls: list[dict[str, Any]] = []

    def forward(
        self: Any,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        cache: Any,
        metadata: Any,
        output: Any,
    ) -> None:
        calls.append({"query": query, "metadata": metadata, "output": output})
        output.fill_(7)

    monkeypatch.setattr(TritonAttentionImpl, "forward", forward)
    monkeypatch.setattr(TritonAttentionImpl, "do_kv_cache_update", lambda *args: None)
    return calls


def run_layer(
    impl: TopThetaGPUImpl, batch: Batch, metadata: Any, query: torch.Tensor
) -> torch.Tensor:
    """The output of one layer for the tokens of a batch whose keys are in the cache."""
    slots = batch.case.slots()
    key = torch.empty(len(slots), KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    impl.do_kv_cache_update(LAYER, key, key, batch.kv_cache, slots)
    output = torch.full_like(query, torch.nan)
    return impl.forward(LAYER, query, key, key, batch.kv_cache, metadata, output)


class Launches:
    """Stands in for a jit function; keeps what a captured graph would freeze: grid, arguments with
    the addresses of tensors, and constants.
    """

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            frozen = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
            self.calls.append((grid, frozen, kwargs))

        return launch


def recorded_build(
    builder: TopThetaGPUMetadataBuilder, common: CommonAttentionMetadata
) -> tuple[Any, step.GPUStepCounts]:
    """Metadata of a real step, and what its counters would get."""
    gpu.STEP_LOG.begin(object(), [], [])
    metadata = builder.build(0, common)
    (counts,) = gpu.STEP_LOG.end()
    return metadata, counts


def named_totals(counts: step.GPUStepCounts) -> list[dict[str, int]]:
    """Totals per request and per layer, by name."""
    rows = counts.totals().view(-1, len(FIELDS)).tolist()
    return [dict(zip(FIELDS, row, strict=True)) for row in rows]
