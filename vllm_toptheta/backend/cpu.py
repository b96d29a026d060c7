"""The CPU backend: vLLM's attention calls in, decode and prompt rows through our kernels.

By default only tokens that a request generates are pruned: prompt tokens, also a single one left
over by the prefix cache, take the prefill kernel's dense path; with `phases` "prefill" or "both"
they are pruned. Either way a prompt's KV does not depend on how it was chunked or cached. Where
vLLM's own kernel is faster, steps whose prompts are not pruned run on that instead, and so do
decode rows that keep everything.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import CpuArchEnum, current_platform
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_toptheta.backend.cpu_step import DecodeStep, StepCounts, StockRows
from vllm_toptheta.backend.dial import Dial, rest_of_batch, row_options, single_rows_of_batch
from vllm_toptheta.backend.heads import publish_heads
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.backend.prompts import PromptRows, dense_prompts, plan_prompts
from vllm_toptheta.backend.registration import NAME
from vllm_toptheta.backend.sidecar import check_page, enlarge_page, kernel_block_size
from vllm_toptheta.kernels.layout import MAX_BLOCK_SIZE, Packing, PageLayout
from vllm_toptheta.kernels.ops import (
    Target,
    available_target,
    decode_attention,
    prefill_attention,
    update_v_means,
)
from vllm_toptheta.request_options import RequestOptions
from vllm_toptheta.telemetry.carrier import install_on_worker
from vllm_toptheta.telemetry.step_log import STEP_LOG

logger = init_logger("vllm.toptheta.cpu")


class TopThetaCPUBackend(CPUAttentionBackend):
    """Top-theta attention on vLLM's paged CPU cache."""

    supported_kv_cache_dtypes = ["auto"]

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type["TopThetaCPUImpl"]:
        return TopThetaCPUImpl

    @staticmethod
    def get_builder_cls() -> type["TopThetaCPUMetadataBuilder"]:
        return TopThetaCPUMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        if kv_cache_spec is None or kv_cache_spec.block_size <= MAX_BLOCK_SIZE:
            return CPUAttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec)
        return [kernel_block_size(kv_cache_spec.block_size)]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return enlarge_page(spec)

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        if not current_platform.is_cpu():
            return [f"toptheta's CPU backend does not serve on {current_platform.device_name}"]
        reasons: list[str] = super().validate_configuration(*args, **kwargs)
        if current_platform.get_cpu_architecture() != CpuArchEnum.X86:
            reasons.append("the CPU cache layout is known on x86-64 only")
        return reasons


@dataclass
class TopThetaCPUMetadata:
    """One step's attention metadata for the layers of one builder.

    Attributes:
        num_actual_tokens: tokens of the batch; decode rows first.
        decode: the decode rows, or None.
        prefill: CPU_ATTN's metadata of the remaining rows, where our kernel does not take them, or
            None.
        prompts: the remaining rows, where they run on our kernel, or None.
    """

    num_actual_tokens: int
    decode: DecodeStep | None
    prefill: CPUAttentionMetadata | None
    prompts: PromptRows | None = None


class GroupEnds:
    """Which slots of a step complete a token group: found once for all layers of a builder, because
    a generated token completes one in 64 steps or so."""

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size
        self._slots: torch.Tensor | None = None
        self._ends: torch.Tensor | None = None

    def forget(self) -> None:
        """Another step begins, which may pass the same tensor with other slots."""
        self._slots = None

    def of(self, slot_mapping: torch.Tensor) -> torch.Tensor | None:
        """Those of the slots that end a group; None where none does.

        Args:
            slot_mapping: [num_tokens] int64, block * block_size + offset; negative entries are
                padding.
        """
        if slot_mapping is not self._slots:
            slots = slot_mapping.numpy()
            ends = slots[(slots % self._group_size == self._group_size - 1) & (slots >= 0)]
            self._ends = torch.from_numpy(ends) if len(ends) else None
            self._slots = slot_mapping
        return self._ends


class TopThetaCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits a batch into decode rows and the rest, and looks up the thresholds of the decode
    rows."""

    reorder_batch_threshold = 1
    isa: str

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.plan = Plan.from_vllm_config(vllm_config)
        layout = PageLayout(self.block_size, self.head_dim, self.packing)
        check_page(kv_cache_spec, layout)
        attention = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        impls = [attention[name].impl for name in layer_names]
        self.num_layers = len(layer_names)
        layers = [self.plan.layer_index(name) for name in layer_names]
        first_head = get_tensor_model_parallel_rank() * self.num_heads
        windows = [impl.window for impl in impls]
        self.dial = Dial(self.plan, layers, windows, first_head, self.num_heads)
        self.group_ends = GroupEnds(layout.group_size) if self.plan.needs_means else None
        for slot, impl in enumerate(impls):
            impl.bind(slot, layout, self.dial.weights[slot], self.group_ends)
        self._choose_stock_kernels()
        of_model = self.plan.identity
        self.first_replica = first_head % (of_model.num_heads // of_model.num_kv_heads) == 0
        self.heads = publish_heads(layers, first_head, self.num_heads, self.num_kv_heads)
        install_on_worker(vllm_config, count=self.plan.config.telemetry)

    @property
    def packing(self) -> Packing:
        """How K and V lie in the pages: as stock's kernels want them."""
        return "amx" if self.isa == "amx" else "vec"

    def _choose_stock_kernels(self) -> None:
        """Decide what vLLM's kernels run here: prompts that ours neither prunes nor runs faster,
        and dense decode rows."""
        self.stock_decodes = stock_decodes_are_faster(self.packing)
        self.prunes_prompts = self.plan.targets.prefill is not None and self.packing != "amx"
        self.stock_prompts = stock_prompts_are_faster(self.packing, available_target().target)
        if self.plan.targets.prefill is not None and not self.prunes_prompts:
            logger.info_once(
                "toptheta: prompts run on vLLM's CPU_ATTN without pruning, which is faster here "
                "than pruning them"
            )
        elif self.stock_prompts:
            logger.info_once(
                "toptheta: prompts that are not pruned run on vLLM's CPU_ATTN, which is faster "
                "here than our dense kernel"
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TopThetaCPUMetadata:
        cam = common_attn_metadata
        if self.group_ends is not None:
            self.group_ends.forget()
        num_decodes, num_prefills, _, _ = split_decodes_and_prefills(
            cam, decode_threshold=1, treat_short_extends_as_decodes=False
        )
        query_lens = cam.query_start_loc_cpu.diff().to(torch.int64)
        options = row_options(cam)
        counts = StepCounts(
            decode=None,
            rows=None,
            prompts=None,
            prefill_lens=query_lens,
            layers=self.dial.layers,
            num_layers=self.plan.identity.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            first_replica=self.first_replica,
            detail=[row for row, asked in options.items() if asked.layers],
            heads=self.heads,
        )
        if num_decodes:
            query_lens[:num_decodes] = 0
            self._plan_decodes(cam, num_decodes, options, counts)
        prompts: PromptRows | None = None
        prefill = None
        if num_prefills:
            rest, rest_options = rest_of_batch(cam, options, num_decodes)
            if self.prunes_prompts:
                prompts = counts.prompts = plan_prompts(
                    self.dial,
                    rest.block_table_tensor,
                    rest.query_start_loc_cpu,
                    rest.seq_lens,
                    rest_options,
                    self.num_heads,
                )
                if self.stock_prompts and counts.prompts.dense.all():
                    counts.prompts.keep_all()
                    prompts = None
            elif not self.stock_prompts:
                prompts = dense_prompts(rest, self.num_layers, self.num_heads, self.num_kv_heads)
            if prompts is None:
                prefill = super().build(common_prefix_len, rest, fast_build)
        STEP_LOG.append(counts)
        return TopThetaCPUMetadata(cam.num_actual_tokens, counts.decode, prefill, prompts)

    def _plan_decodes(
        self,
        cam: CommonAttentionMetadata,
        num_decodes: int,
        options: dict[int, RequestOptions],
        counts: StepCounts,
    ) -> None:
        seq_lens = cam.seq_lens[:num_decodes]
        rows = counts.rows = self.dial.plan(seq_lens, options)
        per_kv_head = rows.log_min_prob.shape
        counts.decode = DecodeStep(
            num_decodes=num_decodes,
            block_table=cam.block_table_tensor[:num_decodes],
            seq_lens=seq_lens,
            log_min_prob=rows.log_min_prob,
            min_mass=rows.min_mass,
            dense=rows.dense,
            num_kept=torch.empty(per_kv_head, dtype=torch.int32),
            kept_mass=torch.empty((*per_kv_head[:2], self.num_heads)),
            lifts=torch.empty(per_kv_head, dtype=torch.int32),
            stock=[None] * self.num_layers,
        )
        if self.stock_decodes and rows.dense.any():
            self._give_to_stock(cam, counts.decode)

    def _give_to_stock(self, cam: CommonAttentionMetadata, decode: DecodeStep) -> None:
        """Let CPU_ATTN run the rows that are dense."""
        masks, which = decode.dense.unique(dim=0, return_inverse=True)
        of_mask: list[StockRows | None] = []
        for mask in masks:
            rows = mask.nonzero().flatten()
            if not len(rows):
                of_mask.append(None)
                continue
            metadata = super().build(0, single_rows_of_batch(cam, rows))
            others = decode.seq_lens.masked_fill(mask, 0)
            of_mask.append(StockRows(None if mask.all() else rows, metadata, others))
        decode.stock = [of_mask[i] for i in which.tolist()]
        decode.kept_mass.fill_(1)
        decode.lifts.zero_()


class TopThetaCPUImpl(CPUAttentionBackendImpl):
    """One attention layer on our kernels, and on CPU_ATTN for prompts that it runs faster."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_heads, head_size, scale, num_kv_heads, alibi_slopes, *args, **kwargs)
        if alibi_slopes is not None:
            raise ValueError(
                "toptheta does not support ALiBi: its kernels know scores without a position bias "
                "only. Serve this model with another --attention-backend"
            )
        self.head_dim = head_size
        self.sm_scale = self.scale
        self.window = None if self.sliding_window == -1 else self.sliding_window
        self.soft_cap = self.logits_soft_cap or None
        self.target, why_not_native = available_target()
        if why_not_native:
            logger.warning_once(
                "toptheta: running the eager path, which is much slower than stock vLLM: %s",
                why_not_native,
            )

    def bind(
        self, slot: int, layout: PageLayout, weights: torch.Tensor, group_ends: GroupEnds | None
    ) -> None:
        """Tell the layer what it runs with; called once the cache layout is known.

        Args:
            slot: its place in the builder's tensors.
            layout: of its pages.
            weights: [num_heads, NUM_WEIGHTS] float32, of the compensation.
            group_ends: of its builder; None where no kernel reads V means.
        """
        self.slot = slot
        self.layout = layout
        self.weights = weights
        self.group_ends = group_ends

    def _kv_only(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """vLLM's own view of the cache: the pages without their side data."""
        num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
        width = 2 * self.head_dim
        strides = (kv_cache.stride(0), kv_cache.stride(1), width, 1)
        return kv_cache.as_strided((num_blocks, num_kv_heads, block_size, width), strides)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        super().do_kv_cache_update(layer, key, value, self._kv_only(kv_cache), slot_mapping)
        if self.group_ends is not None:
            ends = self.group_ends.of(slot_mapping)
            if ends is not None:
                update_v_means(kv_cache, self.layout, ends, target=self.target)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TopThetaCPUMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # profiling run
            return output
        # Converted anew each time: weights may be loaded again.
        sinks = None if self.sinks is None else self.sinks.float()
        num_decodes = 0
        if (decode := attn_metadata.decode) is not None:
            num_decodes = decode.num_decodes
            self._decode(layer, query[:num_decodes], kv_cache, decode, sinks, output[:num_decodes])
        if (prompts := attn_metadata.prompts) is not None:
            rest = slice(num_decodes, attn_metadata.num_actual_tokens)
            prefill_attention(
                query[rest],
                kv_cache,
                self.layout,
                prompts.block_table,
                prompts.query_start_loc,
                prompts.seq_lens,
                prompts.log_min_prob[self.slot],
                sm_scale=self.sm_scale,
                dense=prompts.dense[self.slot],
                window=self.window,
                soft_cap=self.soft_cap,
                sinks=sinks,
                out=output[rest],
                num_kept=prompts.num_kept[self.slot],
                v_tiles_read=prompts.v_tiles_read[self.slot],
                kept_mass=prompts.kept_mass[self.slot],
                target=self.target,
            )
        if attn_metadata.prefill is not None:
            rest = slice(num_decodes, attn_metadata.num_actual_tokens)
            self._stock(layer, query[rest], kv_cache, attn_metadata.prefill, output[rest])
        return output

    def _decode(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        decode: DecodeStep,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        stock = decode.stock[self.slot]
        if stock is not None and stock.rows is None:
            self._stock(layer, query, kv_cache, stock.metadata, out)
            return
        log_min_prob, dense, num_kept, kept_mass, lifts = decode.of_layer[self.slot]
        decode_attention(
            query,
            kv_cache,
            self.layout,
            decode.block_table,
            decode.seq_lens if stock is None else stock.others,
            log_min_prob,
            decode.min_mass,
            sm_scale=self.sm_scale,
            dense=dense,
            weights=self.weights,
            window=self.window,
            soft_cap=self.soft_cap,
            sinks=sinks,
            out=out,
            num_kept=num_kept,
            kept_mass=kept_mass,
            lifts=lifts,
            target=self.target,
        )
        if stock is not None:
            some = torch.empty_like(out[stock.rows])
            self._stock(layer, query[stock.rows], kv_cache, stock.metadata, some)
            out[stock.rows] = some

    def _stock(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: CPUAttentionMetadata,
        out: torch.Tensor,
    ) -> None:
        """CPU_ATTN; it takes keys and values from the cache."""
        super().forward(layer, query, None, None, self._kv_only(kv_cache), metadata, out)


def stock_decodes_are_faster(packing: Packing) -> bool:
    """Whether CPU_ATTN runs decode rows that are not pruned faster than our kernel.

    It does where it uses AMX; elsewhere ours is faster (docs/measured.md).

    Args:
        packing: of the pages.
    """
    return packing == "amx"


def stock_prompts_are_faster(packing: Packing, target: Target) -> bool:
    """Whether CPU_ATTN runs prompts that are not pruned faster than our dense kernel.

    It does with AVX-512 (measured on Zen 5: up to 1.2x), more so with AMX, not with AVX2. This is
    the question by which vLLM chooses the library that it loads.

    Args:
        packing: of the pages.
        target: of our kernels; the eager one is always slower.
    """
    return target == "eager" or packing == "amx" or torch.cpu._is_avx512_supported()
