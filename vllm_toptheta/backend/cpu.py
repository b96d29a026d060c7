"""The CPU backend: vLLM's attention calls in, decode and prompt rows through our kernels.

By default only tokens that a request generates are pruned: prompt tokens, also a single one left
over by the prefix cache, take the prefill kernel's dense path; with `phases` "prefill" or "both"
they are pruned. Either way a prompt's KV does not depend on how it was chunked or cached. Where
vLLM's own kernel is faster, steps whose prompts are not pruned run on that instead, and so do
decode rows that keep everything.
"""

from dataclasses import replace
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import CpuArchEnum, current_platform
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_toptheta.backend.counts import DecodeCounts, RankHeads
from vllm_toptheta.backend.cpu_layer import GroupEnds, TopThetaCPUImpl
from vllm_toptheta.backend.cpu_step import (
    CPUStepCounts,
    DecodeStep,
    StockRows,
    TopThetaCPUMetadata,
)
from vllm_toptheta.backend.dial import Dial, rest_of_batch, single_rows_of_batch
from vllm_toptheta.backend.heads import count_heads, publish
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.backend.prompts import PromptRows, dense_prompts, plan_prompts
from vllm_toptheta.backend.sidecar import check_page, enlarge_page, kernel_block_size, sketches_keys
from vllm_toptheta.config import TopThetaConfig
from vllm_toptheta.hooks import model_runner
from vllm_toptheta.hooks.attention_backend import NAME
from vllm_toptheta.kernels.decode import DecodeRows
from vllm_toptheta.kernels.layout import MAX_BLOCK_SIZE, Packing, PageLayout
from vllm_toptheta.kernels.ops import Target, available_target
from vllm_toptheta.requests import Resolved
from vllm_toptheta.telemetry.shield import shielded

logger = init_logger("vllm.toptheta.cpu")


class TopThetaCPUBackend(CPUAttentionBackend):
    """Top-theta attention on vLLM's paged CPU cache."""

    supported_kv_cache_dtypes = ["auto"]
    sketches_keys = False

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
            given = () if kv_cache_spec is None else (kv_cache_spec,)  # vLLM 0.30 never gives one
            return CPUAttentionBackend.get_supported_kernel_block_sizes(*given)
        return [kernel_block_size(kv_cache_spec.block_size)]

    @classmethod
    def path_for(cls, dtype: torch.dtype) -> str:
        """The class that serves layers of the current engine.

        Args:
            dtype: of the layers.
        """
        config = TopThetaConfig.from_additional_config(get_current_vllm_config().additional_config)
        chosen = TopThetaCPUSketchBackend if sketches_keys(config) else cls
        return f"{chosen.__module__}.{chosen.__qualname__}"

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return enlarge_page(spec, sketch=cls.sketches_keys)

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


class TopThetaCPUSketchBackend(TopThetaCPUBackend):
    """The same with the sketch of K in its pages: vLLM asks a class, without a configuration, how
    large they are."""

    sketches_keys = True


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
        dtype = kv_cache_spec.dtype
        sketch = dtype if sketches_keys(self.plan.config) else None
        layout = PageLayout(self.block_size, self.head_dim, self.packing, sketch)
        check_page(kv_cache_spec, layout)
        if sketch is not None:
            without = replace(layout, sketch=None)
            logger.info_once(
                "toptheta: generated tokens scan K in 8 bits, kept beside it: %.0f%% more KV "
                'memory ("k_sketch": false is without)',
                100 * (layout.content_elements / without.content_elements - 1),
            )
        attention = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        impls = [attention[name].impl for name in layer_names]
        self.num_layers = len(layer_names)
        layers = [self.plan.layer_index(name) for name in layer_names]
        rank = get_tensor_model_parallel_rank()
        first_head = rank * self.num_heads
        windows = [impl.window for impl in impls]
        self.dial = Dial(self.plan, layers, windows, first_head, self.num_heads)
        needs_side_data = self.plan.config.needs_means or sketch is not None
        self.group_ends = GroupEnds(layout.group_size) if needs_side_data else None
        for slot, impl in enumerate(impls):
            impl.bind(slot, layout, self.dial.weights[slot], self.group_ends)
        self._choose_stock_kernels()
        self.rank = RankHeads.of(self.plan.identity, self.num_heads, self.num_kv_heads, rank)
        self.heads = count_heads(
            vllm_config.instance_id, layers, first_head, self.num_heads, self.num_kv_heads, device
        )
        model_runner.install(vllm_config, count=self.plan.config.telemetry)
        if self.plan.config.telemetry:
            publish()

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
        options = model_runner.row_options(cam)
        counts = CPUStepCounts(
            num_reqs=len(query_lens),
            num_layers=self.plan.identity.num_layers,
            detail=[row for row, asked in options.items() if asked.layers],
            rank=self.rank,
            decode=None,
            prompts=None,
            prefill_lens=query_lens.numpy(),
            layers=self.dial.layers,
        )
        decode = None
        if num_decodes:
            query_lens[:num_decodes] = 0
            decode, counts.decode = self._plan_decodes(cam, num_decodes, options)
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
        if self.plan.config.telemetry and model_runner.record(counts):
            with shielded("worker"):
                if counts.decode is not None:
                    self.heads.follow(counts.decode)
        return TopThetaCPUMetadata(cam.num_actual_tokens, decode, prefill, prompts)

    def _plan_decodes(
        self,
        cam: CommonAttentionMetadata,
        num_decodes: int,
        options: dict[int, Resolved],
    ) -> tuple[DecodeStep, DecodeCounts]:
        seq_lens = cam.seq_lens[:num_decodes]
        plan = self.dial.plan(seq_lens, options)
        per_kv_head = plan.log_min_prob.shape
        rows = DecodeRows(
            block_table=cam.block_table_tensor[:num_decodes],
            seq_lens=seq_lens,
            log_min_prob=plan.log_min_prob,
            min_mass=plan.min_mass,
            dense=plan.dense,
            num_kept=torch.empty(per_kv_head, dtype=torch.int32),
            kept_mass=torch.empty((*per_kv_head[:2], self.num_heads)),
            lifts=torch.empty(per_kv_head, dtype=torch.int32),
        )
        decode = DecodeStep(num_decodes, rows, [None] * self.num_layers)
        counts = DecodeCounts(
            plan.kinds, rows.num_kept.numpy(), rows.lifts.numpy(), rows.kept_mass.numpy()
        )
        if self.stock_decodes and rows.dense.any():
            self._give_to_stock(cam, decode)
            counts.on_stock = rows.dense.numpy()
        return decode, counts

    def _give_to_stock(self, cam: CommonAttentionMetadata, decode: DecodeStep) -> None:
        """Let CPU_ATTN run the rows that are dense."""
        all_rows = decode.rows
        masks, which = all_rows.dense.unique(dim=0, return_inverse=True)
        of_mask: list[StockRows | None] = []
        for mask in masks:
            rows = mask.nonzero().flatten()
            if not len(rows):
                of_mask.append(None)
                continue
            metadata = super().build(0, single_rows_of_batch(cam, rows))
            others = all_rows.with_lens(all_rows.seq_lens.masked_fill(mask, 0))
            of_mask.append(StockRows(None if mask.all() else rows, metadata, others))
        decode.stock = [of_mask[i] for i in which.tolist()]
        all_rows.kept_mass.fill_(1)
        all_rows.lifts.zero_()


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
