"""One attention layer of the GPU backend: vLLM's calls in, our kernels or vLLM's own out."""

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl

from vllm_toptheta.backend.gpu_tensors import StepRows, StepTensors
from vllm_toptheta.backend.sidecar import no_means, sketch_view, sketches_keys, v_means_view
from vllm_toptheta.backend.step import TopThetaGPUMetadata
from vllm_toptheta.kernels.triton.config import choose_prefill_config
from vllm_toptheta.kernels.triton.decode import decode_attention
from vllm_toptheta.kernels.triton.means import update_v_means
from vllm_toptheta.kernels.triton.prefill import prefill_attention
from vllm_toptheta.kernels.triton.sketch import update_sketch


class TopThetaGPUImpl(TritonAttentionImpl):
    """One attention layer: single-token rows and pruned prompts through the Top-theta kernels,
    other prompts through `flash`, or TRITON_ATTN where the builder chose none.
    """

    flash: FlashAttentionImpl | None = None

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
        self.needs_means = tensors.plan.config.needs_means
        self.has_sketch = sketches_keys(tensors.plan.config)

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
        if self.needs_means:
            v_means = v_means_view(kv_cache, key.dtype)
            update_v_means(self._split(kv_cache)[1], v_means, slot_mapping)
        if self.has_sketch:
            update_sketch(self._split(kv_cache)[0], sketch_view(kv_cache), slot_mapping)

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
        if attn_metadata.rows is not None:
            self._attend(layer, query, kv_cache, attn_metadata.rows, output)
        attend = super().forward if self.flash is None else self.flash.forward
        for rest, metadata in attn_metadata.stock:
            attend(layer, query[rest], key, value, kv_cache, metadata, output[rest])
        return output

    def _attend(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        rows: StepRows,
        output: torch.Tensor,
    ) -> None:
        """Run our kernels over the tokens of a step that are theirs."""
        # Made anew each time: a view that is kept would keep the temporary cache of vLLM's memory
        # profiling allocated.
        keys, values = self._split(kv_cache)
        cache = (
            keys,
            values,
            v_means_view(kv_cache, query.dtype) if self.needs_means else no_means(query, values),
        )
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
        if rows.num_single:
            tokens, at = rows.single, rows.single_at
            decode_attention(
                query[tokens],
                *cache,
                rows.block_table,
                rows.seq_lens,
                per_token.log_min_prob[slot, at],
                rows.min_mass,
                dense=per_token.dense[slot, at],
                weights=held.weights[slot],
                out=output[tokens],
                num_kept=per_token.num_kept[slot, at],
                kept_mass=per_token.kept_mass[slot, at],
                lifts=per_token.lifts[slot, at],
                scratch=held.scratch,
                num_splits=held.num_splits(rows.num_single),
                config=held.launch,
                sketch=sketch_view(kv_cache) if self.has_sketch else None,
                **common,
            )
        for prompts in rows.prompts:
            at = prompts.tokens
            prefill_attention(
                query[at],
                *cache,
                prompts.block_table,
                prompts.starts,
                prompts.seq_lens,
                per_token.log_min_prob[slot, at],
                dense=per_token.dense[slot, at],
                out=output[at],
                num_kept=per_token.num_kept[slot, at],
                v_tiles_read=per_token.v_tiles_read[slot, at],
                kept_mass=per_token.kept_mass[slot, at],
                config=self.prefill_config,
                **common,
            )
