"""The GPU backend on the CPU: real builder, layer and kernels (interpreted) under a stubbed vLLM
configuration.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")
pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

import torch  # noqa: E402
from prefill_cases import v_tiles  # noqa: E402
from tables import flat_table  # noqa: E402
from threshold_fixtures import make_identity  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton_cases import Case  # noqa: E402
from triton_interpreter import needs_interpreter  # noqa: E402
from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.v1.attention.backend import (  # noqa: E402
    AttentionCGSupport,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402
from vllm.v1.kv_cache_layout import KVCacheLayout  # noqa: E402

from vllm_toptheta.backend import gpu, gpu_tensors, step  # noqa: E402
from vllm_toptheta.backend.dial import Dial  # noqa: E402
from vllm_toptheta.backend.gpu import (  # noqa: E402
    TopThetaGPUBackend,
    TopThetaGPUImpl,
    TopThetaGPUMetadataBuilder,
)
from vllm_toptheta.backend.plan import Plan  # noqa: E402
from vllm_toptheta.backend.prompts import plan_prompts  # noqa: E402
from vllm_toptheta.config import TopThetaConfig  # noqa: E402
from vllm_toptheta.kernels.reference import (  # noqa: E402
    attention_scores,
    attention_weights,
    select_by_theta,
    weighted_values,
)
from vllm_toptheta.kernels.triton_counts import COLUMNS  # noqa: E402
from vllm_toptheta.request_options import RequestOptions  # noqa: E402
from vllm_toptheta.telemetry.counters import FIELDS  # noqa: E402

pytestmark = needs_interpreter

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 64, 16
THETA = 1.5
NAMES = [
    "model.layers.0.self_attn.attn",
    "model.layers.1.self_attn.attn",
    "model.layers.2.self_attn.attn",
]
WINDOW = 40
LAYER = SimpleNamespace(_k_scale=torch.ones(1), _v_scale=torch.ones(1))


@pytest.fixture(autouse=True)
def single_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tensors, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(step, "get_tp_group", lambda: SimpleNamespace(world_size=1))
    monkeypatch.setattr(
        "vllm.v1.attention.backends.triton_attn.get_num_attention_heads_from_layers",
        lambda config, names: HEADS,
    )


def options(**changes: Any) -> dict[str, Any]:
    return {"toptheta": {"k": 16, "min_kv_len": 20, "layers": {"2": {"dense": True}}} | changes}


def make_impl(
    monkeypatch: pytest.MonkeyPatch, additional: dict[str, Any], **kwargs: Any
) -> TopThetaGPUImpl:
    monkeypatch.setattr(
        gpu, "get_current_vllm_config", lambda: SimpleNamespace(additional_config=additional)
    )
    fields = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
    return TopThetaGPUImpl(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, **(fields | kwargs))


def make_builder(
    monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[TopThetaGPUMetadataBuilder, list[TopThetaGPUImpl]]:
    additional = options(**changes)
    monkeypatch.setattr(gpu, "install_on_worker", lambda *args, **kwargs: None)
    impls = [make_impl(monkeypatch, additional, sliding_window=w) for w in (None, WINDOW, None)]
    layers = {name: SimpleNamespace(impl=impl) for name, impl in zip(NAMES, impls, strict=True)}
    monkeypatch.setattr(gpu, "get_layers_from_vllm_config", lambda *args: layers)
    table = flat_table(
        make_identity(num_hidden_layers=3, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS),
        THETA,
    )
    plan = Plan(TopThetaConfig.from_additional_config(additional), table, Path("table"))
    monkeypatch.setattr(gpu.Plan, "from_vllm_config", lambda config: plan)
    vllm_config = SimpleNamespace(
        model_config=SimpleNamespace(
            get_num_attention_heads=lambda parallel: HEADS,
            get_num_kv_heads=lambda parallel: KV_HEADS,
            get_head_size=lambda: HEAD_DIM,
            rswa_window=None,
        ),
        parallel_config=None,
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, cudagraph_capture_sizes=[1, 2, 4, 8]
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=6),
        speculative_config=None,
        use_v2_model_runner=True,
    )
    spec = TopThetaGPUBackend.customize_spec(
        FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=torch.bfloat16
        )
    )
    builder = TopThetaGPUMetadataBuilder(spec, NAMES, vllm_config, torch.device("cpu"))
    return builder, impls


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


def named_totals(counts: step.GPUStepCounts) -> list[dict[str, int]]:
    rows = counts.totals().view(-1, len(FIELDS)).tolist()
    return [dict(zip(FIELDS, row, strict=True)) for row in rows]


def expected_case(batch: Batch, layer: int, dense: tuple[int, ...] = ()) -> Case:
    case = batch.case
    case.window = WINDOW if layer == 1 else None
    spans = [min(n, case.window or n) for n in case.lens]
    short = [n <= 20 for n in spans]
    case.dense = torch.tensor([layer == 2 or s or i in dense for i, s in enumerate(short)]).to(
        torch.int8
    )
    return case


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """vLLM's own kernels replaced: the cache is written already, and prompt rows are noted and
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
    slots = batch.case.slots()
    key = torch.empty(len(slots), KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    impl.do_kv_cache_update(LAYER, key, key, batch.kv_cache, slots)
    output = torch.full_like(query, torch.nan)
    return impl.forward(LAYER, query, key, key, batch.kv_cache, metadata, output)


def test_mixed_batches_are_split(
    monkeypatch: pytest.MonkeyPatch, stock: list[dict[str, Any]]
) -> None:
    builder, impls = make_builder(monkeypatch)
    batch = Batch([70, 33, 15, 40], [1, 1, 1, 5])
    metadata = builder.build(0, batch.common())
    query = torch.cat([batch.case.query[:3], torch.randn(5, HEADS, HEAD_DIM).bfloat16()])
    for layer, impl in enumerate(impls):
        output = run_layer(impl, batch, metadata, query)
        out, num_kept, v_rows_read, _ = expected_case(batch, layer).expected()
        torch.testing.assert_close(output[:3].double(), out[:3], rtol=0, atol=0.03)
        assert torch.equal(builder.tensors.num_kept[layer, :3], num_kept[:3])
        assert torch.equal(builder.tensors.v_rows_read[layer, :3], v_rows_read[:3])
        assert (output[3:] == 7).all()
    assert builder.tensors.num_kept[0, 0].max() < 30, "nothing was pruned"
    rest = stock[0]["metadata"]
    assert torch.equal(stock[0]["query"], query[3:])
    assert rest.num_actual_tokens == 5
    assert rest.query_start_loc.tolist() == [0, 5]
    assert rest.seq_lens.tolist() == [40]
    assert torch.equal(rest.block_table, batch.case.block_table[3:])


def test_totals_count_every_row_once(
    monkeypatch: pytest.MonkeyPatch, stock: list[dict[str, Any]]
) -> None:
    builder, impls = make_builder(monkeypatch)
    batch = Batch([70, 33, 15, 50, 40], [1, 1, 1, 1, 5], [False, False, False, True, True])
    gpu.STEP_LOG.begin(object(), [], [])
    metadata = builder.build(0, batch.common())
    (counts,) = gpu.STEP_LOG.end()
    query = torch.cat([batch.case.query[:4], torch.randn(5, HEADS, HEAD_DIM).bfloat16()])
    kept, rows = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    for layer, impl in enumerate(impls):
        run_layer(impl, batch, metadata, query)
        _, num_kept, v_rows_read, _ = expected_case(batch, layer, dense=(3,)).expected()
        kept += num_kept[:4].sum(1)
        rows += v_rows_read[:4].sum(1)
    totals = named_totals(counts)
    for seq, visible in enumerate([70 + 40 + 70, 33 * 3, 15 * 3]):
        assert totals[seq]["rows"] == 3 * HEADS
        assert totals[seq]["keys_scored"] == visible * HEADS
        assert totals[seq]["v_rows_scored"] == visible * KV_HEADS
        assert totals[seq]["keys_kept"] == kept[seq]
        assert totals[seq]["v_rows_read"] == rows[seq]
        assert totals[seq]["dense_layer"] == HEADS
        assert totals[seq]["dense_short"] == (2 * HEADS if seq == 2 else 0)
        assert totals[seq]["dense_prefill"] == 0
    assert totals[3] == dict.fromkeys(FIELDS, 0) | {"dense_prefill": 3 * HEADS}
    assert totals[4] == dict.fromkeys(FIELDS, 0) | {"dense_prefill": 5 * 3 * HEADS}
    for name in FIELDS:
        by_request, by_layer = totals[:5], totals[5:]
        assert sum(row[name] for row in by_request) == sum(row[name] for row in by_layer)


def test_totals_are_summed_over_ranks_on_the_device(
    monkeypatch: pytest.MonkeyPatch, stock: list[dict[str, Any]]
) -> None:
    builder, _ = make_builder(monkeypatch)
    gpu.STEP_LOG.begin(object(), [], [])
    builder.build(0, Batch([70, 40], [1, 5]).common())
    (counts,) = gpu.STEP_LOG.end()
    alone = counts.totals()
    group = SimpleNamespace(world_size=2, device_group="devices")
    monkeypatch.setattr(step, "get_tp_group", lambda: group)

    def all_reduce(tensor: torch.Tensor, group: str) -> None:
        assert group == "devices"
        tensor.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    assert torch.equal(counts.totals(), 2 * alone)
    assert alone.any()


def test_totals_are_few_launches_and_never_wait_for_the_device(
    monkeypatch: pytest.MonkeyPatch, stock: list[dict[str, Any]]
) -> None:
    builder, _ = make_builder(monkeypatch)
    gpu.STEP_LOG.begin(object(), [], [])
    builder.build(0, Batch([70, 40], [1, 5]).common())
    (counts,) = gpu.STEP_LOG.end()
    counted = []
    monkeypatch.setattr(step, "count_step", lambda *args, **kwargs: counted.append(args))
    ran = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            ran.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        counts.totals()
    views = {"view", "_unsafe_view", "select", "slice"}
    assert [name for name in ran if name not in views] == ["zeros", "sum", "sum", "cat"]
    assert len(counted) == 1


def test_columns_are_written_in_the_order_they_travel_in() -> None:
    assert COLUMNS == FIELDS


def test_requests_choose_their_k(
    monkeypatch: pytest.MonkeyPatch, stock: list[dict[str, Any]]
) -> None:
    builder, impls = make_builder(monkeypatch, layers={"1": {"k": 128}})
    batch = Batch([70, 70, 70], [1, 1, 1])
    asked = {1: RequestOptions(k=128, layers=True), 2: RequestOptions(pruning=False)}
    monkeypatch.setattr(gpu, "row_options", lambda cam: asked)
    gpu.STEP_LOG.begin(object(), [], [])
    metadata = builder.build(0, batch.common())
    (counts,) = gpu.STEP_LOG.end()
    assert builder.tensors.row_wishes[0, :3].tolist() == [16, 128, 16]
    assert builder.tensors.row_wishes[1, :3].tolist() == [0, 0.5, 0]
    run_layer(impls[0], batch, metadata, batch.case.query)
    assert builder.tensors.num_kept[0, 0].max() < 70
    assert builder.tensors.num_kept[0, 2].tolist() == [70] * HEADS, "switched off"
    totals = named_totals(counts)
    # Layer 1 fixes its own k of 128, which is more than these rows see.
    assert [row["dense_off"] for row in totals[:3]] == [0, 0, 3 * HEADS]
    assert totals[0]["keys_target"] == 2 * 16 * HEADS
    assert counts.detail == [1]
    detail = totals[6:]
    assert len(detail) == 3
    assert sum(row["rows"] for row in detail) == totals[1]["rows"] == 3 * HEADS
    monkeypatch.setattr(gpu, "row_options", lambda cam: {})
    builder.build(0, batch.common())
    assert builder.tensors.row_wishes[0, :3].tolist() == [16, 16, 16]
    assert not builder.tensors.row_wishes[2].any()


PROMPTS = {"lens": [70, 65, 90, 60], "queries": [1, 1, 30, 9]}
PREFILLING = [False, True, True, True]


def expected_prompt(
    batch: Batch, layer: int, seq: int, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, num_kept and v_tiles_read of a request's rows in float64."""
    case, window = batch.case, WINDOW if layer == 1 else None
    ends = torch.arange(case.lens[seq] - len(query), case.lens[seq]) + 1
    scores = attention_scores(
        query.double(), case.keys[seq], ends, sm_scale=case.sm_scale, window=window
    )
    dense = (ends.clamp(max=window or 10**6) <= 20) | (layer == 2)
    theta = torch.full((HEADS, len(query)), THETA, dtype=torch.float64)
    kept = select_by_theta(scores, theta.masked_fill(dense, -torch.inf))
    weights = attention_weights(scores, kept, group_size=16)
    out = weighted_values(weights, case.values[seq])
    return out, kept.sum(-1).T.int(), v_tiles(kept, KV_HEADS)


@pytest.mark.parametrize("phases", ["prefill", "both"])
def test_prompts_are_pruned_where_the_phases_say_so(
    monkeypatch: pytest.MonkeyPatch, stock: list[dict[str, Any]], phases: str
) -> None:
    builder, impls = make_builder(monkeypatch, phases=phases)
    batch = Batch(PROMPTS["lens"], PROMPTS["queries"], PREFILLING)
    gpu.STEP_LOG.begin(object(), [], [])
    metadata = builder.build(0, batch.common())
    (counts,) = gpu.STEP_LOG.end()
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(41, HEADS, HEAD_DIM, generator=generator).mul(2).bfloat16()
    starts, sums = [0, 1, 2, 32, 41], torch.zeros(4, 2, dtype=torch.int64)
    for layer, impl in enumerate(impls):
        output = run_layer(impl, batch, metadata, query)
        for seq in range(4):
            rows = slice(starts[seq], starts[seq + 1])
            out, num_kept, tiles = expected_prompt(batch, layer, seq, query[rows])
            if seq == 0 and phases == "prefill":
                num_kept = torch.full((1, HEADS), WINDOW if layer == 1 else 70)
            else:
                torch.testing.assert_close(output[rows].double(), out, rtol=0, atol=0.03)
            sums[seq] += torch.stack([num_kept.sum(), tiles.sum()])
            if seq >= 2:
                ours = slice(rows.start - 2, rows.stop - 2)
                assert torch.equal(metadata.prompts.num_kept[layer, ours], num_kept)
                assert torch.equal(metadata.prompts.v_tiles_read[layer, ours], tiles)
    assert not stock, "vLLM's kernel ran"
    totals = named_totals(counts)
    generated = totals[0]
    assert generated["rows"] == 3 * HEADS
    assert generated["keys_kept"] == sums[0, 0]
    assert generated["dense_layer"] == (3 if phases == "prefill" else 1) * HEADS
    assert generated["dense_off"] == generated["dense_prefill"] == generated["prefill_rows"] == 0
    for seq, tokens in ((1, 1), (2, 30), (3, 9)):
        assert totals[seq]["rows"] == 0
        assert totals[seq]["prefill_rows"] == 3 * HEADS * tokens
        assert totals[seq]["prefill_keys_kept"] == sums[seq, 0]
    # Single tokens take the decode kernel, which counts V rows.
    assert totals[1]["prefill_v_tiles"] == totals[1]["prefill_v_tiles_read"] == 0
    assert totals[1]["prefill_keys_scored"] == (65 + 40 + 65) * HEADS
    for name in FIELDS:
        assert sum(row[name] for row in totals[:4]) == sum(row[name] for row in totals[4:])


def test_prompts_are_planned_and_counted_as_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, stock: list[dict[str, Any]]
) -> None:
    builder, _ = make_builder(monkeypatch, phases="both", prefill_k=32, layers={"2": {"k": 128}})
    table = builder.plan.table
    table.theta[0], table.theta[1] = -4.0, -8.0
    table.slope.fill_(0.5)
    builder.tensors._allocate_layers([0, 1, 2], [None, WINDOW, None])
    batch = Batch([90, 60, 50], [30, 9, 2])
    asked = {1: RequestOptions(k=512), 2: RequestOptions(pruning=False)}
    monkeypatch.setattr(gpu, "row_options", lambda cam: asked)
    gpu.STEP_LOG.begin(object(), [], [])
    metadata = builder.build(0, batch.common())
    (counts,) = gpu.STEP_LOG.end()
    ours, common = metadata.prompts, batch.common()
    theirs = plan_prompts(
        Dial(builder.plan, [0, 1, 2], [None, WINDOW, None], 0, HEADS),
        builder.plan.config.prefill_k,
        common.block_table_tensor,
        common.query_start_loc_cpu,
        common.seq_lens,
        asked,
        HEADS,
        KV_HEADS,
    )
    assert torch.equal(ours.dense.bool(), theirs.dense)
    assert theirs.dense.any()
    assert not theirs.dense.all()
    pruned = ~theirs.dense
    torch.testing.assert_close(ours.theta[pruned], theirs.theta[pruned], rtol=1e-5, atol=1e-4)
    generator = torch.Generator().manual_seed(0)
    for name, most in (("num_kept", 60), ("v_tiles_read", 3)):
        tensor = getattr(ours, name)
        tensor.copy_(torch.randint(1, most, tensor.shape, generator=generator))
        getattr(theirs, name).copy_(tensor)
    expected = theirs.counts()
    for seq, row in enumerate(named_totals(counts)[:3]):
        found = {name: row[name] for name in expected}
        assert found == {name: int(values[:, seq].sum()) for name, values in expected.items()}


def test_a_single_prompt_token_runs_dense(
    monkeypatch: pytest.MonkeyPatch, stock: list[dict[str, Any]]
) -> None:
    builder, impls = make_builder(monkeypatch)
    batch = Batch([70, 70], [1, 1], [False, True])
    metadata = builder.build(0, batch.common())
    run_layer(impls[0], batch, metadata, batch.case.query)
    assert builder.tensors.num_kept[0, 1].tolist() == [70] * HEADS
    assert builder.tensors.num_kept[0, 0].max() < 70
    # The next step has no prompt row: the mark is gone.
    metadata = builder.build(0, Batch([70, 70], [1, 1]).common())
    run_layer(impls[0], batch, metadata, batch.case.query)
    assert builder.tensors.num_kept[0, 1].max() < 70


class Launches:
    """Stands in for a jit function; keeps what a captured graph would freeze."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            frozen = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
            self.calls.append((grid, frozen, kwargs))

        return launch


def test_a_replayed_graph_sees_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between capture and replay only the contents of tensors may change, never an argument of a
    launch.
    """
    from vllm_toptheta.kernels import triton_decode

    builder, impls = make_builder(monkeypatch)
    capture = Batch([70, 33, 1, 1], [1, 1, 1, 1])
    common = capture.common()
    records = []
    for lens, prefilling in ([None, None], [[5, 64, 0, 0], [True, False, False, False]]):
        split, merge = Launches(), Launches()
        monkeypatch.setattr(triton_decode, "_split_kernel", split)
        monkeypatch.setattr(triton_decode, "_merge_kernel", merge)
        if lens is None:
            metadata = builder.build_for_cudagraph_capture(common)
            assert common.seq_lens.tolist() == [1] * 4
            theta_at_capture = builder.tensors.theta.clone()
        else:
            common.seq_lens.copy_(torch.tensor(lens))
            common.is_prefilling = torch.tensor(prefilling)
            metadata = builder.build(0, common)
        query, output = (
            capture.case.query,
            records[0][2] if records else torch.empty_like(capture.case.query),
        )
        impls[0].forward(LAYER, query, None, None, capture.kv_cache, metadata, output)
        records.append((split.calls, merge.calls, output))
    assert records[0][0] == records[1][0]
    assert records[0][1] == records[1][1]
    assert builder.tensors.dense[0, :4].tolist() == [4, 0, 1, 1]
    assert theta_at_capture.shape == builder.tensors.theta.shape


def test_padding_of_a_captured_batch_yields_zeros(
    monkeypatch: pytest.MonkeyPatch, stock: list[dict[str, Any]]
) -> None:
    builder, impls = make_builder(monkeypatch)
    batch = Batch([70, 33, 0, 0], [1, 1, 0, 0])
    common = batch.common()
    common.num_actual_tokens = 4
    metadata = builder.build(0, common)
    output = run_layer(impls[0], batch, metadata, batch.case.query)
    assert (output[2:] == 0).all()
    assert not stock
    counts = step.GPUStepCounts(
        tensors=builder.tensors,
        num_rows=4,
        prompts=None,
        query_start_loc=common.query_start_loc,
        seq_lens=common.seq_lens,
        num_layers=3,
        detail=[],
    )
    assert named_totals(counts)[2:4] == [dict.fromkeys(FIELDS, 0)] * 2


@pytest.mark.parametrize("phases", ["decode", "both"])
def test_graphs_of_longer_queries_are_refused(monkeypatch: pytest.MonkeyPatch, phases: str) -> None:
    builder, _ = make_builder(monkeypatch, phases=phases)
    with pytest.raises(RuntimeError, match="FULL_DECODE_ONLY"):
        builder.build_for_cudagraph_capture(Batch([70, 33], [1, 3]).common())


def test_splits_and_scratch_cover_every_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_device_limits", lambda device: ("", 132, 227 << 10))
    builder, _ = make_builder(monkeypatch)
    assert builder.tensors.max_rows == 8, "the largest captured batch is larger than max_num_seqs"
    parts = [n * builder.tensors.num_splits(n) for n in range(1, 9)]
    assert builder.tensors.num_splits(1) == 64
    assert max(parts) == builder.tensors.scratch.num_parts
    assert (
        builder.get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    assert builder.reorder_batch_threshold == 1
    assert builder.supports_draft_decode_metadata_update is False


def test_level_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    builder, _ = make_builder(monkeypatch, layers={"1": {"k": 128}})
    assert builder.tensors.level_of(16) == 0
    assert builder.tensors.level_of(1024) == 1
    assert builder.tensors.level_of(128) == pytest.approx(0.5)
    assert builder.tensors.layers.k.tolist() == [0, 128, 0]
    assert builder.tensors.layers.level.tolist() == [0, 0.5, 0]


def test_what_the_kernels_lack_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="ALiBi"):
        make_impl(monkeypatch, options(), alibi_slopes=[1.0] * HEADS)
    with pytest.raises(ValueError, match="chunked attention"):
        make_impl(monkeypatch, options(), chunk_lookback=1)
    monkeypatch.setattr(gpu, "_device_limits", lambda device: ("", 304, 4 << 10))
    with pytest.raises(ValueError, match="choose a smaller group_size"):
        make_builder(monkeypatch)


def test_capability_flags_are_honest(monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "use_mla": False,
        "has_sink": True,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": None,
        "attn_type": "decoder",
        "has_sliding_window": True,
    }
    assert "need CUDA or ROCm" in TopThetaGPUBackend.validate_configuration(**fields)[0]
    monkeypatch.setattr(
        gpu, "current_platform", SimpleNamespace(is_cuda=lambda: True, is_rocm=lambda: False)
    )
    assert TopThetaGPUBackend.validate_configuration(**fields) == []
    for change in (
        {"head_size": 48},
        {"head_size": 576},
        {"dtype": torch.float32},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"kv_cache_dtype": "int8_per_token_head"},
        {"block_size": 8},
        {"use_mla": True},
        {"use_mm_prefix": True},
        {"attn_type": "encoder_decoder"},
        {"use_non_causal": True},
        {"use_batch_invariant": True},
        {"use_kv_connector": True},
        {"use_rswa": True},
        {"use_dcp": True},
        {"use_pcp": True},
        {"use_adaptive_verification": True},
        {"device_capability": (7, 5)},
    ):
        assert TopThetaGPUBackend.validate_configuration(**(fields | change)), change
    assert KVCacheLayout.LHBNC not in TopThetaGPUBackend.supported_kv_cache_layouts()


def test_the_platform_chooses_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_toptheta.backend import registration

    assert registration.backend_path() == registration.CPU_BACKEND_PATH
    monkeypatch.setattr(vllm.platforms, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    assert resolve_obj_by_qualname(registration.backend_path()) is TopThetaGPUBackend
