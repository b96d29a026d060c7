"""The GPU backend: single-token rows of vLLM's attention calls run on the Top-theta decode kernel,
the rest on vLLM's Triton attention.

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
from vllm.config import VllmConfig, get_layers_from_vllm_config
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
from vllm_toptheta.backend.gpu_tensors import LayerShape, StepRows, StepTensors
from vllm_toptheta.backend.gpu_warmup import warm_up
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.backend.registration import NAME
from vllm_toptheta.backend.sidecar import check_room, pad_page, v_means_view
from vllm_toptheta.backend.step import GPUStepCounts
from vllm_toptheta.kernels.triton.checks import MAX_HEAD_DIM, MIN_HEAD_DIM, check_supported
from vllm_toptheta.kernels.triton.config import choose_config, choose_prefill_config
from vllm_toptheta.kernels.triton.decode import decode_attention
from vllm_toptheta.kernels.triton.means import update_v_means
from vllm_toptheta.kernels.triton.prefill import prefill_attention
from vllm_toptheta.telemetry.carrier import install_on_worker
from vllm_toptheta.telemetry.step_log import STEP_LOG

logger = init_logger("vllm.toptheta.gpu")

_PREFERRED_BLOCK_SIZE = 64
"""Groups of tokens with a mean V have up to 64 and do not cross blocks."""


class TopThetaGPUBackend(TritonAttentionBackend):
    """Top-theta attention on vLLM's paged GPU cache."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    # No fp8_e5m2: vLLM's Triton cache writer stores e4m3 under either name.
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]

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
        return pad_page(spec)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return max(super().get_preferred_block_size(default_block_size), _PREFERRED_BLOCK_SIZE)

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
        num_actual_tokens: tokens of the batch; single-token requests first.
        rows: the tokens that run on our kernels, or None.
        prefill: TRITON_ATTN's metadata of the other requests, or None.
    """

    num_actual_tokens: int
    rows: StepRows | None
    prefill: TritonAttentionMetadata | None


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
        check_room(kv_cache_spec)
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
            launch=choose_config(head_dim=shape.head_dim),
            num_units=_num_units(device),
            device=device,
        )
        for slot, impl in enumerate(impls):
            impl.bind(slot, self.tensors)
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
        num_single = _count_single_token_rows(cam.query_start_loc_cpu.diff())
        options = row_options(cam)
        rows, prefill = self.tensors.refresh(cam, num_single, options), None
        if num_single < cam.num_reqs and self.plan.targets.prefill is None:
            rest, _ = rest_of_batch(cam, options, num_single)
            # An own copy: vLLM's kernel is compiled anew for lengths that start anywhere.
            rest = rest.replace(seq_lens=rest.seq_lens.clone())
            prefill = super().build(common_prefix_len, rest, fast_build)
        metadata = TopThetaGPUMetadata(cam.num_actual_tokens, rows, prefill)
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
        return GPUStepCounts(self.tensors, metadata.rows, cam.query_start_loc, cam.seq_lens, detail)

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


def _count_single_token_rows(query_lens: torch.Tensor) -> int:
    """Leading rows with at most one token; padding of a captured graph has none."""
    longer = query_lens > 1
    return int(longer.int().argmax()) if bool(longer.any()) else len(query_lens)


def _num_units(device: torch.device) -> int:
    """Multiprocessors."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


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
                "toptheta does not support ALiBi: its kernels know scores without a position bias "
                "only. Serve this model with another --attention-backend"
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
        # vLLM would hand over a query in fp8; scores decide what is kept, so they keep its full
        # precision.
        self.supports_quant_query_input = False
        self.prefill_config = choose_prefill_config(
            head_dim=head_size,
            cache_bytes=1 if self.is_fp8 else 2,
            warp_size=64 if current_platform.is_rocm() else 32,
        )

    def bind(self, slot: int, tensors: StepTensors) -> None:
        """Tell the layer its place in the builder's tensors."""
        self.slot, self.tensors = slot, tensors

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

    def fused_rope_kvcache_supported(self) -> bool:
        # The fused writer would leave the V means behind.
        return False

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
        # Layers that never prune keep means too: others may share their cache.
        if self.tensors.plan.needs_means:
            v_means = v_means_view(kv_cache, key.dtype)
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
        rows, num_single = attn_metadata.rows, 0
        if rows is not None:
            num_single = rows.num_single
            self._attend(layer, query, kv_cache, rows, output, attn_metadata.num_actual_tokens)
        if attn_metadata.prefill is not None:
            rest = slice(num_single, attn_metadata.num_actual_tokens)
            super().forward(
                layer, query[rest], key, value, kv_cache, attn_metadata.prefill, output[rest]
            )
        return output

    def _attend(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: StepRows,
        output: torch.Tensor,
        num_tokens: int,
    ) -> None:
        """Run our kernels over the tokens of a step that are theirs."""
        # Made anew each time: a view that is kept would keep the temporary cache of vLLM's memory
        # profiling allocated.
        cache = (*self._split(kv_cache), v_means_view(kv_cache, query.dtype))
        common = {
            "sm_scale": self.sm_scale,
            "window": self.window,
            "soft_cap": self.soft_cap,
            # Converted anew each time, also where a graph replays: weights may be loaded again.
            "sinks": None if self.sinks is None else self.sinks.float(),
            "k_scale": layer._k_scale if self.is_fp8 else None,
            "v_scale": layer._v_scale if self.is_fp8 else None,
        }
        slot, held, per_token = self.slot, self.tensors, rows.tensors
        if n := rows.num_single:
            decode_attention(
                query[:n],
                *cache,
                rows.block_table[:n],
                rows.seq_lens[:n],
                per_token.log_min_prob[slot, :n],
                rows.min_mass,
                dense=per_token.dense[slot, :n],
                weights=held.weights[slot],
                out=output[:n],
                num_kept=per_token.num_kept[slot, :n],
                kept_mass=per_token.kept_mass[slot, :n],
                lifts=per_token.lifts[slot, :n],
                scratch=held.scratch,
                num_splits=held.num_splits(n),
                config=held.launch,
                **common,
            )
        if rows.prompt_starts is not None:
            rest = slice(n, num_tokens)
            prefill_attention(
                query[rest],
                *cache,
                rows.block_table[n:],
                rows.prompt_starts,
                rows.seq_lens[n:],
                per_token.log_min_prob[slot, n:],
                dense=per_token.dense[slot, n:],
                out=output[rest],
                num_kept=per_token.num_kept[slot, n:],
                v_tiles_read=per_token.v_tiles_read[slot, n:],
                kept_mass=per_token.kept_mass[slot, n:],
                config=self.prefill_config,
                **common,
            )
