"""The GPU backend: vLLM's attention calls in, single-token rows through the Top-theta decode kernel
and the rest through vLLM's Triton attention.

Everything that the decode kernel needs lives in tensors that stay in place and are refreshed in
`build`, which runs every step, also where a captured graph replays the layers. By default only
tokens that a request generates are pruned: chunks of a prompt run on vLLM's kernel, and a single
token left over by the prefix cache or a chunk boundary takes the dense path inside ours. With
`phases` "prefill" or "both" chunks take the prefill kernel, and single tokens are pruned as prompt
rows. Either way a prompt's KV does not depend on how it was chunked or cached.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_toptheta.backend.dial import rest_of_batch, row_options
from vllm_toptheta.backend.gpu_prompts import plan_prompts
from vllm_toptheta.backend.gpu_tensors import DecodeRows, LayerShape, StepTensors
from vllm_toptheta.backend.gpu_warmup import warm_up
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.backend.prompts import PromptRows
from vllm_toptheta.backend.registration import NAME
from vllm_toptheta.backend.sidecar import check_room, pad_page, v_means_view
from vllm_toptheta.backend.step import GPUStepCounts
from vllm_toptheta.config import TopThetaConfig
from vllm_toptheta.kernels.triton_checks import MAX_HEAD_DIM, MIN_HEAD_DIM, check_supported
from vllm_toptheta.kernels.triton_config import choose_config, choose_prefill_config
from vllm_toptheta.kernels.triton_decode import decode_attention
from vllm_toptheta.kernels.triton_means import update_v_means
from vllm_toptheta.kernels.triton_prefill import prefill_attention
from vllm_toptheta.telemetry.carrier import install_on_worker
from vllm_toptheta.telemetry.step_log import STEP_LOG

logger = init_logger("vllm.toptheta.gpu")

_ROCM_SHARED_BYTES = 64 << 10


class TopThetaGPUBackend(TritonAttentionBackend):
    """Top-theta attention on vLLM's paged GPU cache."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    # No fp8_e5m2: vLLM's Triton cache writer stores e4m3 under either name.
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]
    group_size = TopThetaConfig.model_fields["group_size"].default
    """Set by the first layer of an engine: vLLM asks for the page size where it hands out no
    configuration.
    """

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type["TopThetaGPUImpl"]:
        return TopThetaGPUImpl

    @staticmethod
    def get_builder_cls() -> type["TopThetaGPUMetadataBuilder"]:
        return TopThetaGPUMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return pad_page(spec, cls.group_size)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Only where a page is one run of bytes has it an end that side data can follow.
        return (
            KVCacheLayout.LBNHC,
            KVCacheLayout.LBHNC,
            KVCacheLayout.BLNHC,
            KVCacheLayout.BLHNC,
        )

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return MIN_HEAD_DIM <= head_size <= MAX_HEAD_DIM and head_size % 16 == 0

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        # Kept sets do not depend on the batch, but the number of splits does, and with it the order
        # of sums.
        return False

    @classmethod
    def supports_kv_connector(cls) -> bool:
        # Connectors move K and V by view and would leave the means behind.
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability is None or current_platform.is_rocm() or capability >= (8, 0)

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        if not (current_platform.is_cuda() or current_platform.is_rocm()):
            return [f"toptheta's GPU kernels need CUDA or ROCm, not {current_platform.device_name}"]
        return super().validate_configuration(*args, **kwargs)


@dataclass
class TopThetaGPUMetadata:
    """One step's attention metadata for the layers of one builder.

    Attributes:
        num_actual_tokens: tokens of the batch; single-token rows first.
        decode: the single-token rows, or None.
        prefill: TRITON_ATTN's metadata of the remaining rows, or None.
        prompts: the remaining rows, where they run on our kernel, or None.
    """

    num_actual_tokens: int
    decode: DecodeRows | None
    prefill: TritonAttentionMetadata | None
    prompts: PromptRows | None = None


class TopThetaGPUMetadataBuilder(TritonAttentionMetadataBuilder):
    """Splits a batch into single-token rows and the rest, and looks up the thresholds of the
    former.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    reorder_batch_threshold = 1

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Thresholds are looked up in build(), which a graph of draft steps would skip.
        self.supports_draft_decode_metadata_update = False
        self.plan = Plan.from_vllm_config(vllm_config)
        if self.plan.config.compensation:
            check_room(kv_cache_spec, self.plan.config.group_size)
        attention = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        layers = [attention[name] for name in layer_names]
        self._check_layers(layers)
        impls = [layer.impl for layer in layers]
        shape = LayerShape.of(impls, self.plan, vllm_config.parallel_config.tensor_parallel_size)
        check_supported(shape.head_dim, shape.num_heads, shape.num_kv_heads, self.block_size)
        indices = [self.plan.layer_index(name) for name in layer_names]
        for slot, impl in enumerate(impls):
            impl.bind(slot)
        name, num_units, shared_limit = _device_limits(device)
        self.tensors = StepTensors(
            self.plan,
            indices,
            [impl.window for impl in impls],
            shape,
            # No batch has more requests, not even a captured one with its padding.
            max_rows=vllm_config.scheduler_config.max_num_seqs,
            launch=choose_config(
                head_dim=shape.head_dim,
                group_size=self.plan.config.group_size,
                cache_bytes=kv_cache_spec.dtype.itemsize,
                device=name,
                shared_limit=shared_limit,
            ),
            num_units=num_units,
            device=device,
        )
        if vllm_config.speculative_config is not None and self.plan.config.phases == "decode":
            logger.warning_once(
                "toptheta: rows that verify several draft tokens at once are not pruned; "
                "they are counted as dense"
            )
        install_on_worker(vllm_config, count=self.plan.config.telemetry)
        if device.type == "cuda":
            warm_up(self, layers)

    def _check_layers(self, layers: list[Attention]) -> None:
        if type(self) is not TopThetaGPUMetadataBuilder:
            # vLLM wraps builders to show some layers another batch than the step's.
            raise ValueError(
                f"toptheta does not run the layers of {type(self).__name__}, whose rows are not "
                "those of the batch. Serve this model with another --attention-backend"
            )
        if any(layer.is_draft_layer for layer in layers):
            raise ValueError(
                "toptheta does not run a draft model: add "
                '"attention_backend": "TRITON_ATTN" to --speculative-config'
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TopThetaGPUMetadata:
        cam = common_attn_metadata
        if cam.causal is not True:
            raise ValueError(
                "toptheta attends to earlier tokens only, this model to later ones as well. "
                "Serve it with another --attention-backend"
            )
        num_rows = _count_single_token_rows(cam.query_start_loc_cpu.diff())
        options = row_options(cam)
        decode = None
        if num_rows:
            prompt = None if cam.is_prefilling is None else cam.is_prefilling[:num_rows]
            decode = self.tensors.refresh(
                cam.seq_lens[:num_rows], cam.block_table_tensor, prompt, options
            )
        prefill, prompts = None, None
        if num_rows < cam.num_reqs:
            rest, rest_options = rest_of_batch(cam, options, num_rows)
            if self.plan.config.phases == "decode":
                # An own copy: vLLM's kernel is compiled anew for lengths that start anywhere.
                rest = rest.replace(seq_lens=rest.seq_lens.clone())
                prefill = super().build(common_prefix_len, rest, fast_build)
            else:
                prompts = plan_prompts(
                    self.tensors,
                    rest.block_table_tensor,
                    rest.query_start_loc,
                    rest.seq_lens,
                    rest.num_actual_tokens,
                    rest_options,
                )
        metadata = TopThetaGPUMetadata(cam.num_actual_tokens, decode, prefill, prompts)
        detail = [row for row, asked in options.items() if asked.layers]
        STEP_LOG.append(self.counts(cam, metadata, detail))
        return metadata

    def counts(
        self,
        cam: CommonAttentionMetadata,
        metadata: TopThetaGPUMetadata,
        detail: list[int],
    ) -> GPUStepCounts:
        """What the counters need of a step that was built; `detail` as there."""
        return GPUStepCounts(
            tensors=self.tensors,
            num_rows=0 if metadata.decode is None else metadata.decode.num_rows,
            prompts=metadata.prompts,
            query_start_loc=cam.query_start_loc,
            seq_lens=cam.seq_lens,
            num_layers=self.plan.table.num_layers,
            detail=detail,
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> TopThetaGPUMetadata:
        # Short rows keep the capture fast; the grid depends on the batch size alone.
        common_attn_metadata.seq_lens.fill_(1)
        metadata = self.build(0, common_attn_metadata)
        if metadata.prefill is not None or metadata.prompts is not None:
            raise RuntimeError(
                "toptheta captures graphs of single-token rows only; set the compilation option "
                "cudagraph_mode to FULL_AND_PIECEWISE or FULL_DECODE_ONLY"
            )
        return metadata


def _count_single_token_rows(query_lens: torch.Tensor) -> int:
    """Leading rows with at most one token; padding of a captured graph has none."""
    longer = query_lens > 1
    return int(longer.int().argmax()) if bool(longer.any()) else len(query_lens)


def _device_limits(device: torch.device) -> tuple[str, int, int | None]:
    """Name, multiprocessors and shared memory per program; nothing in particular without a GPU."""
    if device.type != "cuda":
        return "", 1, None
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", None)
    if current_platform.is_rocm():
        shared = _ROCM_SHARED_BYTES
    return properties.name, properties.multi_processor_count, shared


class TopThetaGPUImpl(TritonAttentionImpl):
    """One attention layer: single-token rows and pruned prompts through the Top-theta kernels,
    other prompts through TRITON_ATTN.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if alibi_slopes is not None:
            raise ValueError(
                "toptheta does not support ALiBi: thresholds are calibrated on scores "
                "without a position bias. "
                "Serve this model with another --attention-backend"
            )
        if kwargs.get("chunk_lookback", -1) != -1:
            raise ValueError(
                "toptheta does not support chunked attention; serve with another backend"
            )
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            *args,
            **kwargs,
        )
        self.head_dim = head_size
        self.sm_scale = self.scale
        self.window = sliding_window
        self.soft_cap = self.logits_soft_cap or None
        self.is_fp8 = self.kv_cache_dtype.startswith("fp8")
        # vLLM would hand over a query in fp8; scores are compared with thresholds, so they keep its
        # full precision.
        self.supports_quant_query_input = False
        config = TopThetaConfig.from_additional_config(get_current_vllm_config().additional_config)
        self.group_size, self.compensation = config.group_size, config.compensation
        self.prefill_config = choose_prefill_config(
            head_dim=head_size,
            group_size=config.group_size,
            cache_bytes=1 if self.is_fp8 else 2,
            warp_size=64 if current_platform.is_rocm() else 32,
        )
        TopThetaGPUBackend.group_size = config.group_size

    def bind(self, slot: int) -> None:
        """Tell the layer its place in the builder's tensors."""
        self.slot = slot

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        # The fused writer would leave the V means behind.
        return False

    def _means(self, kv_cache: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """[num_blocks, num_kv_heads, groups, head_dim] view of the page's side data; None without
        compensation.
        """
        # Layers that never prune keep means too: others may share their cache. Made anew each time:
        # a view that is kept would keep the temporary cache of vLLM's memory profiling allocated.
        return v_means_view(kv_cache, self.group_size, dtype) if self.compensation else None

    def _split(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each [num_blocks, num_kv_heads, block_size, head_dim]."""
        key_cache, value_cache = kv_cache.split(self.head_dim, dim=-1)
        if self.is_fp8:
            return key_cache.view(self.fp8_dtype), value_cache.view(self.fp8_dtype)
        return key_cache, value_cache

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        v_means = self._means(kv_cache, key.dtype)
        if v_means is not None:
            update_v_means(self._split(kv_cache)[1], v_means, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TopThetaGPUMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # profiling run
            return output.fill_(0)
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("toptheta does not fuse output quantisation")
        key_cache, value_cache = self._split(kv_cache)
        # Converted anew each time, also where a graph replays: weights may be loaded again.
        sinks = None if self.sinks is None else self.sinks.float()
        num_rows = 0
        if (rows := attn_metadata.decode) is not None:
            num_rows = rows.num_rows
            decode_attention(
                query[:num_rows],
                key_cache,
                value_cache,
                self._means(kv_cache, query.dtype),
                rows.block_table,
                rows.seq_lens,
                rows.theta[self.slot],
                sm_scale=self.sm_scale,
                dense=rows.dense[self.slot],
                out=output[:num_rows],
                num_kept=rows.num_kept[self.slot],
                v_rows_read=rows.v_rows_read[self.slot],
                scratch=rows.scratch,
                num_splits=rows.num_splits,
                config=rows.config,
                window=self.window,
                soft_cap=self.soft_cap,
                sinks=sinks,
                k_scale=layer._k_scale if self.is_fp8 else None,
                v_scale=layer._v_scale if self.is_fp8 else None,
            )
        rest = slice(num_rows, attn_metadata.num_actual_tokens)
        if (prompts := attn_metadata.prompts) is not None:
            prefill_attention(
                query[rest],
                key_cache,
                value_cache,
                self._means(kv_cache, query.dtype),
                prompts.block_table,
                prompts.query_start_loc,
                prompts.seq_lens,
                prompts.theta[self.slot],
                sm_scale=self.sm_scale,
                dense=prompts.dense[self.slot],
                out=output[rest],
                num_kept=prompts.num_kept[self.slot],
                v_tiles_read=prompts.v_tiles_read[self.slot],
                config=self.prefill_config,
                window=self.window,
                soft_cap=self.soft_cap,
                sinks=sinks,
                k_scale=layer._k_scale if self.is_fp8 else None,
                v_scale=layer._v_scale if self.is_fp8 else None,
            )
        if attn_metadata.prefill is not None:
            super().forward(
                layer,
                query[rest],
                key,
                value,
                kv_cache,
                attn_metadata.prefill,
                output[rest],
            )
        return output
