"""Paged caches, thresholds in the gaps between scores, and float64 references for the Triton kernel
tests.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_toptheta.kernels.reference import (
    attention_scores,
    attention_weights,
    count_v_rows,
    select_by_theta,
    weighted_values,
)


@dataclass
class Case:
    """One decode batch and what it is run with; cache tensors are filled with NaN outside the
    visible keys.
    """

    lens: list[int]
    num_kv_heads: int = 2
    heads: int = 3
    head_dim: int = 64
    block_size: int = 16
    group_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None
    k: int = 8
    window: int | None = None
    soft_cap: float | None = None
    with_sinks: bool = False
    compensation: bool = True
    dense_rows: tuple[int, ...] = ()
    best_only_rows: tuple[int, ...] = ()
    head_major: bool = False
    seed: int = 0
    sm_scale: float = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.num_heads = self.num_kv_heads * self.heads
        self.sm_scale = 1 / math.sqrt(self.head_dim)
        self.scales = (0.5, 2.0) if self.cache_dtype else (1.0, 1.0)
        num_seqs, size = len(self.lens), self.block_size
        max_blocks = max(math.ceil(n / size) for n in self.lens) + 1
        num_blocks = num_seqs * max_blocks + 1
        order = torch.randperm(num_blocks, generator=generator).int()
        self.block_table = order[: num_seqs * max_blocks].view(num_seqs, max_blocks).clone()
        self.seq_lens = torch.tensor(self.lens, dtype=torch.int32)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.query = normal(num_seqs, self.num_heads, self.head_dim).mul(2).to(self.dtype)
        self.sinks = normal(self.num_heads) if self.with_sinks else None
        stored = self.cache_dtype or self.dtype
        rows = torch.full((num_blocks, size, self.num_kv_heads, 2 * self.head_dim), math.nan)
        self.keys, self.values = [], []
        for seq, length in enumerate(self.lens):
            key = normal(length, self.num_kv_heads, self.head_dim).to(stored)
            # V has an offset, so that means matter.
            value = (normal(length, self.num_kv_heads, self.head_dim) + 0.5).to(stored)
            self.keys.append(key.double() * self.scales[0])
            self.values.append(value.double() * self.scales[1])
            for position in range(length):
                block = int(self.block_table[seq, position // size])
                row = torch.cat([key[position].float(), value[position].float()], dim=-1)
                rows[block, position % size] = row
        kv = rows.to(stored)
        if self.head_major:
            kv = kv.transpose(1, 2).contiguous().transpose(1, 2)
        self.kv_cache = kv.transpose(1, 2)  # [num_blocks, num_kv_heads, block_size, 2 * head_dim]
        self.key_cache, self.value_cache = self.kv_cache.split(self.head_dim, dim=-1)
        self.theta = self._theta()
        self.dense = torch.zeros(num_seqs, dtype=torch.int8)
        self.dense[list(self.dense_rows)] = 1

    def scores(self, seq: int) -> Tensor:
        """[num_heads, length] float64."""
        scores = attention_scores(
            self.query[seq : seq + 1].double(),
            self.keys[seq],
            torch.tensor([self.lens[seq]]),
            sm_scale=self.sm_scale,
            window=self.window,
            soft_cap=self.soft_cap,
        )
        return scores[:, 0]

    def _theta(self) -> Tensor:
        """Thresholds between the scores of rank k and k + 1, in gaps wider than rounding."""
        theta = torch.zeros(len(self.lens), self.num_heads)
        for seq, length in enumerate(self.lens):
            if length == 0:
                continue
            ordered = self.scores(seq).sort(dim=-1, descending=True).values
            for head in range(self.num_heads):
                visible = ordered[head][ordered[head] > -math.inf]
                if seq in self.best_only_rows and head % 2 == 0:
                    theta[seq, head] = float(visible[0]) + 1
                    continue
                if len(visible) <= self.k:
                    theta[seq, head] = -1e30
                    continue
                gaps = visible[self.k - 1 : -1] - visible[self.k :]
                wide = int((gaps > 1e-3).int().argmax())
                theta[seq, head] = float(visible[self.k - 1 + wide] + visible[self.k + wide]) / 2
        return theta

    def expected(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output (float64), num_kept, v_rows_read and log-sum-exp of the specification."""
        num_seqs = len(self.lens)
        out = torch.zeros(num_seqs, self.num_heads, self.head_dim, dtype=torch.float64)
        kept_counts = torch.zeros(num_seqs, self.num_heads, dtype=torch.int32)
        rows = torch.zeros(num_seqs, self.num_kv_heads, dtype=torch.int32)
        lse = torch.full((num_seqs, self.num_heads), -math.inf, dtype=torch.float64)
        sinks = None if self.sinks is None else self.sinks.double()
        for seq, length in enumerate(self.lens):
            if length == 0:
                continue
            scores = self.scores(seq)[:, None]
            theta = self.theta[seq].double()[:, None]
            if self.dense[seq]:
                theta = torch.full_like(theta, -math.inf)
            kept = select_by_theta(scores, theta)
            group_size = self.group_size if self.compensation else None
            weights = attention_weights(scores, kept, group_size=group_size, sinks=sinks)
            out[seq] = weighted_values(weights, self.values[seq])[0]
            kept_counts[seq] = kept.sum(-1)[:, 0].int()
            rows[seq] = count_v_rows(kept, self.num_kv_heads)[0].int()
            logits = scores if sinks is None else torch.cat([scores, sinks.view(-1, 1, 1)], -1)
            lse[seq] = logits.logsumexp(-1)[:, 0]
        return out, kept_counts, rows, lse

    def slots(self) -> Tensor:
        """Slots of all visible tokens, as one slot_mapping."""
        size = self.block_size
        return torch.tensor(
            [
                int(self.block_table[seq, position // size]) * size + position % size
                for seq, length in enumerate(self.lens)
                for position in range(length)
            ],
            dtype=torch.int64,
        )


@dataclass
class Result:
    out: Tensor
    num_kept: Tensor
    v_rows_read: Tensor
    lse: Tensor


def new_means(case: Case) -> Tensor:
    """Means of no group yet: NaN."""
    num_blocks = case.kv_cache.shape[0]
    shape = (num_blocks, case.num_kv_heads, case.block_size // case.group_size, case.head_dim)
    return torch.full(shape, math.nan, dtype=case.dtype)


def run(
    case: Case, *, num_splits: int = 3, tile: int | None = None, rows: list[int] | None = None
) -> Result:
    """Run means, splits and merge under the interpreter; `rows` picks a part of the batch."""
    from vllm_toptheta.kernels.triton_config import LaunchConfig
    from vllm_toptheta.kernels.triton_decode import DecodeScratch, decode_attention
    from vllm_toptheta.kernels.triton_means import update_v_means

    chosen = list(range(len(case.lens))) if rows is None else rows
    v_means = None
    if case.compensation:
        v_means = new_means(case)
        update_v_means(case.value_cache, v_means, case.slots())
    num_seqs = len(chosen)
    scratch = DecodeScratch.allocate(
        num_seqs * num_splits, case.num_heads, case.num_kv_heads, case.head_dim, "cpu"
    )
    for tensor in (scratch.acc, scratch.softmax):
        tensor.fill_(math.nan)  # whatever is read without being written shows
    for tensor in (scratch.best, scratch.kept, scratch.rows):
        tensor.fill_(-(10**6))
    out = torch.full((num_seqs, case.num_heads, case.head_dim), math.nan, dtype=case.dtype)
    num_kept = torch.full((num_seqs, case.num_heads), -1, dtype=torch.int32)
    v_rows_read = torch.full((num_seqs, case.num_kv_heads), -1, dtype=torch.int32)
    lse = torch.full((num_seqs, case.num_heads), math.nan)
    quantised = case.cache_dtype is not None
    decode_attention(
        case.query[chosen],
        case.key_cache,
        case.value_cache,
        v_means,
        case.block_table[chosen],
        case.seq_lens[chosen],
        case.theta[chosen],
        sm_scale=case.sm_scale,
        dense=case.dense[chosen],
        out=out,
        num_kept=num_kept,
        v_rows_read=v_rows_read,
        scratch=scratch,
        num_splits=num_splits,
        config=LaunchConfig(tile=tile or max(32, case.group_size), min_tiles=1),
        window=case.window,
        soft_cap=case.soft_cap,
        sinks=case.sinks,
        k_scale=torch.tensor([case.scales[0]]) if quantised else None,
        v_scale=torch.tensor([case.scales[1]]) if quantised else None,
        lse=lse,
    )
    return Result(out, num_kept, v_rows_read, lse)
