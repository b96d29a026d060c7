"""Mixed batches through the CPU metadata builder and its layers: outputs and counts against the
specification, for every choice of phases."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

import torch  # noqa: E402
from prefill_cases import v_tiles  # noqa: E402
from tables import flat_table  # noqa: E402
from threshold_fixtures import make_identity  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.attention.backend import CommonAttentionMetadata  # noqa: E402
from vllm.v1.attention.backends import cpu_attn  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

from vllm_toptheta.backend import cpu  # noqa: E402
from vllm_toptheta.backend.plan import Plan  # noqa: E402
from vllm_toptheta.config import TopThetaConfig  # noqa: E402
from vllm_toptheta.kernels import reference  # noqa: E402
from vllm_toptheta.kernels.api import PageLayout  # noqa: E402
from vllm_toptheta.request_options import RequestOptions  # noqa: E402
from vllm_toptheta.telemetry.counters import FIELDS  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, BLOCK, GROUP = 6, 2, 64, 32, 16
THETA, MIN_KV_LEN = 0.5, 40
NAMES = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
LAYER = SimpleNamespace(isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)
# Two decode rows, of which one is short; the last token of a prompt, left over by the prefix cache,
# a chunk in the middle of a prompt, a prompt that asks not to be pruned, and a short one.
LENS, QUERIES = [301, 33, 200, 260, 150, 30], [1, 1, 1, 20, 150, 30]
DECODES, CHUNK, OFF, SHORT = 2, 3, 4, 5


@pytest.fixture(scope="module")
def vllm_config(smollm2: Path) -> VllmConfig:
    return EngineArgs(model=str(smollm2), dtype="float32").create_engine_config()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[int, RequestOptions]:
    """Options of the requests, by batch row."""
    options = {OFF: RequestOptions(pruning=False)}
    monkeypatch.setattr(cpu, "row_options", lambda cam: options)
    return options


class Engine:
    """A builder and its two layers, of which the second stays dense, over a filled cache."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, config: VllmConfig, phases: str, stock: bool
    ) -> None:
        options = {
            "k": 16,
            "min_kv_len": MIN_KV_LEN,
            "phases": phases,
            "layers": {"1": {"dense": True}},
        }
        identity = make_identity(num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
        checked = TopThetaConfig.from_additional_config({"toptheta": options})
        plan = Plan(checked, flat_table(identity, THETA), Path("table"))
        monkeypatch.setattr(cpu.Plan, "from_vllm_config", lambda config: plan)
        monkeypatch.setattr(cpu, "install_on_worker", lambda *args, **kwargs: None)
        monkeypatch.setattr(cpu, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(cpu, "get_tp_group", lambda: SimpleNamespace(world_size=1))
        monkeypatch.setattr(cpu, "stock_prompts_are_faster", lambda: stock)
        heads = (HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS)
        with set_current_vllm_config(config):
            self.impls = [cpu.TopThetaCPUImpl(*heads, None, None, "auto") for _ in NAMES]
        layers = {n: SimpleNamespace(impl=i) for n, i in zip(NAMES, self.impls, strict=True)}
        for module in (cpu, cpu_attn):
            monkeypatch.setattr(module, "get_layers_from_vllm_config", lambda *args: layers)
        monkeypatch.setattr(
            cpu_attn, "get_num_attention_heads_from_layers", lambda config, names: HEADS
        )
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=torch.float32
        )
        self.builder = cpu.TopThetaCPUMetadataBuilder(spec, NAMES, config, torch.device("cpu"))

    def step(self, batch: "Batch") -> tuple[cpu.TopThetaCPUMetadata, list[dict[str, int]]]:
        """Run both layers; the metadata, and the counts of every request."""
        cpu.STEP_LOG.begin(object(), [], [])
        metadata = self.builder.build(0, batch.common())
        (counts,) = cpu.STEP_LOG.end()
        batch.out = []
        for impl in self.impls:
            cache = batch.cache(impl)
            out = torch.full_like(batch.query, math.nan)
            batch.out.append(impl.forward(LAYER, batch.query, None, None, cache, metadata, out))
        rows = counts.totals().view(-1, len(FIELDS))[: len(batch.lens)].tolist()
        return metadata, [dict(zip(FIELDS, row, strict=True)) for row in rows]


class Batch:
    """Some of the requests: random queries, keys and values."""

    def __init__(self, requests: list[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.requests = requests
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
        layout = PageLayout(BLOCK, HEAD_DIM, GROUP)
        kv_cache = torch.zeros(self.table.numel(), KV_HEADS, BLOCK, layout.content_elements)
        for table, key, value in zip(self.table.long(), self.keys, self.values, strict=True):
            position = torch.arange(len(key))
            slots = table[position // BLOCK] * BLOCK + position % BLOCK
            impl.do_kv_cache_update(LAYER, key, value, kv_cache, slots)
        return kv_cache

    def expected(self, row: int, pruned: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of one request in float64, and what is kept: [num_heads, num_rows, num_keys]."""
        length, rows = self.lens[row], slice(int(self.starts[row]), int(self.starts[row + 1]))
        lens = torch.arange(length - self.queries[row], length) + 1
        scores = reference.attention_scores(
            self.query[rows].double(), self.keys[row].double(), lens, sm_scale=HEAD_DIM**-0.5
        )
        theta = torch.full((HEADS, len(lens)), -math.inf, dtype=torch.float64)
        if pruned:
            theta[:, lens > MIN_KV_LEN] = THETA
        kept = reference.select_by_theta(scores, theta)
        weights = reference.attention_weights(scores, kept, group_size=GROUP)
        return reference.weighted_values(weights, self.values[row].double()), kept


def check(
    batch: Batch, counts: list[dict[str, int]], phases: str, metadata: cpu.TopThetaCPUMetadata
) -> None:
    """Outputs of both layers, and every request's counts."""
    for row, request in enumerate(batch.requests):
        decodes = request < DECODES
        phase = phases in ("both", "decode" if decodes else "prefill")
        kept_sum = rows_sum = tiles_sum = scored = 0
        for layer in range(len(NAMES)):
            pruned = phase and layer == 0 and request != OFF
            out, kept = batch.expected(row, pruned)
            rows = slice(int(batch.starts[row]), int(batch.starts[row + 1]))
            got = batch.out[layer][rows].double()
            torch.testing.assert_close(got, out, rtol=0, atol=1e-5)
            kept_sum += int(kept.sum())
            rows_sum += int(reference.count_v_rows(kept, KV_HEADS).sum())
            tiles_sum += int(v_tiles(kept, KV_HEADS).sum())
            lens = range(batch.lens[row] - batch.queries[row] + 1, batch.lens[row] + 1)
            scored += HEADS * sum(lens)
            if pruned and batch.lens[row] > MIN_KV_LEN:
                assert kept_sum < 0.5 * scored, "nothing was pruned"
        found, num_rows = counts[row], batch.queries[row] * HEADS * len(NAMES)
        if decodes:
            assert (found["rows"], found["keys_scored"]) == (num_rows, scored)
            assert (found["keys_kept"], found["v_rows_read"]) == (kept_sum, rows_sum)
            assert found["dense_prefill"] == found["prefill_rows"] == 0
        elif phases == "decode":
            assert found == dict.fromkeys(FIELDS, 0) | {"dense_prefill": num_rows}
        else:
            assert (found["prefill_rows"], found["prefill_keys_scored"]) == (num_rows, scored)
            assert found["prefill_keys_kept"] == kept_sum
            assert found["prefill_v_tiles_read"] == tiles_sum
            assert found["rows"] == 0
    has_prompts = batch.requests[-1] >= DECODES
    assert (metadata.prefill is not None) + (metadata.prompts is not None) == has_prompts


@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("phases", ["both", "prefill", "decode"])
def test_mixed_batches(
    monkeypatch: pytest.MonkeyPatch,
    vllm_config: VllmConfig,
    asked: dict[int, RequestOptions],
    phases: str,
    stock: bool,
) -> None:
    engine, batch = Engine(monkeypatch, vllm_config, phases, stock), Batch(list(range(len(LENS))))
    metadata, counts = engine.step(batch)
    check(batch, counts, phases, metadata)
    assert (metadata.prefill is not None) is (stock and phases == "decode")


@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("phases", ["both", "prefill"])
def test_steps_whose_prompts_are_not_pruned_run_on_the_faster_kernel(
    monkeypatch: pytest.MonkeyPatch,
    vllm_config: VllmConfig,
    asked: dict[int, RequestOptions],
    phases: str,
    stock: bool,
) -> None:
    asked.clear()
    asked[2] = RequestOptions(pruning=False)  # the third of these requests
    engine, batch = Engine(monkeypatch, vllm_config, phases, stock), Batch([0, 1, OFF, SHORT])
    metadata, counts = engine.step(batch)
    check(batch, counts, phases, metadata)
    assert (metadata.prefill is not None) is stock


@pytest.mark.parametrize("avx512", [True, False])
def test_hosts_with_avx512_keep_unpruned_prompts_on_cpu_attn_and_say_so(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig, avx512: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    faster, lines = cpu.stock_prompts_are_faster(), []
    assert faster is avx512
    monkeypatch.setattr(cpu.logger, "info_once", lines.append)
    engine = Engine(monkeypatch, vllm_config, "decode", faster)
    metadata, _ = engine.step(Batch([0, CHUNK]))
    assert (metadata.prefill is not None) is avx512
    assert ["CPU_ATTN" in line for line in lines] == [True] * avx512
