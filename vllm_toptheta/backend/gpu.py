"""The GPU backend: single-token rows of vLLM's attention calls run on the Top-theta decode kernel,
the rest on vLLM's FlashAttention or Triton attention.

Everything that the decode kernel needs lives in tensors that stay in place and are refreshed in
`build`, which runs every step, also where a captured graph replays the layers. By default only
tokens that a request generates are pruned: chunks of a prompt run on vLLM's kernel, and a single
token left over by the prefix cache or a chunk boundary takes the dense path inside ours. With
`phases` "prefill" or "both" chunks take the prefill kernel, and single tokens are pruned as prompt
rows. Either way a prompt's KV does not depend on how it was chunked or cached.
"""

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
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_toptheta.backend.gpu_batch import other_batches, single_token_rows
from vllm_toptheta.backend.gpu_layer import TopThetaGPUImpl
from vllm_toptheta.backend.gpu_stock import flash_builder
from vllm_toptheta.backend.gpu_tensors import LayerShape, StepTensors
from vllm_toptheta.backend.gpu_warmup import warm_up
from vllm_toptheta.backend.heads import count_heads, publish
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.backend.sidecar import check_plain, check_room, pad_page, sketches_keys
from vllm_toptheta.backend.step import GPUStepCounts, TopThetaGPUMetadata
from vllm_toptheta.config import TopThetaConfig
from vllm_toptheta.hooks import model_runner
from vllm_toptheta.hooks.attention_backend import NAME
from vllm_toptheta.kernels.sketch import gpu_bytes
from vllm_toptheta.kernels.triton.checks import MAX_HEAD_DIM, MIN_HEAD_DIM, check_supported
from vllm_toptheta.kernels.triton.config import choose_config

logger = init_logger("vllm.toptheta.gpu")

_PREFERRED_BLOCK_SIZE = 64
"""Groups of tokens with a mean V have up to 64 and do not cross blocks."""


class TopThetaGPUBackend(TritonAttentionBackend):
    """Top-theta attention on vLLM's paged GPU cache."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    # No fp8_e5m2: vLLM's Triton cache writer stores e4m3 under either name.
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]
    sketches_keys = False

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
    def path_for(cls, dtype: torch.dtype) -> str:
        """The class that serves layers of the current engine, whatever their `dtype`."""
        config = TopThetaConfig.from_additional_config(get_current_vllm_config().additional_config)
        chosen = cls if config.needs_means else TopThetaGPUBareBackend
        if sketches_keys(config):
            chosen = TopThetaGPUSketchBackend
        return f"{chosen.__module__}.{chosen.__qualname__}"

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return pad_page(spec, sketch=cls.sketches_keys)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        size = max(super().get_preferred_block_size(default_block_size), _PREFERRED_BLOCK_SIZE)
        return FlashAttentionBackend.get_preferred_block_size(size)

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
        # Connectors move K and V by view and would leave the means behind; without means none ran.
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


class TopThetaGPUBareBackend(TopThetaGPUBackend):
    """The same in stock's pages, where nothing reads V means: vLLM asks a class, without a
    configuration, how large they are."""

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        check_plain(spec)
        return spec


class TopThetaGPUSketchBackend(TopThetaGPUBackend):
    """The same with a sketch of K in its pages."""

    sketches_keys = True


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
        sketch = sketches_keys(self.plan.config)
        if self.plan.config.needs_means or sketch:
            check_room(kv_cache_spec, sketch=sketch)
        if sketch:
            spec = kv_cache_spec
            size = gpu_bytes(spec.num_kv_heads, spec.block_size, spec.head_size)
            logger.info_once(
                "toptheta: generated tokens scan K in 8 bits, for %.0f%% more KV memory",
                100 * size / (spec.page_size_bytes - size),
            )
        attention = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        layers = [attention[name] for name in layer_names]
        self._check_layers(layers)
        impls = [layer.impl for layer in layers]
        shape = LayerShape.of(impls, self.plan, vllm_config.parallel_config.tensor_parallel_size)
        check_supported(shape.head_dim, shape.num_heads, shape.num_kv_heads, self.block_size)
        indices = [self.plan.layer_index(name) for name in layer_names]
        self.tensors = StepTensors(
            self.plan,
            indices,
            [impl.window for impl in impls],
            shape,
            # No batch has more requests, not even a captured one with its padding.
            max_rows=vllm_config.scheduler_config.max_num_seqs,
            max_len=vllm_config.model_config.max_model_len,
            block_size=self.block_size,
            launch=choose_config(
                head_dim=shape.head_dim,
                warp_size=64 if current_platform.is_rocm() else 32,
            ),
            num_units=_num_units(device),
            device=device,
        )
        for slot, impl in enumerate(impls):
            impl.bind(slot, self.tensors)
        self.prunes_prompts = self.plan.targets.prefill is not None
        self.flash = None
        if not self.prunes_prompts:
            self.flash = flash_builder(impls, kv_cache_spec, layer_names, vllm_config, device)
        if vllm_config.speculative_config is not None and self.plan.config.phases == "decode":
            logger.warning_once(
                "toptheta: rows that verify several draft tokens at once are not pruned; "
                "they are counted as dense"
            )
        self.heads = count_heads(
            vllm_config.instance_id,
            indices,
            self.tensors.first_head,
            shape.num_heads,
            shape.num_kv_heads,
            device,
        )
        model_runner.install(vllm_config, count=self.plan.config.telemetry)
        if self.plan.config.telemetry:
            publish()
        if device.type == "cuda":
            warm_up(self, layers)

    def _check_layers(self, layers: list[Attention]) -> None:
        if type(self) is not TopThetaGPUMetadataBuilder:
            # vLLM wraps builders to show some layers another batch than the step's.
            raise ValueError(
                f"toptheta does not run the layers of {type(self).__name__}, whose rows are not "
                "those of the batch. Serve this model with another --attention-backend"
            )
        if any(getattr(layer, "is_draft_layer", False) for layer in layers):
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
        single = single_token_rows(cam.query_start_loc_cpu)
        options = model_runner.row_options(cam)
        rows = self.tensors.refresh(cam, single, options)
        rest = [] if self.prunes_prompts else other_batches(cam, single)
        of_rest = super().build if self.flash is None else self.flash.build
        # Fast, so without a schedule: FlashAttention makes one for a single window, and keeps it in
        # one tensor, where the second part of a step would overwrite the first one's.
        stock = [(tokens, of_rest(0, part, fast_build=True)) for tokens, part in rest]
        metadata = TopThetaGPUMetadata(rows, stock)
        if self.plan.config.telemetry:
            detail = [row for row, asked in options.items() if asked.layers]
            model_runner.record(self.counts(cam, metadata, detail))
        return metadata

    def counts(
        self,
        cam: CommonAttentionMetadata,
        metadata: TopThetaGPUMetadata,
        detail: list[int],
    ) -> GPUStepCounts:
        """What the counters need of a step that was built; `detail` as there."""
        return GPUStepCounts.of(self.tensors, self.heads, metadata.rows, cam, detail)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> TopThetaGPUMetadata:
        # Short rows keep the capture fast; the grid depends on the batch size alone.
        common_attn_metadata.seq_lens.fill_(1)
        metadata = self.build(0, common_attn_metadata)
        if common_attn_metadata.max_query_len > 1:
            raise RuntimeError(
                "toptheta captures graphs of single-token rows only; set the compilation option "
                "cudagraph_mode to FULL_AND_PIECEWISE or FULL_DECODE_ONLY"
            )
        return metadata


def _num_units(device: torch.device) -> int:
    """Multiprocessors."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
