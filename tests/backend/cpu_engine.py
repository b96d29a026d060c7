"""A CPU metadata builder and its layers over a filled cache, and batches with what float64 says."""

import math
from types import SimpleNamespace

import pytest
import torch
from threshold_fixtures import make_identity
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_toptheta.backend import counts as counts_module
from vllm_toptheta.backend import cpu
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.config import TopThetaConfig
from vllm_toptheta.hooks import model_runner
from vllm_toptheta.kernels import reference
from vllm_toptheta.kernels.columns import COLUMNS
from vllm_toptheta.kernels.cpu.prefill import KEY_TILE
from vllm_toptheta.kernels.layout import PROMPT_WEIGHTS, UNCALIBRATED_WEIGHTS

HEADS, KV_HEADS, HEAD_DIM, BLOCK, GROUP = 6, 2, 64, 32, 32
MIN_PROB, MIN_MASS, MIN_KV_LEN = 0.01, 0.65, 40
NAMES = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
LAYER = SimpleNamespace(isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)
# Two decode rows, of which one is short; the last token of a prompt, left over by the prefix cache,
# a chunk in the middle of a prompt, a prompt that asks not to be pruned, and a short one.
LENS, QUERIES = [301, 33, 200, 260, 150, 30], [1, 1, 1, 20, 150, 30]
DECODES, CHUNK, OFF, SHORT = 2, 3, 4, 5

plans: list[Plan] = []
"""Of the engines, in the order in which they were made."""


class Engine:
    """A builder and its two layers, of which the second stays dense, over a filled cache."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        config: VllmConfig,
        phases: str,
        stock: bool,
        **more: object,
    ) -> None:
        options = {
            "k_sketch": False,
            **more,
            "min_prob": MIN_PROB,
            "min_mass": MIN_MASS,
            "min_kv_len": MIN_KV_LEN,
            "phases": phases,
            "layers": {"1": {"dense": True}},
        }
        identity = make_identity(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
        checked = TopThetaConfig.from_additional_config({"toptheta": options})
        plan = Plan(checked, identity)
        plans.append(plan)
        monkeypatch.setattr(cpu.Plan, "from_vllm_config", lambda config: plan)
        monkeypatch.setattr(model_runner, "install", lambda *args, **kwargs: None)
        monkeypatch.setattr(cpu, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(counts_module, "get_tp_group", lambda: SimpleNamespace(world_size=1))
        monkeypatch.setattr(cpu, "stock_prompts_are_faster", lambda *args: stock)
        heads = (HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS)
        with set_current_vllm_config(config):
            self.impls = [cpu.TopThetaCPUImpl(*heads, None, None, "auto") for _ in NAMES]
        layers = {n: SimpleNamespace(impl=i) for n, i in zip(NAMES, self.impls, strict=True)}
        for module in (cpu, cpu_attn):
            monkeypatch.setattr(module, "get_layers_from_vllm_config", lambda *args: layers)
        monkeypatch.setattr(
            cpu_attn, "get_num_attention_heads_from_layers", lambda config, names: HEADS
        )
        sketch = cpu.TopThetaCPUSketchBackend if checked.k_sketch else cpu.TopThetaCPUBackend
        spec = sketch.customize_spec(
            FullAttentionSpec(
                block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=torch.float32
            )
        )
        self.builder = cpu.TopThetaCPUMetadataBuilder(spec, NAMES, config, torch.device("cpu"))

    def step(self, batch: "Batch") -> tuple[cpu.TopThetaCPUMetadata, list[dict[str, int]]]:
        """Run both layers; the metadata, and the counts of every request."""
        running = model_runner.Engine()
        with model_runner.running(object(), running):
            metadata = self.builder.build(0, batch.common())
        (counts,) = running.steps
        self.counts = counts
        batch.out = []
        for impl in self.impls:
            cache = batch.cache(impl)
            out = torch.full_like(batch.query, math.nan)
            batch.out.append(impl.forward(LAYER, batch.query, None, None, cache, metadata, out))
        rows = counts.totals().view(-1, len(COLUMNS))[: len(batch.lens)].tolist()
        return metadata, [dict(zip(COLUMNS, row, strict=True)) for row in rows]


class Batch:
    """Some of the requests: random queries, keys and values."""

    def __init__(
        self, requests: list[int], weights: tuple[float, ...] = UNCALIBRATED_WEIGHTS
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.requests, self.weights = requests, weights
        self.lens, self.queries = [LENS[i] for i in requests], [QUERIES[i] for i in requests]

        def randn(rows: int, heads: int) -> torch.Tensor:
            return torch.randn(rows, heads, HEAD_DIM, generator=generator)

        self.query = randn(sum(self.queries), HEADS)
        self.keys = [randn(n, KV_HEADS) for n in self.lens]
        self.values = [randn(n, KV_HEADS) for n in self.lens]
        blocks = -(-max(self.lens) // BLOCK)
        order = torch.randperm(len(requests) * blocks, generator=generator)
        self.table = order.to(torch.int32).view(len(requests), blocks)
        self.starts = torch.tensor([0, *self.queries]).cumsum(0).to(torch.int32)
        self.out: list[torch.Tensor] = []

    def common(self) -> CommonAttentionMetadata:
        return CommonAttentionMetadata(
            query_start_loc=self.starts,
            query_start_loc_cpu=self.starts.clone(),
            seq_lens=torch.tensor(self.lens, dtype=torch.int32),
            num_reqs=len(self.lens),
            num_actual_tokens=len(self.query),
            max_query_len=max(self.queries),
            max_seq_len=max(self.lens),
            block_table_tensor=self.table,
            slot_mapping=torch.full((len(self.query),), -1, dtype=torch.int64),
            is_prefilling=torch.tensor([i >= DECODES for i in self.requests]),
        )

    def cache(self, impl: cpu.TopThetaCPUImpl) -> torch.Tensor:
        """Pages as the layer writes them."""
        layout = impl.layout
        kv_cache = torch.zeros(self.table.numel(), KV_HEADS, BLOCK, layout.content_elements)
        layout.v_means(kv_cache).fill_(math.nan)
        for table, key, value in zip(self.table.long(), self.keys, self.values, strict=True):
            position = torch.arange(len(key))
            slots = table[position // BLOCK] * BLOCK + position % BLOCK
            impl.do_kv_cache_update(LAYER, key, value, kv_cache, slots)
        return kv_cache

    def expected(self, row: int, pruned: bool) -> tuple[torch.Tensor, reference.Selection]:
        """Outputs of one request in float64, and what its rows keep."""
        length, rows = self.lens[row], slice(int(self.starts[row]), int(self.starts[row + 1]))
        lens = torch.arange(length - self.queries[row], length) + 1
        scores = reference.attention_scores(
            self.query[rows].double(), self.keys[row].double(), lens, sm_scale=HEAD_DIM**-0.5
        )
        threshold = torch.full((KV_HEADS, len(lens)), -1e30, dtype=torch.float64)
        if pruned:
            threshold[:, lens > MIN_KV_LEN] = math.log(MIN_PROB)
        if self.requests[row] < DECODES:
            weights = self.weights
            chosen = reference.select(scores, threshold, MIN_MASS, group_size=GROUP)
        else:
            weights = PROMPT_WEIGHTS
            chosen = reference.select_running(scores, threshold, group_size=GROUP, tile=KEY_TILE)
        out = reference.compensated_output(
            chosen,
            self.values[row].double(),
            torch.tensor(weights).expand(HEADS, -1),
            group_size=GROUP,
        )
        return out, chosen
