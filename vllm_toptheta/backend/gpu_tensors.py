"""What the GPU kernels read and write from step to step, in tensors that stay in place.

A captured graph freezes addresses, grids and numbers. So everything that varies lies in these
tensors, and everything else depends on the batch size alone. Pruned prompts never run inside a
captured graph: steps that have some get tensors of their own. Row lengths are known on the device
only, and nothing here waits for it.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_toptheta.backend.counts import RankHeads
from vllm_toptheta.backend.gpu_batch import other_rows, requests_and_lens, tokens_of
from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.backend.sidecar import sketches_keys
from vllm_toptheta.kernels.columns import (
    DENSE_LAYER,
    DENSE_NONE,
    DENSE_ROW,
    DENSE_SHORT,
    DENSE_WINDOW,
)
from vllm_toptheta.kernels.triton.checks import NO_WINDOW
from vllm_toptheta.kernels.triton.config import LaunchConfig, choose_num_splits
from vllm_toptheta.kernels.triton.counts import CountedLayers, CountedRows
from vllm_toptheta.kernels.triton.decode import DecodeScratch
from vllm_toptheta.requests import Resolved, Targets

_MAX_SETTINGS = 256
"""Settings kept ready. Clients choose numbers freely, so without a bound they could fill memory."""

_MIN_MASS, _TARGET, _EXCLUDED, _IS_PROMPT, _LOG_MIN_PROB = range(5)
"""Rows of the settings; the slopes of a curve follow the last."""


@dataclass(frozen=True)
class LayerShape:
    """What the layers of one builder have in common.

    Attributes:
        num_heads, num_kv_heads: of this tensor-parallel rank.
        head_dim: width of a K row.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, impls: list[Any], plan: Plan, num_ranks: int) -> "LayerShape":
        """The one shape of some layers.

        Args:
            impls: their implementations.
            plan: options and thresholds.
            num_ranks: tensor-parallel ranks.

        Raises:
            ValueError: their shapes differ, or the ranks' heads are not those of the model.
        """
        shapes = {(impl.num_heads, impl.num_kv_heads, impl.head_dim) for impl in impls}
        if len(shapes) != 1:
            raise ValueError(
                f"toptheta needs layers of one shape in a KV cache group, got {sorted(shapes)}; "
                "serve this model with another --attention-backend"
            )
        shape = cls(*shapes.pop())
        if shape.num_heads * num_ranks != plan.identity.num_heads:
            raise ValueError(
                f"toptheta: layers have {shape.num_heads} query heads on each of {num_ranks} "
                f"ranks, the model has {plan.identity.num_heads} in all; "
                "serve this model with another --attention-backend"
            )
        return shape


@dataclass
class RowTensors:
    """What kernels read and write per query token.

    Attributes:
        settings: [num_settings, num_tokens] float32, see `StepTensors.settings`.
        log_min_prob: [num_layers, num_tokens, num_kv_heads] float32, natural logarithm.
        dense: [num_layers, num_tokens] int8, rows that run without pruning: DENSE_* codes.
        num_kept, lifts, v_tiles_read: [num_layers, num_tokens, num_kv_heads] int32, written by the
            kernels.
        kept_mass: [num_layers, num_tokens, num_heads] float32, written by the kernels.
    """

    settings: Tensor
    log_min_prob: Tensor
    dense: Tensor
    num_kept: Tensor
    lifts: Tensor
    v_tiles_read: Tensor
    kept_mass: Tensor


@dataclass(frozen=True)
class PromptPart:
    """Requests that follow each other and take the prefill kernel.

    Attributes:
        tokens: their tokens in the batch.
        starts: [num_reqs + 1] int32, first token of each, counted from the first of them.
        block_table: [num_reqs, max_blocks] int32.
        seq_lens: [num_reqs] int32.
    """

    tokens: slice
    starts: Tensor
    block_table: Tensor
    seq_lens: Tensor


@dataclass
class StepRows:
    """The query tokens of one step that our kernels attend: those of single-token requests, padding
    of a captured graph included, and all others where prompts are pruned.

    Attributes:
        first: batch row of the first single-token request; they follow each other.
        single: tokens of the single-token requests in the batch.
        single_at: the same in `tensors`.
        block_table: [num_single, max_blocks] int32.
        seq_lens: [num_single] int32, 0 for padding.
        prompts: all other requests, before and behind the single-token ones, or none.
        tensors: per token, of the whole batch where there are `prompts`, else of the single-token
            requests; there may be more than tokens.
    """

    first: int
    single: slice
    single_at: slice
    block_table: Tensor
    seq_lens: Tensor
    prompts: list[PromptPart]
    tensors: RowTensors

    @property
    def num_single(self) -> int:
        """Single-token requests."""
        return len(self.seq_lens)

    @property
    def min_mass(self) -> Tensor:
        """[num_single] float32."""
        return self.tensors.settings[_MIN_MASS, self.single_at]


class StepTensors:
    """Thresholds of layers, settings of rows, and what kernels write.

    Attributes:
        layers: index and window of every layer.
        weights: [num_layers, num_heads, NUM_WEIGHTS] float32, of the compensation.
        first_head: first query head of this rank.
        rank: heads of this rank.
        held: for max_rows single-token requests.
        scratch: partial results of the decode kernel.
    """

    def __init__(
        self,
        plan: Plan,
        indices: list[int],
        windows: list[int | None],
        shape: LayerShape,
        *,
        max_rows: int,
        max_len: int,
        block_size: int,
        launch: LaunchConfig,
        num_units: int,
        device: torch.device,
    ) -> None:
        """Allocate for the layers of one builder.

        Args:
            plan: options and thresholds.
            indices: the layers' indices in the model.
            windows: keys a row of each layer sees at most; None for all.
            shape: heads and head_dim of the layers.
            max_rows: single-token requests of the largest batch.
            max_len: keys of the longest row.
            block_size: tokens per block of the cache.
            launch: launch parameters of the decode kernel.
            num_units: multiprocessors of the device.
            device: where the tensors live.
        """
        self.plan, self.shape, self.device = plan, shape, device
        self.launch, self.num_units, self.max_rows = launch, num_units, max_rows
        rank = get_tensor_model_parallel_rank()
        self.first_head = rank * shape.num_heads
        self.rank = RankHeads.of(plan.identity, shape.num_heads, shape.num_kv_heads, rank)
        self._allocate_layers(indices, windows)
        self._column = functools.lru_cache(_MAX_SETTINGS)(self._make_column)
        self._rows_differ = False
        default = self.settings(torch.zeros(max_rows, dtype=torch.bool), {})
        self.held = self._allocate_rows(default.to(device))
        self.scratch = DecodeScratch.allocate(
            num_rows=max_rows,
            num_parts=max(n * self.num_splits(n) for n in range(1, max_rows + 1)),
            max_len=max_len,
            **asdict(shape),
            block_size=block_size,
            device=device,
            sketch=sketches_keys(plan.config),
        )

    def _allocate_layers(self, indices: list[int], windows: list[int | None]) -> None:
        plan, min_len = self.plan, self.plan.config.min_kv_len

        def tensor(values: list[Any], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        of_rank = plan.of_rank(indices, self.first_head, self.shape.num_heads)
        self.weights, self._offsets = (part.to(self.device) for part in of_rank)
        own = [plan.layer_log_min_prob(index) for index in indices]
        self.layers = CountedLayers(
            index=tensor(indices, torch.int32),
            window=tensor([window or NO_WINDOW for window in windows], torch.int32),
            follows_k=tensor([log is None for log in own], torch.int8),
        )
        self._follows_rows = tensor([[log is None] for log in own], torch.bool)
        self._own_log_min_prob = tensor([[log or 0.0] for log in own])
        excluded = [
            DENSE_LAYER
            if plan.layer_is_dense(index)
            else DENSE_WINDOW
            if window is not None and window <= min_len
            else DENSE_NONE
            for index, window in zip(indices, windows, strict=True)
        ]
        self._layer_excluded = tensor([[code] for code in excluded])
        # Of layers with the same window rows are as long.
        spans, self._span_of = self.layers.window.unique(return_inverse=True)
        self._spans = spans[:, None]
        self._knots = torch.zeros(1) if plan.table is None else plan.table.lengths.log2()
        ends = [*self._knots[1:-1].tolist(), math.inf] if plan.table is not None else []
        self._starts, self._ends = self._knots[:-1].to(self.device), tensor(ends)

    def _allocate_rows(self, settings: Tensor) -> RowTensors:
        shape = (len(self.layers.index), settings.shape[1])
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads

        def zeros(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, *sizes, dtype=dtype, device=self.device)

        return RowTensors(
            settings=settings,
            log_min_prob=zeros(kv_heads, dtype=torch.float32),
            dense=zeros(dtype=torch.int8),
            num_kept=zeros(kv_heads),
            lifts=zeros(kv_heads),
            v_tiles_read=zeros(kv_heads),
            kept_mass=zeros(heads, dtype=torch.float32),
        )

    def num_splits(self, num_rows: int) -> int:
        """Parts to cut each row of a batch into; a function of the batch size alone."""
        return choose_num_splits(
            num_rows, self.shape.num_kv_heads, self.num_units, self.launch.programs_per_unit
        )

    def settings(self, is_prompt: Tensor, options: Mapping[int, Resolved]) -> Tensor:
        """What rows are to do in every layer.

        Args:
            is_prompt: [num_rows] bool on the CPU, rows that are prompt tokens.
            options: what requests asked for, by row, where it is not the default.

        Returns:
            [num_settings, num_rows] float32 on the CPU, pinned for a GPU: share of the mass to
            keep, keys to keep by all heads together (0 where no k rules), the DENSE_* code of rows
            without pruning, 1 for prompt tokens; then the threshold's logarithm as a curve over
            log2 of the row length: its value at the first knot, and its slopes.
        """
        num_settings = _LOG_MIN_PROB + len(self._knots)
        pinned = self.device.type == "cuda"
        rows = torch.empty(num_settings, len(is_prompt), pin_memory=pinned)
        of_prompts, of_others = (
            self._column(self.plan.targets, prompt)[:, None] for prompt in (True, False)
        )
        torch.where(is_prompt, of_prompts, of_others, out=rows)
        for row, asked in options.items():
            if row < len(is_prompt):
                rows[:, row] = self._column(asked.targets, bool(is_prompt[row]))
        return rows

    def _make_column(self, asked: Targets, is_prompt: bool) -> Tensor:
        """The settings of one row."""
        server = self.plan.targets
        target = asked.prefill if is_prompt else asked.decode
        column = torch.zeros(_LOG_MIN_PROB + len(self._knots))
        column[_IS_PROMPT] = is_prompt
        if target is None:
            pruned = (server.prefill if is_prompt else server.decode) is not None
            column[_EXCLUDED] = DENSE_ROW if pruned else DENSE_LAYER
            return column
        column[_MIN_MASS] = target.min_mass
        if target.min_prob is not None:
            column[_LOG_MIN_PROB] = math.log(target.min_prob)
        elif self.plan.table is not None and target.k is not None:
            column[_TARGET] = round(target.k * self.shape.num_heads)
            curve = self.plan.table.curve_at_k(target.k)
            column[_LOG_MIN_PROB] = curve[0]
            column[_LOG_MIN_PROB + 1 :] = curve.diff() / self._knots.diff()
        return column

    def refresh(
        self,
        cam: CommonAttentionMetadata,
        single: slice,
        options: Mapping[int, Resolved],
    ) -> StepRows | None:
        """Look up the thresholds of a step and hand out its rows; None where another kernel attends
        all of them.

        Args:
            cam: the batch.
            single: batch rows of the single-token requests.
            options: what requests asked for, by batch row, where it is not the default.

        Raises:
            RuntimeError: there are more rows than planned for.
        """
        num_single = single.stop - single.start
        if num_single > self.max_rows:
            raise RuntimeError(f"toptheta planned for {self.max_rows} rows, got {num_single}")
        prompts = (
            [] if self.plan.targets.prefill is None else _prompts(cam, other_rows(cam, single))
        )
        if not num_single and not prompts:
            return None
        seq_lens = cam.seq_lens[single]
        # Padding of a captured graph takes a token each, too.
        first_token = int(cam.query_start_loc_cpu[single.start])
        tokens = slice(first_token, first_token + num_single)
        if not prompts:
            at, row_lens, tensors = slice(0, num_single), seq_lens, self.held
            is_prompt = torch.zeros(self.max_rows, dtype=torch.bool)
            _mark_prompts(cam, single, is_prompt)
            rows = range(single.start, single.stop)
            self._write_held(
                is_prompt, {row - single.start: options[row] for row in options if row in rows}
            )
        else:
            at = tokens
            is_prompt = torch.ones(cam.num_reqs, dtype=torch.bool)
            _mark_prompts(cam, single, is_prompt[single])
            request, row_lens = requests_and_lens(cam)
            settings = self.settings(is_prompt, options).to(self.device, non_blocking=True)
            tensors = self._allocate_rows(settings[:, request])
        self._look_up(row_lens, tensors)
        block_table = cam.block_table_tensor[single]
        return StepRows(single.start, tokens, at, block_table, seq_lens, prompts, tensors)

    def _write_held(self, is_prompt: Tensor, options: Mapping[int, Resolved]) -> None:
        """Write what each row is to do; costs nothing where all rows are, and were, alike."""
        differ = bool(options) or bool(is_prompt.any())
        if differ or self._rows_differ:
            self.held.settings.copy_(self.settings(is_prompt, options), non_blocking=True)
        self._rows_differ = differ

    def _look_up(self, row_lens: Tensor, rows: RowTensors) -> None:
        """Write thresholds, and which rows run dense.

        Args:
            row_lens: [num_rows] int32, keys of each row; at most the rows of `rows`.
            rows: their settings are read.
        """
        num_rows = len(row_lens)
        settings = rows.settings[:, :num_rows]
        visible = torch.minimum(row_lens, self._spans)
        curve = settings[_LOG_MIN_PROB]
        if len(self._starts):
            position = visible.clamp(min=1).log2()[..., None]
            past = position.clamp(self._starts, self._ends) - self._starts
            rise = (past * settings[_LOG_MIN_PROB + 1 :].T).sum(-1)
            curve = (curve + rise).clamp(max=0)[self._span_of]
        log_min_prob = torch.where(self._follows_rows, curve, self._own_log_min_prob)
        torch.add(
            log_min_prob[..., None], self._offsets[:, None], out=rows.log_min_prob[:, :num_rows]
        )
        short = (visible <= self.plan.config.min_kv_len)[self._span_of] * float(DENSE_SHORT)
        dense = torch.maximum(torch.maximum(short, self._layer_excluded), settings[_EXCLUDED])
        rows.dense[:, :num_rows].copy_(dense)

    def counted(self, rows: StepRows | None) -> CountedRows:
        """What the counters need of the step's rows."""
        tensors = self.held if rows is None else rows.tensors
        return CountedRows(
            is_prompt=tensors.settings[_IS_PROMPT],
            target=tensors.settings[_TARGET],
            dense=tensors.dense,
            num_kept=tensors.num_kept,
            kept_mass=tensors.kept_mass,
            lifts=tensors.lifts,
            v_tiles_read=tensors.v_tiles_read,
        )


def _prompts(cam: CommonAttentionMetadata, parts: list[slice]) -> list[PromptPart]:
    """Some rows of a batch, as the prefill kernel takes them."""
    found = []
    for rows in parts:
        tokens = tokens_of(cam, rows)
        starts = cam.query_start_loc[rows.start : rows.stop + 1] - tokens.start
        found.append(PromptPart(tokens, starts, cam.block_table_tensor[rows], cam.seq_lens[rows]))
    return found


def _mark_prompts(cam: CommonAttentionMetadata, single: slice, is_prompt: Tensor) -> None:
    """Write which single tokens belong to a prompt.

    Args:
        is_prompt: [at least num_single] bool on the CPU.
    """
    is_prompt[: single.stop - single.start] = False
    if cam.is_prefilling is not None:  # without the padding of a captured graph
        of_prompt = cam.is_prefilling[single]
        is_prompt[: len(of_prompt)] = of_prompt
