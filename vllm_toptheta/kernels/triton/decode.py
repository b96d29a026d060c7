"""Launches the decode kernels: one query token per sequence on a GPU.

Five launches, fit for CUDA graphs: grids depend on the batch size and the number of splits alone,
and everything that varies from step to step is read from device memory. `scan` reads K once and
knows no threshold; what the others read depends on what it found.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vllm_toptheta.kernels.layout import LONG_GROUP, NUM_WEIGHTS, group_size_of
from vllm_toptheta.kernels.sketch import Sketch
from vllm_toptheta.kernels.triton.checks import (
    MAX_HEADS_PER_KV_HEAD,
    NO_WINDOW,
    check_contiguous,
    check_log_min_prob,
    check_scales,
    check_tensors,
)
from vllm_toptheta.kernels.triton.config import MAX_SPLITS, LaunchConfig
from vllm_toptheta.kernels.triton.floor import _floor_kernel
from vllm_toptheta.kernels.triton.gather import _gather_kernel
from vllm_toptheta.kernels.triton.merge import _merge_kernel
from vllm_toptheta.kernels.triton.rows import LEVELS_PADDED, STATE
from vllm_toptheta.kernels.triton.runs import CHUNK_RUNS, RUN
from vllm_toptheta.kernels.triton.scan import _scan_kernel
from vllm_toptheta.kernels.triton.select import _select_kernel
from vllm_toptheta.kernels.triton.sketch import _centres_kernel, check_sketch


@dataclass(frozen=True)
class DecodeScratch:
    """What the decode kernels pass to each other; one set serves all layers, one after another.

    Nothing in it has to be set before. By row and kv head, by row and query head ("head"), or by
    head and split:

    Attributes:
        group_max, group_sum: [num_rows, num_heads, max_groups] float32, greatest score of each
            compensation group as an exponent of 2, and its sum of exponentials.
        centre_scores: the same of the groups' mean keys, see `sketch._centres_kernel`; None
            without a sketch, and so are the next two.
        query_codes: [num_rows, num_heads, head_dim] int8.
        query_steps: [num_rows, num_heads] float32, what a code of 1 is.
        run_steps: [num_rows, num_heads, runs] uint8, see `runs._count_steps`.
        state: [num_rows, num_heads, 3] float32, see `rows.STATE`.
        best_run: [num_rows, num_heads] int32, run of the best key.
        levels: [num_rows, num_kv_heads, 2] int32, fewest and most lifts.
        mass: [num_rows, num_heads, 16] int32, mass kept at each level.
        runs, run_places: int32, CHUNK_RUNS for each kv head and split: the list of a
            part of a row.
        run_mass: float32, CHUNK_RUNS for each head and split: what is kept of them.
        acc, on_means: float32, [head_dim] for each head and split: kept V rows and means.
        mean_sum: float32, [head_dim] for each kv head and split.
        softmax: float32, maximum and sum for each head and split.
        kept: int32, keys kept for each kv head and split.
        num_rows: rows of a batch there is room for.
        num_parts: (row, split) pairs there is room for.
        max_len: keys of a row there is room for.
    """

    group_max: Tensor
    group_sum: Tensor
    centre_scores: Tensor | None
    query_codes: Tensor | None
    query_steps: Tensor | None
    run_steps: Tensor
    state: Tensor
    best_run: Tensor
    levels: Tensor
    mass: Tensor
    runs: Tensor
    run_places: Tensor
    run_mass: Tensor
    acc: Tensor
    on_means: Tensor
    mean_sum: Tensor
    softmax: Tensor
    kept: Tensor
    num_rows: int
    num_parts: int
    max_len: int

    @classmethod
    def allocate(
        cls,
        *,
        num_rows: int,
        num_parts: int,
        max_len: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        device: torch.device | str,
        sketch: bool = False,
    ) -> "DecodeScratch":
        """Room for batches of up to `num_rows` rows, `num_parts` (row, split) pairs and `max_len`
        keys a row; with a sketch of K or without."""
        max_longs = -(-max_len // LONG_GROUP)

        def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*sizes, dtype=dtype, device=device)

        max_keys, int32 = max_longs * LONG_GROUP, torch.int32
        groups = empty(2 + sketch, num_rows, num_heads, max_keys // group_size_of(block_size))
        return cls(
            group_max=groups[0],
            group_sum=groups[1],
            centre_scores=groups[2] if sketch else None,
            query_codes=empty(num_rows, num_heads, head_dim, dtype=torch.int8) if sketch else None,
            query_steps=empty(num_rows, num_heads) if sketch else None,
            run_steps=empty(num_rows, num_heads, max_keys // RUN.value, dtype=torch.uint8),
            state=empty(num_rows, num_heads, STATE.value),
            best_run=empty(num_rows, num_heads, dtype=int32),
            levels=empty(num_rows, num_kv_heads, 2, dtype=int32),
            mass=empty(num_rows, num_heads, LEVELS_PADDED.value, dtype=int32),
            runs=empty(num_parts, num_kv_heads, CHUNK_RUNS.value, dtype=int32),
            run_places=empty(num_parts, num_kv_heads, CHUNK_RUNS.value, dtype=int32),
            run_mass=empty(num_parts, num_heads, CHUNK_RUNS.value),
            acc=empty(num_parts, num_heads, head_dim),
            on_means=empty(num_parts, num_heads, head_dim),
            mean_sum=empty(num_parts, num_kv_heads, head_dim),
            softmax=empty(num_parts, num_heads, 2),
            kept=empty(num_parts, num_kv_heads, dtype=int32),
            num_rows=num_rows,
            num_parts=num_parts,
            max_len=max_keys,
        )


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    v_means: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    log_min_prob: Tensor,
    min_mass: Tensor,
    *,
    sm_scale: float,
    dense: Tensor,
    weights: Tensor,
    out: Tensor,
    num_kept: Tensor,
    kept_mass: Tensor,
    lifts: Tensor,
    scratch: DecodeScratch,
    num_splits: int,
    config: LaunchConfig,
    sketch: Sketch | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Attend one query token per sequence to its cached keys, by the rule of decode rows:
    `reference.select` and `reference.compensated_output`.

    The kept set depends neither on the batch nor on the number of splits. V rows that are not kept
    are not read.

    Args:
        query: [num_seqs, num_heads, head_dim] bfloat16 or float16; the first stride is free.
        key_cache: [num_blocks, num_kv_heads, block_size, head_dim], the query's dtype or a float8;
            strides are free but the last, which is 1.
        value_cache: as key_cache, with the same strides.
        v_means: [num_blocks, num_kv_heads, block_size // group_size, head_dim] in the query's
            dtype, valid for complete groups.
        block_table: [num_seqs, max_blocks] int32, the first stride is free; only entries of visible
            keys are read.
        seq_lens: [num_seqs] int32, cached keys of the row, its own included, at most
            scratch.max_len; 0 for padding, which yields zeros.
        log_min_prob: [num_seqs, num_kv_heads] float32, natural logarithm; the first stride is
            free.
        min_mass: [num_seqs] float32, 0 for no floor.
        sm_scale: factor on q.k.
        dense: [num_seqs] int8, rows that keep every key where not 0.
        weights: [num_heads, NUM_WEIGHTS] float32.
        out: [num_seqs, num_heads, head_dim], written; the first stride is free.
        num_kept: [num_seqs, num_kv_heads] int32, written: keys kept (all visible ones on dense
            rows).
        kept_mass: [num_seqs, num_heads] float32, written: the kept keys' share of the probability
            of all keys, 1 on dense rows.
        lifts: [num_seqs, num_kv_heads] int32, written: how often the floor halved the threshold.
        scratch: room for the batch.
        num_splits: parts a row is cut into.
        config: launch parameters.
        sketch: of K, as views of its pages, which rows that are not dense scan in its place; None
            for none. See `sketch.check_sketch`.
        window: a row sees its last `window` keys; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for none.
        sinks: [num_heads] float32, an extra logit in the denominator; None for none.
        k_scale: [1] float32, factor on stored K; None for 1.
        v_scale: [1] float32, factor on stored V and means; both scales or neither are given.

    Raises:
        ValueError: an argument has another shape, dtype or layout, or a size is not supported. The
            contents of seq_lens are on the device and not looked at.
    """
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    check_tensors(query, key_cache, value_cache, v_means, block_table, num_seqs, out)
    check_log_min_prob(log_min_prob, num_seqs, num_kv_heads)
    group_size = group_size_of(block_size)
    if LONG_GROUP % config.tile or config.tile % group_size:
        raise ValueError(
            f"config.tile must be whole groups of {group_size} keys and divide {LONG_GROUP}, got "
            f"{config.tile}"
        )
    if sketch is not None:
        check_sketch(sketch, key_cache)
        if scratch.centre_scores is None or config.tile != group_size:
            raise ValueError(
                f"with a sketch of K config.tile must be {group_size}, got {config.tile}, and "
                "scratch allocated with one"
            )
    _check_room(scratch, num_seqs, num_splits)
    check_contiguous(
        (
            ("seq_lens", seq_lens, (num_seqs,), torch.int32),
            ("min_mass", min_mass, (num_seqs,), torch.float32),
            ("dense", dense, (num_seqs,), torch.int8),
            ("weights", weights, (num_heads, NUM_WEIGHTS), torch.float32),
            ("num_kept", num_kept, (num_seqs, num_kv_heads), torch.int32),
            ("kept_mass", kept_mass, (num_seqs, num_heads), torch.float32),
            ("lifts", lifts, (num_seqs, num_kv_heads), torch.int32),
            ("sinks", sinks, (num_heads,), torch.float32),
        )
    )
    check_scales(k_scale, v_scale)
    if num_seqs == 0:
        return

    heads = num_heads // num_kv_heads
    span = NO_WINDOW if window is None else window
    max_groups = scratch.group_max.shape[2]
    scored = (sm_scale, soft_cap or 0.0, span)
    strides = (query.stride(0), block_table.stride(0), *key_cache.stride()[:3])
    codes, scales, centres, bounds = sketch or (None,) * 4
    page = 0 if sketch is None else key_cache.stride(0) * key_cache.element_size()
    strides += (page,)
    sizes = {
        "HEADS": heads,
        "HEADS_PADDED": MAX_HEADS_PER_KV_HEAD,
        "HEAD_DIM": head_dim,
        "DIM_PADDED": triton.next_power_of_2(head_dim),
        "BLOCK_SIZE": block_size,
        "GROUP_SIZE": group_size,
        "TILE": config.tile,
        "SOFT_CAP": bool(soft_cap),
        "SCALED": k_scale is not None,
        "SKETCH": sketch is not None,
        "num_warps": config.num_warps,
    }
    grid = (num_kv_heads, num_splits, num_seqs)
    sketched = (scratch.query_codes, scratch.query_steps, scratch.centre_scores)
    if sketch is not None:
        _centres_kernel[grid](
            query,
            centres,
            bounds,
            block_table,
            seq_lens,
            dense,
            *sketched,
            sm_scale,
            span,
            max_groups,
            *strides[:2],
            page,
            HEADS=heads,
            HEADS_PADDED=MAX_HEADS_PER_KV_HEAD,
            HEAD_DIM=head_dim,
            DIM_PADDED=triton.next_power_of_2(head_dim),
            BLOCK_SIZE=block_size,
            num_warps=4,
        )
    scans = min(num_splits * config.scans_per_split, MAX_SPLITS)
    _scan_kernel[(num_kv_heads, scans, num_seqs)](
        query,
        key_cache,
        codes,
        scales,
        block_table,
        seq_lens,
        dense,
        k_scale,
        *sketched,
        scratch.group_max,
        scratch.group_sum,
        scratch.run_steps,
        *scored,
        max_groups,
        *strides,
        MIN_TILES=config.min_tiles,
        num_stages=config.num_stages,
        **sizes,
    )
    chosen = (scratch.state, scratch.best_run, scratch.levels, scratch.mass)
    listed = (scratch.runs, scratch.run_places, scratch.run_mass)
    _select_kernel[(num_kv_heads, num_seqs)](
        seq_lens,
        dense,
        log_min_prob,
        min_mass,
        sinks,
        scratch.group_max,
        scratch.group_sum,
        scratch.run_steps,
        *chosen,
        span,
        max_groups,
        log_min_prob.stride(0),
        HEADS=heads,
        HEADS_PADDED=triton.next_power_of_2(heads),
        GROUP_SIZE=group_size,
        TILE=config.tile,
        SINKS=sinks is not None,
        num_warps=4,
    )
    _floor_kernel[grid](
        query,
        key_cache,
        codes,
        scales,
        block_table,
        seq_lens,
        dense,
        k_scale,
        *sketched,
        scratch.group_max,
        scratch.run_steps,
        *chosen,
        *listed,
        *scored,
        max_groups,
        *strides,
        LIST_PADDED=triton.next_power_of_2(heads),
        num_stages=config.gather_stages,
        **sizes,
    )
    parts = (scratch.acc, scratch.on_means, scratch.mean_sum, scratch.softmax, scratch.kept)
    _gather_kernel[grid](
        query,
        key_cache,
        codes,
        scales,
        value_cache,
        v_means,
        block_table,
        seq_lens,
        dense,
        min_mass,
        weights,
        k_scale,
        *sketched,
        scratch.group_max,
        scratch.group_sum,
        scratch.run_steps,
        *chosen,
        *listed,
        *parts,
        *scored,
        max_groups,
        *strides,
        *v_means.stride()[:3],
        MIN_TILES=config.min_tiles,
        LIST_PADDED=triton.next_power_of_2(heads),
        num_stages=config.gather_stages,
        **sizes,
    )
    _merge_kernel[(num_heads, num_seqs)](
        seq_lens,
        dense,
        min_mass,
        weights,
        sinks,
        v_scale,
        scratch.state,
        scratch.levels,
        scratch.mass,
        *parts,
        out,
        num_kept,
        kept_mass,
        lifts,
        span,
        num_splits,
        out.stride(0),
        HEADS=heads,
        HEADS_PADDED=triton.next_power_of_2(heads),
        HEAD_DIM=head_dim,
        DIM_PADDED=triton.next_power_of_2(head_dim),
        GROUP_SIZE=group_size,
        TILE=config.tile,
        MIN_TILES=config.min_tiles,
        CHUNK=32 if head_dim <= 128 else 16,
        SINKS=sinks is not None,
        SCALED=v_scale is not None,
        num_warps=4,
    )


def _check_room(scratch: DecodeScratch, num_seqs: int, num_splits: int) -> None:
    if not 1 <= num_splits <= MAX_SPLITS:
        raise ValueError(f"num_splits must be 1 to {MAX_SPLITS}, got {num_splits}")
    if num_seqs > scratch.num_rows or num_seqs * num_splits > scratch.num_parts:
        raise ValueError(
            f"scratch has room for {scratch.num_rows} rows and {scratch.num_parts} parts, "
            f"{num_seqs} sequences of {num_splits} splits need {num_seqs * num_splits} parts"
        )
