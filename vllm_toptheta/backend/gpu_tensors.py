"""What the GPU kernels read and write from step to step, in tensors that stay in place: a plan in,
the rows of a step out.

A captured graph freezes addresses, grids and numbers. So everything that varies lies in these
tensors, and everything else depends on the batch size alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_toptheta.backend.plan import Plan
from vllm_toptheta.kernels.triton_checks import NO_WINDOW
from vllm_toptheta.kernels.triton_config import LaunchConfig, choose_num_splits
from vllm_toptheta.kernels.triton_counts import CountedLayers, CountedRows
from vllm_toptheta.kernels.triton_decode import DecodeScratch
from vllm_toptheta.kernels.triton_theta import lookup_theta
from vllm_toptheta.request_options import RequestOptions


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
            ValueError: their shapes differ, or the ranks' heads are not those of the table.
        """
        shapes = {(impl.num_heads, impl.num_kv_heads, impl.head_dim) for impl in impls}
        if len(shapes) != 1:
            raise ValueError(
                f"toptheta needs layers of one shape in a KV cache group, got {sorted(shapes)}; "
                "serve this model with another --attention-backend"
            )
        shape = cls(*shapes.pop())
        if shape.num_heads * num_ranks != plan.table.num_heads:
            raise ValueError(
                f"toptheta: layers have {shape.num_heads} query heads on each of {num_ranks} "
                f"ranks, the threshold table has {plan.table.num_heads} in all; "
                "serve this model with another --attention-backend"
            )
        return shape


@dataclass
class DecodeRows:
    """The single-token rows of one step; every tensor is a view of persistent ones.

    Attributes:
        num_rows: rows, padding of a captured graph included; they come first in the batch.
        block_table: [num_rows, max_blocks] int32.
        seq_lens: [num_rows] int32, 0 for padding.
        theta: [num_layers, num_rows, num_heads] float32, units of q.k * sm_scale.
        dense: [num_layers, num_rows] int8, rows that run without pruning.
        num_kept: [num_layers, num_rows, num_heads] int32, written by the kernel.
        v_rows_read: [num_layers, num_rows, num_kv_heads] int32, written by the kernel.
        num_splits: parts a row is cut into.
        config: launch parameters.
        scratch: partial results.
    """

    num_rows: int
    block_table: Tensor
    seq_lens: Tensor
    theta: Tensor
    dense: Tensor
    num_kept: Tensor
    v_rows_read: Tensor
    num_splits: int
    config: LaunchConfig
    scratch: DecodeScratch


class StepTensors:
    """Thresholds per layer, wishes per row, and results per (layer, row).

    Attributes:
        max_rows: rows there is room for.
        layers: index, window and k of every layer.
        layer_dense: [num_layers] int8.
        row_wishes: [4, max_rows] float32, see `wishes`.
        theta, dense, num_kept, v_rows_read: see DecodeRows, for max_rows rows.
    """

    def __init__(
        self,
        plan: Plan,
        indices: list[int],
        windows: list[int | None],
        shape: LayerShape,
        *,
        max_rows: int,
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
            max_rows: rows of the largest batch.
            launch: launch parameters of the kernels.
            num_units: multiprocessors of the device.
            device: where the tensors live.
        """
        self.plan, self.shape, self.device = plan, shape, device
        self.launch, self.num_units, self.max_rows = launch, num_units, max_rows
        self._allocate_layers(indices, windows)
        self._allocate_rows(len(indices))

    def _allocate_layers(self, indices: list[int], windows: list[int | None]) -> None:
        plan, device, num_heads = self.plan, self.device, self.shape.num_heads
        first = get_tensor_model_parallel_rank() * num_heads
        table = plan.table.slice_heads(first, first + num_heads)
        own = [plan.layer_k(i) if self._has_own_k(i) else 0.0 for i in indices]
        level = [self.level_of(k) if k else 0.0 for k in own]
        dense = [plan.layer_is_dense(i) for i in indices]
        spans = [window or NO_WINDOW for window in windows]
        self.theta_table = table.theta[:, indices].transpose(0, 1).contiguous().to(device)
        self.slope_table = table.slope[:, indices].transpose(0, 1).contiguous().to(device)
        self.log2_lengths = table.lengths.log2().to(device)
        self.layers = CountedLayers(
            index=torch.tensor(indices, dtype=torch.int32, device=device),
            window=torch.tensor(spans, dtype=torch.int32, device=device),
            k=torch.tensor(own, dtype=torch.float32, device=device),
            level=torch.tensor(level, dtype=torch.float32, device=device),
            log2_head_k=table.head_k[:, indices].log2().contiguous().to(device),
        )
        self.layer_dense = torch.tensor(dense, dtype=torch.int8, device=device)

    def _has_own_k(self, index: int) -> bool:
        override = self.plan.config.layers.get(index)
        return override is not None and override.k is not None

    def _allocate_rows(self, num_layers: int) -> None:
        rows, shape = self.max_rows, self.shape

        def zeros(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(num_layers, rows, *sizes, dtype=dtype, device=self.device)

        self.row_wishes = self.wishes(torch.zeros(rows, dtype=torch.bool), {}).to(self.device)
        self._rows_differ = False
        self.theta = zeros(shape.num_heads, dtype=torch.float32)
        self.dense = zeros(dtype=torch.int8)
        self.num_kept = zeros(shape.num_heads)
        self.v_rows_read = zeros(shape.num_kv_heads)
        parts = max(n * self.num_splits(n) for n in range(1, rows + 1))
        self.scratch = DecodeScratch.allocate(
            parts, shape.num_heads, shape.num_kv_heads, shape.head_dim, self.device
        )

    def level_of(self, k: float) -> float:
        """Position of a k among the table's levels: the index of the lower one plus the weight of
        the upper one, linear in log2(k).
        """
        levels = self.plan.table.levels.tolist()
        if k <= levels[0]:
            return 0.0
        for index, (low, high) in enumerate(zip(levels, levels[1:], strict=False)):
            if k <= high:
                weight = (math.log2(k) - math.log2(low)) / (math.log2(high) - math.log2(low))
                return index + weight
        return float(len(levels) - 1)

    def num_splits(self, num_rows: int) -> int:
        """Parts to cut each row of a batch into; a function of the batch size alone."""
        return choose_num_splits(
            num_rows, self.shape.num_kv_heads, self.num_units, self.launch.programs_per_unit
        )

    def wishes(self, is_prompt: Tensor, options: Mapping[int, RequestOptions]) -> Tensor:
        """What rows are to do in every layer.

        Args:
            is_prompt: [num_rows] bool on the CPU, rows that are prompt tokens.
            options: what requests asked for, by row, where it is not the default.

        Returns:
            [4, num_rows] float32 on the CPU, pinned for a GPU: mean keys a row keeps, their
            position among the levels, 1 where the row runs dense, 1 where it is a prompt token.
        """
        plan, num_rows = self.plan, len(is_prompt)
        config = plan.config
        rows = torch.empty(4, num_rows, pin_memory=self.device.type == "cuda")
        rows[0] = torch.where(is_prompt, config.prefill_k, config.k)
        rows[1] = torch.where(is_prompt, self.level_of(config.prefill_k), self.level_of(config.k))
        rows[2] = is_prompt if config.phases == "decode" else ~is_prompt
        if config.phases == "both":
            rows[2] = 0
        rows[3] = is_prompt
        for row, asked in options.items():
            if row < num_rows and asked.k is not None:
                rows[0, row], rows[1, row] = asked.k, self.level_of(asked.k)
            if row < num_rows and asked.off:
                rows[2, row] = 1
        return rows

    def look_up(self, seq_lens: Tensor, row_wishes: Tensor, out: Tensor, dense: Tensor) -> None:
        """Look up thresholds of rows in every layer.

        Args:
            seq_lens: [num_rows] int32, keys of each row.
            row_wishes: [4, at least num_rows] float32 on the device, see `wishes`.
            out: [num_layers, at least num_rows, num_heads] float32, written.
            dense: [num_layers, at least num_rows] int8, written with DENSE_* codes.
        """
        lookup_theta(
            self.theta_table,
            self.slope_table,
            self.log2_lengths,
            layer_window=self.layers.window,
            layer_k=self.layers.k,
            layer_level=self.layers.level,
            layer_dense=self.layer_dense,
            seq_lens=seq_lens,
            row_k=row_wishes[0],
            row_level=row_wishes[1],
            row_dense=row_wishes[2],
            min_len=self.plan.config.min_kv_len,
            out=out,
            dense=dense,
        )

    def refresh(
        self,
        seq_lens: Tensor,
        block_table: Tensor,
        is_prefilling: Tensor | None,
        options: Mapping[int, RequestOptions],
    ) -> DecodeRows:
        """Look up the thresholds of a step and hand out its rows.

        Args:
            seq_lens: [num_rows] int32 on the device, 0 for padding.
            block_table: [at least num_rows, max_blocks] int32 on the device.
            is_prefilling: [at most num_rows] bool on the CPU, rows that are prompt tokens.
            options: what requests asked for, by row, where it is not the default.

        Raises:
            RuntimeError: there are more rows than planned for.
        """
        num_rows = seq_lens.shape[0]
        if num_rows > self.max_rows:
            raise RuntimeError(f"toptheta planned for {self.max_rows} rows, got {num_rows}")
        self._write_rows(is_prefilling, options)
        self.look_up(seq_lens, self.row_wishes, self.theta, self.dense)
        return DecodeRows(
            num_rows=num_rows,
            block_table=block_table[:num_rows],
            seq_lens=seq_lens,
            theta=self.theta[:, :num_rows],
            dense=self.dense[:, :num_rows],
            num_kept=self.num_kept[:, :num_rows],
            v_rows_read=self.v_rows_read[:, :num_rows],
            num_splits=self.num_splits(num_rows),
            config=self.launch,
            scratch=self.scratch,
        )

    def counted(self, num_rows: int) -> CountedRows:
        """What the counters need of the step's rows."""
        return CountedRows(
            is_prompt=self.row_wishes[3],
            level=self.row_wishes[1],
            dense=self.dense,
            num_kept=self.num_kept,
            v_rows_read=self.v_rows_read,
            num_rows=num_rows,
        )

    def _write_rows(
        self, is_prefilling: Tensor | None, options: Mapping[int, RequestOptions]
    ) -> None:
        """Write what each row is to do; costs nothing where all rows are, and were, alike."""
        prompt = is_prefilling is not None and bool(is_prefilling.any())
        if not (prompt or options or self._rows_differ):
            return
        is_prompt = torch.zeros(self.max_rows, dtype=torch.bool)
        if is_prefilling is not None:
            is_prompt[: len(is_prefilling)] = is_prefilling
        self.row_wishes.copy_(self.wishes(is_prompt, options), non_blocking=True)
        self._rows_differ = prompt or bool(options)
