"""Mixed batches through the CPU metadata builder and its layers: outputs and counts against the
specification, for every choice of phases."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

import torch  # noqa: E402
from asked import resolve  # noqa: E402
from threshold_fixtures import make_identity  # noqa: E402
from vllm.config import VllmConfig, set_current_vllm_config  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.attention.backend import CommonAttentionMetadata  # noqa: E402
from vllm.v1.attention.backends import cpu_attn  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402

from vllm_toptheta.backend import counts as counts_module  # noqa: E402
from vllm_toptheta.backend import cpu, cpu_layer, sidecar  # noqa: E402
from vllm_toptheta.backend.counts import RankHeads  # noqa: E402
from vllm_toptheta.backend.heads import toptheta_heads  # noqa: E402
from vllm_toptheta.backend.plan import Plan  # noqa: E402
from vllm_toptheta.config import TopThetaConfig  # noqa: E402
from vllm_toptheta.hooks import model_runner  # noqa: E402
from vllm_toptheta.kernels import reference  # noqa: E402
from vllm_toptheta.kernels.columns import COLUMNS  # noqa: E402
from vllm_toptheta.kernels.cpu.prefill import KEY_TILE  # noqa: E402
from vllm_toptheta.kernels.layout import (  # noqa: E402
    PROMPT_WEIGHTS,
    RENORMALISE,
    UNCALIBRATED_WEIGHTS,
    V_TILE,
    PageLayout,
)
from vllm_toptheta.kernels.ops import Availability  # noqa: E402
from vllm_toptheta.requests import RequestOptions  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, BLOCK, GROUP = 6, 2, 64, 32, 32
MIN_PROB, MIN_MASS, MIN_KV_LEN = 0.01, 0.65, 40
NAMES = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
LAYER = SimpleNamespace(isa="vec", _k_scale_float=1.0, _v_scale_float=1.0)
# Two decode rows, of which one is short; the last token of a prompt, left over by the prefix cache,
# a chunk in the middle of a prompt, a prompt that asks not to be pruned, and a short one.
LENS, QUERIES = [301, 33, 200, 260, 150, 30], [1, 1, 1, 20, 150, 30]
DECODES, CHUNK, OFF, SHORT = 2, 3, 4, 5


@pytest.fixture(scope="module")
def vllm_config(smollm2: Path) -> VllmConfig:
    return EngineArgs(model=str(smollm2), dtype="float32").create_engine_config()


plans: list[Plan] = []
"""Of the engines, in the order in which they were made."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[int, RequestOptions]:
    """Options of the requests, by batch row."""
    options = {OFF: RequestOptions(pruning=False)}
    monkeypatch.setattr(model_runner, "row_options", lambda cam: resolve(plans[-1], options))
    return options


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


def check(
    batch: Batch, counts: list[dict[str, int]], phases: str, metadata: cpu.TopThetaCPUMetadata
) -> None:
    """Outputs of both layers, and every request's counts."""
    for row, request in enumerate(batch.requests):
        decodes = request < DECODES
        phase = phases in ("both", "decode" if decodes else "prefill")
        read = tiles = scored = mass = lifted = 0
        for layer in range(len(NAMES)):
            pruned = phase and layer == 0 and request != OFF
            out, chosen = batch.expected(row, pruned)
            rows = slice(int(batch.starts[row]), int(batch.starts[row + 1]))
            got = batch.out[layer][rows].double()
            torch.testing.assert_close(got, out, rtol=0, atol=1e-5)
            read += int(chosen.kept.sum())
            padded = torch.nn.functional.pad(chosen.kept, (0, -batch.lens[row] % V_TILE))
            tiles += int(padded.unflatten(-1, (-1, V_TILE)).any(-1).sum())
            lens = range(batch.lens[row] - batch.queries[row] + 1, batch.lens[row] + 1)
            scored += sum(lens)
            mass += float(chosen.kept_mass.sum())
            lifted += int((chosen.lifts > 0).sum()) * (HEADS // KV_HEADS)
            if pruned and batch.lens[row] > MIN_KV_LEN:
                assert read < 0.7 * scored * KV_HEADS, "nothing was pruned"
        found, num_rows = counts[row], batch.queries[row] * HEADS * len(NAMES)
        kept = read * (HEADS // KV_HEADS)
        if decodes:
            assert (found["rows"], found["keys_scored"]) == (num_rows, scored * HEADS)
            assert (found["keys_kept"], found["v_rows_read"]) == (kept, read)
            assert found["v_rows_scored"] == scored * KV_HEADS
            assert found["keys_dense"] == kept, "no k rules"
            assert found["kept_mass"] == pytest.approx(mass * 1e6, abs=2)
            assert found["rows_lifted"] == lifted
            assert found["dense_prefill"] == found["prefill_rows"] == found["keys_target"] == 0
        elif phases == "decode":
            assert found == dict.fromkeys(COLUMNS, 0) | {"dense_prefill": num_rows}
        else:
            assert (found["prefill_rows"], found["prefill_keys_scored"]) == (
                num_rows,
                scored * HEADS,
            )
            assert found["prefill_keys_kept"] == kept
            assert found["prefill_v_tiles_read"] == tiles
            assert found["prefill_kept_mass"] == pytest.approx(mass * 1e6, rel=1e-6)
            assert found["rows"] == 0
    if phases != "prefill":
        assert counts[0]["rows_lifted"] > 0, "the floor had nothing to do"
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


@pytest.mark.parametrize("compensation", [True, False])
def test_pruned_decode_rows_scan_the_sketch_and_nothing_else_does(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig, compensation: bool
) -> None:
    batches, counts = [], []
    for sketch in (True, False):
        engine = Engine(
            monkeypatch,
            vllm_config,
            "both",
            False,
            k_sketch=sketch,
            compensation=compensation,
        )
        batch = Batch(list(range(len(LENS))))
        counts.append(engine.step(batch)[1])
        batches.append(batch)
        assert (engine.impls[0].layout.sketch is not None) is sketch
    scanned, exact = (batch.out for batch in batches)
    assert torch.equal(scanned[1], exact[1]), "a dense layer"
    assert torch.equal(scanned[0][DECODES:], exact[0][DECODES:]), "prompts"
    assert not torch.equal(scanned[0], exact[0])
    # A key at the threshold, or a floor, may be decided otherwise.
    assert ((scanned[0] - exact[0]).abs() > 0.02).double().mean() < 0.01
    for of_sketch, of_keys in zip(*counts, strict=True):
        assert of_sketch["keys_scored"] == of_keys["keys_scored"]
        assert of_sketch["v_rows_read"] == pytest.approx(of_keys["v_rows_read"], rel=0.15)


def test_without_compensation_nobody_writes_or_reads_means(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig
) -> None:
    engine = Engine(monkeypatch, vllm_config, "decode", True, compensation=False)
    batch = Batch([0, 1, CHUNK], RENORMALISE)
    metadata, counts = engine.step(batch)
    check(batch, counts, "decode", metadata)
    assert PageLayout(BLOCK, HEAD_DIM).v_means(batch.cache(engine.impls[0])).isnan().all()


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
    faster, lines = cpu.stock_prompts_are_faster("vec", "native"), []
    assert faster is avx512
    assert cpu.stock_prompts_are_faster("vec", "eager")
    monkeypatch.setattr(cpu.logger, "info_once", lines.append)
    engine = Engine(monkeypatch, vllm_config, "decode", faster)
    metadata, _ = engine.step(Batch([0, CHUNK]))
    assert (metadata.prefill is not None) is avx512
    assert ["CPU_ATTN" in line for line in lines] == [True] * avx512


@pytest.mark.parametrize("phases", ["decode", "prefill"])
def test_dense_decode_rows_run_on_cpu_attn_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig, phases: str
) -> None:
    monkeypatch.setattr(cpu, "stock_decodes_are_faster", lambda packing: True)
    calls = []
    stock = cpu_attn.CPUAttentionBackendImpl.forward

    def count(self: object, layer: object, query: torch.Tensor, *args: object) -> torch.Tensor:
        calls.append(len(query))
        return stock(self, layer, query, *args)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(cpu_attn.CPUAttentionBackendImpl, "forward", count)
    engine = Engine(monkeypatch, vllm_config, phases, False)
    batch = Batch([0, 1, CHUNK])
    metadata, counts = engine.step(batch)
    check(batch, counts, phases, metadata)
    # Of the first layer the short row, of the dense one both.
    assert calls == ([1, 2] if phases == "decode" else [2, 2])


def test_amx_hosts_keep_stock_pages_prompts_and_dense_rows_on_cpu_attn_and_say_so(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig
) -> None:
    assert cpu.stock_prompts_are_faster("amx", "native")
    assert cpu.stock_decodes_are_faster("amx")
    assert not cpu.stock_decodes_are_faster("vec")
    engine, lines = Engine(monkeypatch, vllm_config, "both", True), []
    monkeypatch.setattr(cpu.logger, "info_once", lines.append)
    engine.builder.isa = "amx"
    assert engine.builder.packing == "amx"
    engine.builder._choose_stock_kernels()
    assert engine.builder.stock_decodes
    engine.builder.isa = "vec"  # the processor here need not have AMX
    metadata, counts = engine.step(Batch([0, CHUNK]))
    assert metadata.prompts is None
    assert counts[1] == dict.fromkeys(COLUMNS, 0) | {"dense_prefill": 20 * HEADS * len(NAMES)}
    assert [("CPU_ATTN" in line, "without pruning" in line) for line in lines] == [(True, True)]


def test_ranks_that_share_a_kv_head_count_its_v_rows_once(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig
) -> None:
    batch = Batch([0, CHUNK])
    engine = Engine(monkeypatch, vllm_config, "both", False)
    _, whole = engine.step(batch)
    engine.builder.units = RankHeads(HEADS, KV_HEADS, first_replica=False).units(
        torch.device("cpu")
    )
    _, other = engine.step(batch)
    v_columns = {name for name in COLUMNS if "v_" in name}
    assert len(v_columns) == 4
    for before, after in zip(whole, other, strict=True):
        assert after == before | dict.fromkeys(v_columns, 0)
    assert any(one[name] for one in whole for name in v_columns)


def test_counts_per_head_add_up_to_those_of_the_requests(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig
) -> None:
    engine = Engine(monkeypatch, vllm_config, "decode", True)
    _, counts = engine.step(Batch([0, 1, CHUNK]))
    (heads,) = toptheta_heads(SimpleNamespace(vllm_config=vllm_config))
    assert (heads["layers"], heads["first_head"], heads["rows"]) == ([0, 1], 0, [2, 2])

    def total(name: str) -> int:
        return sum(one[name] for one in counts)

    kept, mass = torch.tensor(heads["kept"]), torch.tensor(heads["kept_mass"])
    assert kept.shape == (2, KV_HEADS)
    assert mass.shape == (2, HEADS)
    assert int(kept.sum()) == total("v_rows_read")
    assert int(torch.tensor(heads["scored"]).sum()) == total("v_rows_scored")
    assert float(mass.sum()) * 1e6 == pytest.approx(total("kept_mass"), abs=4)
    assert (mass[1] == 2).all(), "the dense layer keeps everything"


def test_means_are_updated_in_steps_that_complete_a_group(
    monkeypatch: pytest.MonkeyPatch, vllm_config: VllmConfig
) -> None:
    engine, batch = Engine(monkeypatch, vllm_config, "decode", True), Batch([0, 1])
    updated: list[list[int]] = []
    monkeypatch.setattr(
        cpu_layer,
        "update_side_data",
        lambda cache, layout, slots, target: updated.append(slots.tolist()),
    )
    cache = torch.zeros(4, KV_HEADS, BLOCK, PageLayout(BLOCK, HEAD_DIM).content_elements)
    key = value = torch.zeros(3, KV_HEADS, HEAD_DIM)
    slots = torch.zeros(3, dtype=torch.int64)
    # The same tensor in every step, as a runner may pass it.
    for written in ([5, 40, -1], [GROUP - 1, 41, -1], [33, 42, 3 * GROUP - 1], [34, 43, -1]):
        slots[:] = torch.tensor(written)
        engine.builder.build(0, batch.common())
        for impl in engine.impls:
            impl.do_kv_cache_update(LAYER, key, value, cache, slots)
    assert updated == [[GROUP - 1]] * len(NAMES) + [[3 * GROUP - 1]] * len(NAMES)


@pytest.mark.parametrize(
    ("options", "native", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"k_sketch": True}, False, True),
        ({"k_sketch": False}, True, False),
        ({"phases": "prefill"}, True, False),
    ],
)
def test_pages_hold_the_sketch_where_the_native_kernels_scan_it(
    options: dict[str, Any], native: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Availability("native", None) if native else Availability("eager", "none here")
    monkeypatch.setattr(sidecar, "available_target", lambda: found)
    assert sidecar.sketches_keys(TopThetaConfig.model_validate(options)) is expected
