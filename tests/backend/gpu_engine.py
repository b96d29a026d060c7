"""What a GPU worker sets up around the backend, on the CPU: vLLM's own configuration, attention
layers, cache specs and metadata builders, without a model. Only its distributed state and its own
kernels are stubbed.
"""

import copy
import functools
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kv_cache_planning import get_kv_cache_config_from_groups, get_kv_cache_groups
from threshold_fixtures import make_table
from transformers import LlamaConfig
from vllm.config import CUDAGraphMode, VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend
from vllm.v1.worker.utils import AttentionGroup

import vllm_toptheta
from vllm_toptheta.backend import counts as counts_module
from vllm_toptheta.backend import gpu_tensors, step, unsupported
from vllm_toptheta.backend.gpu import (
    TopThetaGPUBackend,
    TopThetaGPUImpl,
    TopThetaGPUMetadataBuilder,
)
from vllm_toptheta.hooks import model_runner
from vllm_toptheta.kernels.columns import COLUMNS
from vllm_toptheta.kernels.layout import UNCALIBRATED_WEIGHTS
from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.testing.cases import Case, Result, Spec, error_budget, make_case

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 64, 16
MIN_PROB, MIN_MASS = 0.03, 0.8
WINDOW = 40
WINDOWS = (None, WINDOW, None)
NAMES = [f"model.layers.{index}.self_attn.attn" for index in range(len(WINDOWS))]
MAX_ROWS = 6
MIN_KV_LEN = 20
LAYER = SimpleNamespace(_q_scale=torch.ones(1), _k_scale=torch.ones(1), _v_scale=torch.ones(1))


@functools.cache
def _model(num_kv_heads: int, head_dim: int) -> Path:
    """A configuration of the layers above and a table for it, in a folder for this process."""
    folder = Path(tempfile.mkdtemp(prefix="toptheta-gpu-"))
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=len(WINDOWS),
        num_attention_heads=HEADS,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=HEADS * head_dim,
        intermediate_size=64,
        vocab_size=128,
    )
    config.save_pretrained(folder)
    identity = ModelIdentity.from_config(config)
    offsets = torch.arange(len(WINDOWS) * num_kv_heads).view(-1, num_kv_heads) / 10
    make_table(identity, offsets=offsets).save(folder / "table.safetensors")
    return folder


@functools.cache
def _configure(num_kv_heads: int, head_dim: int) -> VllmConfig:
    vllm_toptheta.register()
    arguments = EngineArgs(
        model=str(_model(num_kv_heads, head_dim)),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=MAX_ROWS,
        attention_backend="toptheta",
        additional_config={"toptheta": _options()},
    )
    return arguments.create_engine_config()


def _options(**changes: Any) -> dict[str, Any]:
    dial = {} if "k" in changes else {"min_prob": MIN_PROB}
    defaults = {
        "thresholds": "none",
        "min_mass": MIN_MASS,
        "min_kv_len": MIN_KV_LEN,
        "k_sketch": False,  # which "auto" would be but for the platform
        "layers": {"2": {"dense": True}},
    }
    return defaults | dial | changes


def table() -> str:
    """A value of the option `thresholds`: a table of the model, with offsets."""
    return str(_model(KV_HEADS, HEAD_DIM) / "table.safetensors")


def configure(**options: Any) -> VllmConfig:
    """vLLM's configuration as it would be on a GPU, with options of ours."""
    config: VllmConfig = copy.deepcopy(_configure(KV_HEADS, HEAD_DIM))
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
    backend: Any = None,
    num_heads: int = HEADS,
    **kwargs: Any,
) -> Attention:
    """One of vLLM's attention layers on the GPU backend, in the class that the options choose."""
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
                attn_backend=backend or _chosen(),
                **kwargs,
            )
    finally:
        torch.set_default_dtype(before)


def _chosen() -> Any:
    """The class for layers of the current configuration."""
    return resolve_obj_by_qualname(TopThetaGPUBackend.path_for(torch.bfloat16))


def make_groups(
    monkeypatch: pytest.MonkeyPatch, config: VllmConfig, num_blocks: int = 4
) -> tuple[list[AttentionGroup], KVCacheConfig]:
    """vLLM's groups of the layers that were made, with their metadata builders."""
    monkeypatch.setattr(unsupported, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(model_runner, "install", lambda *args, **kwargs: None)
    monkeypatch.setattr(gpu_tensors, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(counts_module, "get_tp_group", lambda: SimpleNamespace(world_size=1))
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
    """A step over vLLM's padded pages: its tokens, and the common metadata.

    Attributes:
        case: all query tokens; those of single-token requests follow each other.
    """

    def __init__(
        self,
        lens: list[int],
        queries: list[int],
        prefilling: list[bool] | None = None,
        min_prob: float = MIN_PROB,
        backend: Any = TopThetaGPUBackend,
    ) -> None:
        spec = Spec(
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            block_size=BLOCK,
            lens=tuple(lens),
            query_lens=tuple(queries),
            dtype=torch.bfloat16,
            tile=64,
        )
        self.case = make_case(spec)
        self.case.log_min_prob.fill_(math.log(min_prob))
        self.case.weights = torch.tensor(UNCALIBRATED_WEIGHTS).expand(HEADS, -1)
        self.queries, self.prefilling = queries, prefilling or [q > 1 for q in queries]
        page = backend.customize_spec(
            FullAttentionSpec(
                block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=torch.bfloat16
            )
        ).page_size_bytes
        num_blocks = self.case.num_blocks
        raw = torch.zeros(num_blocks * page, dtype=torch.int8)
        self.kv_cache = (
            raw.view(torch.bfloat16)
            .as_strided(
                (num_blocks, BLOCK, KV_HEADS, 2 * HEAD_DIM),
                (page // 2, KV_HEADS * 2 * HEAD_DIM, 2 * HEAD_DIM, 1),
            )
            .transpose(1, 2)
        )
        self.kv_cache.copy_(self.case.gpu_pages())

    def common(self) -> CommonAttentionMetadata:
        return CommonAttentionMetadata(
            query_start_loc=self.case.query_start_loc,
            query_start_loc_cpu=self.case.query_start_loc.clone(),
            seq_lens=self.case.seq_lens.clone(),
            num_reqs=len(self.queries),
            num_actual_tokens=sum(self.queries),
            max_query_len=max(self.queries),
            max_seq_len=max(self.case.spec.lens),
            block_table_tensor=self.case.block_table,
            slot_mapping=torch.full((sum(self.queries),), -1, dtype=torch.int64),
            is_prefilling=torch.tensor(self.prefilling),
        )

    def expected(self, layer: int, excluded: tuple[int, ...] = ()) -> Result:
        """What one of the layers is to do with every token.

        Args:
            layer: its window counts, and the last one is dense.
            excluded: tokens that run dense for another reason.
        """
        spec = replace(self.case.spec, window=WINDOWS[layer])
        spans = [min(visible, spec.window or visible) for _, visible in spec.rows]
        dense = [layer == 2 or n <= MIN_KV_LEN or i in excluded for i, n in enumerate(spans)]
        # A threshold that every key reaches.
        log_min_prob = self.case.log_min_prob.clone()
        log_min_prob[torch.tensor(dense)] = -1e30
        everything = replace(self.case, spec=spec, log_min_prob=log_min_prob)
        result = everything.expected()
        ones = [i for i, q in enumerate(self.queries) if q <= 1]
        if ones:
            rows = slice(ones[0], ones[-1] + 1)
            floors = [0.0 if of_prompt else MIN_MASS for of_prompt in self.prefilling[rows]]
            first_token = sum(self.queries[: rows.start])
            tokens = slice(first_token, first_token + len(ones))
            single = _decode_rows(everything, rows, tokens)
            single.min_mass = torch.tensor(floors)
            for name, values in vars(single.expected()).items():
                getattr(result, name)[tokens] = values
        return result

    def check(self, layer: int, output: torch.Tensor, rows: Any, **excluded: Any) -> Result:
        """Compare what a layer did with the tokens of `rows`, and return what it is to do."""
        result, found = self.expected(layer, **excluded), rows.tensors
        # Twice what the kernels' own tests allow: nothing here depends on their rounding.
        budget = 2 * error_budget(self.case, result.out)
        places = [(rows.single, rows.single_at)]
        for prompts in rows.prompts:
            places.append((prompts.tokens, prompts.tokens))
            read = found.v_tiles_read[layer, prompts.tokens]
            assert torch.equal(read, result.v_tiles_read[prompts.tokens])
        for tokens, at in places:
            wrong = (output[tokens].double() - result.out[tokens]).abs() > budget[tokens]
            assert not wrong.any()
            assert torch.equal(found.num_kept[layer, at], result.num_kept[tokens])
            torch.testing.assert_close(found.kept_mass[layer, at], result.kept_mass[tokens])
        assert torch.equal(found.lifts[layer, rows.single_at], result.lifts[rows.single])
        return result


def _decode_rows(case: Case, seqs: slice, tokens: slice) -> Case:
    """Sequences of a case that have one token each, as decode rows."""
    spec = replace(case.spec, lens=case.spec.lens[seqs], query_lens=None)
    by_seq = {name: getattr(case, name)[seqs] for name in ("keys", "values", "block_table")}
    by_token = {
        name: getattr(case, name)[tokens] for name in ("query", "log_min_prob", "min_mass", "dense")
    }
    return replace(case, spec=spec, **by_seq, **by_token)


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
    running = model_runner.Engine()
    with model_runner.running(object(), running):
        metadata = builder.build(0, common)
    (counts,) = running.steps
    return metadata, counts


def named_totals(counts: step.GPUStepCounts) -> list[dict[str, int]]:
    """Totals per request and per layer, by name."""
    rows = counts.totals().view(-1, len(COLUMNS)).tolist()
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]
