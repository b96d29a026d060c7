"""One attention layer of the CPU backend: vLLM's calls in, our kernels or CPU_ATTN out."""

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadata

from vllm_toptheta.backend.cpu_step import StockRows, TopThetaCPUMetadata
from vllm_toptheta.kernels.decode import DecodeLayer
from vllm_toptheta.kernels.layout import PageLayout
from vllm_toptheta.kernels.ops import available_target, prefill_attention, update_side_data

logger = init_logger("vllm.toptheta.cpu")


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
        self._cache: torch.Tensor | None = None
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
            group_ends: of its builder; None where no kernel reads side data.
        """
        self.slot = slot
        self.layout = layout
        self.group_ends = group_ends
        self.decode_layer = DecodeLayer(
            slot,
            layout,
            weights,
            sm_scale=self.sm_scale,
            window=self.window,
            soft_cap=self.soft_cap,
            target=self.target,
        )

    def _kv_only(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """vLLM's own view of the cache: the pages without their side data."""
        if kv_cache is not self._cache:  # each step asks for it, with nothing of ours in the caches
            num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
            width = 2 * self.head_dim
            strides = (kv_cache.stride(0), kv_cache.stride(1), width, 1)
            shape = (num_blocks, num_kv_heads, block_size, width)
            self._cache, self._view = kv_cache, kv_cache.as_strided(shape, strides)
        return self._view

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
                update_side_data(kv_cache, self.layout, ends, target=self.target)

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
            if (stock := decode.stock[self.slot]) is None:
                self.decode_layer.attend(decode.rows, query, kv_cache, output, sinks)
            else:
                rows = slice(num_decodes)
                self._decode(layer, query[rows], kv_cache, stock, sinks, output[rows])
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
        stock: StockRows,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """Decode rows some of which are CPU_ATTN's."""
        if stock.rows is None:
            self._stock(layer, query, kv_cache, stock.metadata, out)
            return
        self.decode_layer.attend(stock.others, query, kv_cache, out, sinks)
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
