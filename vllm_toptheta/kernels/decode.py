"""Decode on a CPU: one query token each of several sequences, a paged KV cache and thresholds in,
outputs out.

What a row keeps stands in reference.py: every key that has at least a threshold's probability for
some query head, decided once per row and kv head.
"""

import ctypes
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_toptheta.kernels import eager
from vllm_toptheta.kernels.checks import (
    check,
    check_block_table,
    check_last,
    check_rows,
    check_scores,
    not_a_multiple,
    unknown_target,
)
from vllm_toptheta.kernels.cpu import native
from vllm_toptheta.kernels.cpu.calls import DTYPES, DecodeCall, Target
from vllm_toptheta.kernels.layout import NUM_WEIGHTS, PageLayout


@dataclass(kw_only=True, eq=False)
class DecodeRows:
    """One query token each of several sequences, for all layers that share their lengths.

    The rule is `reference.select`, the output `reference.compensated_output`. What is kept depends
    neither on the batch nor on how the work is cut.

    Attributes:
        block_table: [num_seqs, max_blocks] int32, the first stride is free; only entries of visible
            keys are read.
        seq_lens: [num_seqs] int32, cached keys of the row, its own included; 0 for padding, which
            yields zeros.
        log_min_prob: [num_layers, num_seqs, num_kv_heads] float32, natural logarithm of the
            probability from which a key is kept; -inf keeps all keys. The last stride is 1.
        min_mass: [num_seqs] float32, share of the probability that is kept at least: until then
            the row's thresholds halve. 0 for no floor.
        dense: [num_layers, num_seqs] bool, rows that keep every key.
        num_kept: [num_layers, num_seqs, num_kv_heads] int32, written: V rows on the list of a kv
            head (all visible ones on dense rows).
        kept_mass: [num_layers, num_seqs, num_heads] float32, written: the kept keys' share of the
            probability of all keys; 1 for dense rows and padding.
        lifts: [num_layers, num_seqs, num_kv_heads] int32, written: how often the threshold halved.

    Raises:
        ValueError: an argument has another shape or dtype.
    """

    block_table: Tensor
    seq_lens: Tensor
    log_min_prob: Tensor
    min_mass: Tensor
    dense: Tensor
    num_kept: Tensor
    kept_mass: Tensor
    lifts: Tensor

    def __post_init__(self) -> None:
        block_table, seq_lens, min_mass = self.block_table, self.seq_lens, self.min_mass
        log_min_prob, dense, lifts = self.log_min_prob, self.dense, self.lifts
        num_kept, kept_mass = self.num_kept, self.kept_mass
        if seq_lens.dim() != 1 or log_min_prob.dim() != 3 or kept_mass.dim() != 3:
            raise ValueError(
                "seq_lens, log_min_prob and kept_mass must be [num_seqs], [num_layers, num_seqs, "
                "num_kv_heads] and [num_layers, num_seqs, num_heads], got "
                f"{[list(x.shape) for x in (seq_lens, log_min_prob, kept_mass)]}"
            )
        num_layers, num_seqs, num_kv_heads = log_min_prob.shape
        per_kv_head = (num_layers, num_seqs, num_kv_heads)
        check_block_table(block_table, num_seqs)
        check("seq_lens", seq_lens, (num_seqs,), torch.int32)
        check_last("log_min_prob", log_min_prob, per_kv_head, torch.float32)
        check("min_mass", min_mass, (num_seqs,), torch.float32)
        check("dense", dense, (num_layers, num_seqs), torch.bool)
        check("num_kept", num_kept, per_kv_head, torch.int32)
        check("kept_mass", kept_mass, (num_layers, num_seqs, kept_mass.shape[2]), torch.float32)
        check("lifts", lifts, per_kv_head, torch.int32)
        self.sizes = (*per_kv_head, kept_mass.shape[2])
        self.args = native.DecodeRowsArgs(
            block_table.data_ptr(),
            seq_lens.data_ptr(),
            log_min_prob.data_ptr(),
            min_mass.data_ptr(),
            dense.data_ptr(),
            num_kept.data_ptr(),
            kept_mass.data_ptr(),
            lifts.data_ptr(),
            block_table.stride(0),
            log_min_prob.stride(0),
            log_min_prob.stride(1),
            block_table.shape[1],
            num_seqs,
        )
        self.pointer = ctypes.addressof(self.args)

    def with_lens(self, seq_lens: Tensor) -> "DecodeRows":
        """The same rows, results included, with other lengths."""
        return replace(self, seq_lens=seq_lens)


class DecodeLayer:
    """One layer's decode attention, step after step.

    A step has a call a layer, each after everything else has been in the caches, where Python that
    is seldom run takes ten times its time: what does not change is prepared and checked once.

    Args:
        slot: the layer's place in the first dimension of `DecodeRows`.
        layout: of its pages.
        weights: [num_heads, NUM_WEIGHTS] float32, what stands for the lost mass.
        sm_scale: factor on q.k.
        window: a row sees its last `window` keys; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for none.
        target: "native" or "eager".

    Raises:
        ValueError: an argument has another shape or value.
        RuntimeError: `target` is not available here.
    """

    def __init__(
        self,
        slot: int,
        layout: PageLayout,
        weights: Tensor,
        *,
        sm_scale: float,
        window: int | None,
        soft_cap: float | None,
        target: Target,
    ) -> None:
        self.num_heads = weights.shape[0]
        check("weights", weights, (self.num_heads, NUM_WEIGHTS), torch.float32)
        check_scores(window, soft_cap)
        if target not in ("native", "eager"):
            raise unknown_target(target)
        self.slot = slot
        self.layout = layout
        self.weights = weights
        self.sm_scale = sm_scale
        self.window = window
        self.soft_cap = soft_cap
        self.args: native.DecodeLayerArgs | None = None
        if target == "native":
            self.args = native.DecodeLayerArgs(
                weights=weights.data_ptr(),
                slot=slot,
                num_heads=self.num_heads,
                head_dim=layout.head_dim,
                block_size=layout.block_size,
                group_size=layout.group_size,
                amx=layout.packing == "amx",
                sketch=layout.sketch is not None,
                window=window or 0,
                avx512=native.use_avx512(None),
                sm_scale=sm_scale,
                soft_cap=soft_cap or 0.0,
            )
            self._pointer = ctypes.addressof(self.args)
            self._run = native.native_library().topt_decode
        self._kv_cache: Tensor | None = None
        self._sinks: Tensor | None = None
        self._checked: object = None

    def attend(
        self,
        rows: DecodeRows,
        query: Tensor,
        kv_cache: Tensor,
        out: Tensor,
        sinks: Tensor | None = None,
    ) -> None:
        """Attend one query token per sequence to the cached keys that have enough probability.

        Args:
            rows: the step's.
            query: [at least num_seqs, num_heads, head_dim] in the cache dtype; the first stride is
                free.
            kv_cache: [num_blocks, num_kv_heads, block_size, content], see PageLayout.
            out: as query; its first num_seqs rows are written.
            sinks: [num_heads] float32, an extra logit in the denominator; None for none.

        Raises:
            ValueError: an argument has another shape, dtype or layout, or a block id lies outside
                the cache.
        """
        if kv_cache is not self._kv_cache:
            self._take_kv_cache(kv_cache)
        if sinks is not self._sinks:
            self._take_sinks(sinks)
        shapes = (rows.sizes, query.shape, query.stride(), query.dtype)
        shapes += (out.shape, out.stride(), out.dtype)  # type: ignore[assignment]
        if shapes != self._checked:
            self._check(rows, query, kv_cache, out)
            self._checked = shapes
        if self.args is None:
            self._attend_eagerly(rows, query, kv_cache, out)
            return
        status = self._run(self._pointer, rows.pointer, query.data_ptr(), out.data_ptr())
        if status:
            native.check_status(status)

    def _take_kv_cache(self, kv_cache: Tensor) -> None:
        self.layout.check(kv_cache)
        if self.args is not None:
            self.args.kv_cache = kv_cache.data_ptr()
            self.args.num_blocks, self.args.num_kv_heads = kv_cache.shape[:2]
            self.args.block_stride, self.args.head_stride = kv_cache.stride()[:2]
            self.args.dtype = DTYPES[kv_cache.dtype]
        self._kv_cache, self._checked = kv_cache, None

    def _take_sinks(self, sinks: Tensor | None) -> None:
        if sinks is not None:
            check("sinks", sinks, (self.num_heads,), torch.float32)
        if self.args is not None:
            self.args.sinks = None if sinks is None else sinks.data_ptr()
        self._sinks = sinks

    def _check(self, rows: DecodeRows, query: Tensor, kv_cache: Tensor, out: Tensor) -> None:
        num_layers, num_seqs, num_kv_heads, num_heads = rows.sizes
        if self.slot >= num_layers or (num_kv_heads, num_heads) != (
            kv_cache.shape[1],
            self.num_heads,
        ):
            raise ValueError(
                f"log_min_prob and kept_mass must be of more than {self.slot} layers, of "
                f"{kv_cache.shape[1]} kv heads and {self.num_heads} heads, got {num_layers}, "
                f"{num_kv_heads} and {num_heads}"
            )
        if num_heads % num_kv_heads:
            raise not_a_multiple(num_heads, num_kv_heads)
        dim = self.layout.head_dim
        for name, tensor in (("query", query), ("out", out)):
            more = tensor.dim() == 3 and tensor.shape[0] > num_seqs
            used = tensor[:num_seqs] if more else tensor
            check_rows(name, used, (num_seqs, num_heads, dim), kv_cache.dtype, (dim, 1))
        if self.args is not None:
            self.args.query_stride, self.args.out_stride = query.stride(0), out.stride(0)

    def _attend_eagerly(
        self, rows: DecodeRows, query: Tensor, kv_cache: Tensor, out: Tensor
    ) -> None:
        num_seqs, slot = rows.sizes[1], self.slot
        eager.decode_attention(
            DecodeCall(
                query=query[:num_seqs],
                kv_cache=kv_cache,
                layout=self.layout,
                block_table=rows.block_table,
                seq_lens=rows.seq_lens,
                log_min_prob=rows.log_min_prob[slot],
                sm_scale=self.sm_scale,
                dense=rows.dense[slot],
                window=self.window,
                soft_cap=self.soft_cap,
                sinks=self._sinks,
                out=out[:num_seqs],
                num_kept=rows.num_kept[slot],
                kept_mass=rows.kept_mass[slot],
                min_mass=rows.min_mass,
                weights=self.weights,
                lifts=rows.lifts[slot],
            )
        )
