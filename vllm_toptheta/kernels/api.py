"""The contract of the CPU kernels: queries, a paged KV cache and thresholds in, outputs out.

The implementation is explicit: `impl="native"` (C++) or `impl="torch"`. A request is honoured or
raises; ask `available_impl()` what this machine can do.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vllm_toptheta.kernels import cpu, cpu_prefill
from vllm_toptheta.kernels.cpu_prefill import V_TILE

__all__ = [
    "V_TILE",
    "Availability",
    "Impl",
    "PageLayout",
    "PageViews",
    "available_impl",
    "decode_attention",
    "prefill_attention",
    "update_v_means",
]

Impl = Literal["native", "torch"]

_GROUP_SIZES = (16, 32, 64, 128)
_MAX_BLOCK_SIZE = 512  # native/decode_avx2.cpp: kMaxUnits
_CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Availability(NamedTuple):
    """The best implementation here, and why it is not the native one (None when it is)."""

    impl: Impl
    reason: str | None


def available_impl() -> Availability:
    """Say which implementation this machine can run."""
    native = cpu.load_native()
    if native.library is None:
        return Availability("torch", native.reason)
    return Availability("native", None)


class PageViews(NamedTuple):
    """Strided views of the parts of a page tensor; none of them copies.

    Attributes:
        key_cache: [num_blocks, num_kv_heads, head_dim, block_size], K as it is stored: transposed.
        key_cache_vllm: [num_blocks, num_kv_heads, block_size, head_dim], the same memory in the
            shape that vLLM's CPU operators expect; its last two dimensions must not be read as
            [token, dim].
        value_cache: [num_blocks, num_kv_heads, block_size, head_dim].
        v_means: [num_blocks, num_kv_heads, block_size // group_size, head_dim], valid for complete
            groups.
    """

    key_cache: Tensor
    key_cache_vllm: Tensor
    value_cache: Tensor
    v_means: Tensor


@dataclass(frozen=True)
class PageLayout:
    """What one (block, kv head) pair holds: K transposed, V, then the mean V of token groups.

    Attributes:
        block_size: tokens per block, a multiple of 16 up to 512.
        head_dim: a multiple of 16.
        group_size: tokens per compensation group: 16, 32, 64 or 128; divides block_size.
    """

    block_size: int
    head_dim: int
    group_size: int

    def __post_init__(self) -> None:
        if self.block_size % 16 or not 16 <= self.block_size <= _MAX_BLOCK_SIZE:
            raise ValueError(
                f"block_size must be a multiple of 16 up to {_MAX_BLOCK_SIZE}, "
                f"got {self.block_size}"
            )
        if self.head_dim <= 0 or self.head_dim % 16:
            raise ValueError(f"head_dim must be a multiple of 16, got {self.head_dim}")
        if self.group_size not in _GROUP_SIZES:
            raise ValueError(f"group_size must be one of {_GROUP_SIZES}, got {self.group_size}")
        if self.block_size % self.group_size:
            raise ValueError(
                f"group_size {self.group_size} does not divide block_size {self.block_size}; "
                f"choose one of {[g for g in _GROUP_SIZES if self.block_size % g == 0]}"
            )

    @property
    def content_elements(self) -> int:
        """Elements of the cache dtype that a page holds per token slot."""
        return 2 * self.head_dim + -(-self.head_dim // self.group_size)

    def views(self, kv_cache: Tensor) -> PageViews:
        """Split a page tensor into its parts.

        Args:
            kv_cache: [num_blocks, num_kv_heads, block_size, content_elements], the last two
                dimensions contiguous.

        Raises:
            ValueError: the tensor does not have this layout.
        """
        self.check(kv_cache)
        num_blocks, num_kv_heads = kv_cache.shape[:2]
        outer = kv_cache.stride()[:2]
        start = kv_cache.storage_offset()
        size = self.block_size * self.head_dim

        def part(rows: int, columns: int, offset: int) -> Tensor:
            shape = (num_blocks, num_kv_heads, rows, columns)
            return kv_cache.as_strided(shape, (*outer, columns, 1), start + offset)

        return PageViews(
            key_cache=part(self.head_dim, self.block_size, 0),
            key_cache_vllm=part(self.block_size, self.head_dim, 0),
            value_cache=part(self.block_size, self.head_dim, size),
            v_means=part(self.block_size // self.group_size, self.head_dim, 2 * size),
        )

    def check(self, kv_cache: Tensor) -> None:
        """Raise ValueError unless `kv_cache` has this layout."""
        content = self.content_elements
        shape, strides = kv_cache.shape, kv_cache.stride()
        if len(shape) != 4 or shape[2:] != (self.block_size, content):
            raise ValueError(
                "kv_cache must be [num_blocks, num_kv_heads, "
                f"{self.block_size}, {content}] for {self}, got {list(shape)}"
            )
        if strides[2:] != (content, 1):
            raise ValueError(
                f"the last two dimensions of kv_cache must be contiguous, got strides {strides}"
            )
        if kv_cache.dtype not in _CACHE_DTYPES:
            raise ValueError(f"kv_cache must be one of {_CACHE_DTYPES}, got {kv_cache.dtype}")
        if not kv_cache.is_cpu:
            raise ValueError(f"kv_cache must be on the CPU, got {kv_cache.device}")


def update_v_means(
    kv_cache: Tensor, layout: PageLayout, slot_mapping: Tensor, *, impl: Impl
) -> None:
    """Store the mean V of every group whose last slot is in `slot_mapping`.

    Call it after each write to the cache, with the slots that were written. A group that is not
    complete has no valid mean, and no kernel reads it.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, content], see PageLayout; its means are
            updated.
        layout: the page layout.
        slot_mapping: [num_tokens] int64, block * block_size + offset; negative entries are padding.
        impl: "native" or "torch".

    Raises:
        ValueError: an argument has another shape or dtype, or a slot lies outside the cache.
        RuntimeError: `impl` is not available here.
    """
    layout.check(kv_cache)
    if slot_mapping.dtype != torch.int64 or slot_mapping.dim() != 1:
        raise ValueError(f"slot_mapping must be [num_tokens] int64, got {_describe(slot_mapping)}")
    if impl == "native":
        cpu.update_v_means_native(kv_cache, layout, slot_mapping.contiguous())
    elif impl == "torch":
        cpu.update_v_means_torch(kv_cache, layout, slot_mapping)
    else:
        raise _unknown_impl(impl)


def decode_attention(
    query: Tensor,
    kv_cache: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    seq_lens: Tensor,
    theta: Tensor,
    *,
    sm_scale: float,
    dense: Tensor,
    compensation: bool,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    out: Tensor,
    num_kept: Tensor,
    v_rows_read: Tensor,
    impl: Impl,
    num_splits: int | None = None,
    num_threads: int | None = None,
) -> None:
    """Attend one query token per sequence to those cached keys whose score reaches theta.

    The denominator runs over all visible keys and a row's best key is always kept; with
    `compensation` the mass that a group of tokens loses is multiplied with the mean V of the
    group's visible keys. The kept set depends neither on the batch nor on how the work is cut.

    Args:
        query: [num_seqs, num_heads, head_dim] in the cache dtype; the first stride is free.
        kv_cache: [num_blocks, num_kv_heads, block_size, content], see PageLayout.
        layout: the page layout.
        block_table: [num_seqs, max_blocks] int32, the first stride is free; only entries of visible
            keys are read.
        seq_lens: [num_seqs] int32, cached keys of the row, its own included; 0 for padding, which
            yields zeros.
        theta: [num_seqs, num_heads] float32, units of q.k * sm_scale (after soft cap); -inf keeps
            all keys. The first stride is free.
        sm_scale: factor on q.k.
        dense: [num_seqs] bool, rows that take the dense path and ignore theta.
        compensation: whether the lost mass goes to the group means, or is dropped.
        window: a row sees its last `window` keys; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for none.
        sinks: [num_heads] float32, an extra logit in the denominator; None for none.
        out: [num_seqs, num_heads, head_dim] in the cache dtype, written; the first stride is free.
        num_kept: [num_seqs, num_heads] int32, written: keys kept (all visible ones on dense rows).
        v_rows_read: [num_seqs, num_kv_heads] int32, written: V rows that any head of the group
            keeps.
        impl: "native" or "torch".
        num_splits: parts a row is cut into (native); None lets the kernel choose.
        num_threads: threads (native); None for torch's number.

    Raises:
        ValueError: an argument has another shape, dtype or layout, or a block id lies outside the
            cache.
        RuntimeError: `impl` is not available here.
    """
    call = cpu.DecodeCall(
        query=query,
        kv_cache=kv_cache,
        layout=layout,
        block_table=block_table,
        seq_lens=seq_lens,
        theta=theta,
        dense=dense,
        out=out,
        num_kept=num_kept,
        sm_scale=sm_scale,
        compensation=compensation,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        v_rows_read=v_rows_read,
    )
    num_seqs = query.shape[0]
    _check_call(call, num_seqs)
    _check("v_rows_read", v_rows_read, (num_seqs, kv_cache.shape[1]), torch.int32)
    if impl == "native":
        cpu.decode_attention_native(call, num_splits, num_threads)
    elif impl == "torch":
        cpu.decode_attention_torch(call)
    else:
        raise _unknown_impl(impl)


def prefill_attention(
    query: Tensor,
    kv_cache: Tensor,
    layout: PageLayout,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    theta: Tensor,
    *,
    sm_scale: float,
    dense: Tensor,
    compensation: bool,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    out: Tensor,
    num_kept: Tensor,
    v_tiles_read: Tensor,
    impl: Impl,
    num_threads: int | None = None,
) -> None:
    """Attend query tokens of several sequences, causally, to the cached keys that reach theta.

    Row i of a sequence with q query tokens and n cached keys sees the first n - q + i + 1 keys.
    Each row is computed as by `decode_attention`, from the same scores, so that the kept set
    depends neither on the batch nor on how a prompt was cut into chunks.

    Args:
        query: [num_tokens, num_heads, head_dim] in the cache dtype, sequence after sequence; the
            first stride is free.
        kv_cache: [num_blocks, num_kv_heads, block_size, content], see PageLayout; it holds the keys
            of the query tokens, and the V means of every group that they complete.
        layout: the page layout.
        block_table: [num_seqs, max_blocks] int32, the first stride is free; only entries of visible
            keys are read.
        query_start_loc: [num_seqs + 1] int32, first query token of each sequence; from 0 to
            num_tokens.
        seq_lens: [num_seqs] int32, cached keys of the sequence, those of its queries included.
        theta: [num_tokens, num_heads] float32, units of q.k * sm_scale (after soft cap); -inf keeps
            all keys. The first stride is free.
        sm_scale: factor on q.k.
        dense: [num_tokens] bool, rows that ignore theta and keep every key.
        compensation: whether the lost mass goes to the group means, or is dropped.
        window: a row sees its last `window` keys; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for none.
        sinks: [num_heads] float32, an extra logit in the denominator; None for none.
        out: [num_tokens, num_heads, head_dim] in the cache dtype, written; the first stride is
            free.
        num_kept: [num_tokens, num_heads] int32, written: keys kept, all visible ones on dense
            rows.
        v_tiles_read: [num_tokens, num_kv_heads] int32, written: runs of V_TILE keys, aligned to
            position 0, in which any head of the group keeps a key; the row skips the V of all
            others.
        impl: "native" or "torch".
        num_threads: threads (native); None for torch's number.

    Raises:
        ValueError: an argument has another shape, dtype or layout, a block id lies outside the
            cache, or the lengths do not fit together.
        RuntimeError: `impl` is not available here.
    """
    call = cpu_prefill.PrefillCall(
        query=query,
        kv_cache=kv_cache,
        layout=layout,
        block_table=block_table,
        seq_lens=seq_lens,
        theta=theta,
        dense=dense,
        out=out,
        num_kept=num_kept,
        sm_scale=sm_scale,
        compensation=compensation,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        query_start_loc=query_start_loc,
        v_tiles_read=v_tiles_read,
    )
    num_tokens, num_seqs = query.shape[0], seq_lens.shape[0]
    _check_call(call, num_seqs)
    _check("query_start_loc", query_start_loc, (num_seqs + 1,), torch.int32)
    _check("v_tiles_read", v_tiles_read, (num_tokens, kv_cache.shape[1]), torch.int32)
    if impl == "native":
        cpu_prefill.prefill_attention_native(call, num_threads)
    elif impl == "torch":
        cpu_prefill.prefill_attention_torch(call)
    else:
        raise _unknown_impl(impl)


def _check_call(call: cpu.AttentionCall, num_seqs: int) -> None:
    """Raise ValueError unless what decode and prefill share fits together."""
    query, kv_cache, layout = call.query, call.kv_cache, call.layout
    layout.check(kv_cache)
    if query.dim() != 3:
        raise ValueError(f"query must be [num_rows, num_heads, head_dim], got {list(query.shape)}")
    num_rows, num_heads, _ = query.shape
    num_kv_heads, head_dim = kv_cache.shape[1], layout.head_dim
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
    row, heads = (num_rows, num_heads, head_dim), (num_rows, num_heads)
    _check_rows("query", query, row, kv_cache.dtype, (head_dim, 1))
    _check_rows("out", call.out, row, kv_cache.dtype, (head_dim, 1))
    _check_rows("theta", call.theta, heads, torch.float32, (1,))
    _check("dense", call.dense, (num_rows,), torch.bool)
    _check("num_kept", call.num_kept, heads, torch.int32)
    _check_block_table(call.block_table, num_seqs)
    _check("seq_lens", call.seq_lens, (num_seqs,), torch.int32)
    if call.sinks is not None:
        _check("sinks", call.sinks, (num_heads,), torch.float32)
    if call.window is not None and call.window <= 0:
        raise ValueError(f"window must be positive or None, got {call.window}")
    if call.soft_cap is not None and call.soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive or None, got {call.soft_cap}")


def _check_block_table(block_table: Tensor, num_seqs: int) -> None:
    if block_table.dim() != 2:
        raise ValueError(
            f"block_table must be [num_seqs, max_blocks], got {list(block_table.shape)}"
        )
    _check_rows("block_table", block_table, (num_seqs, block_table.shape[1]), torch.int32, (1,))


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless the tensor has this shape and dtype and is contiguous."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        raise _wrong_tensor(name, tensor, shape, dtype)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def _check_rows(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    row_strides: tuple[int, ...],
) -> None:
    """Like _check, with any stride between the rows."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_cpu:
        raise _wrong_tensor(name, tensor, shape, dtype)
    if tensor.stride()[1:] != row_strides and not tensor.is_contiguous():
        raise ValueError(f"the rows of {name} must be contiguous, got strides {tensor.stride()}")


def _wrong_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> ValueError:
    wanted = f"{list(shape)} {dtype} on the CPU"
    return ValueError(f"{name} must be {wanted}, got {_describe(tensor)}")


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _unknown_impl(impl: str) -> ValueError:
    return ValueError(f'impl must be "native" or "torch", got {impl!r}')
