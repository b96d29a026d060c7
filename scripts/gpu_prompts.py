"""Prompts for the GPU scripts: the prefill kernel on a paged cache, and what float64 says about
some of its rows; needs torch and triton only.
"""

import math
from collections.abc import Iterable

import torch
from gpu_lib import Batch, Machine, Shape, error_of_budget
from torch import Tensor

from vllm_toptheta.kernels.cpu_prefill import V_TILE
from vllm_toptheta.kernels.reference import attention_scores
from vllm_toptheta.kernels.triton_config import choose_prefill_config
from vllm_toptheta.kernels.triton_prefill import prefill_attention

CHECKED_ROWS = 24  # of a prompt, spread evenly: float64 attention of all rows would not fit


class PromptBatch(Batch):
    """The last tokens of every row of a batch as queries.

    Attributes:
        query_lens: query tokens of each row.
        row_lens: [num_tokens], keys that each of them sees, windows left aside.
    """

    def __init__(self, shape: Shape, query_lens: tuple[int, ...], machine: Machine, seed: int = 0):
        super().__init__(shape, machine, seed)
        device = self.device
        self.query_lens = query_lens
        self.starts = [sum(query_lens[:seq]) for seq in range(len(query_lens) + 1)]
        tokens = self.starts[-1]
        generator = torch.Generator(device=device).manual_seed(seed + 1)
        query = torch.empty(tokens, shape.num_heads, shape.head_dim, device=device)
        self.query = query.normal_(generator=generator).to(shape.dtype)
        self.query_start_loc = torch.tensor(self.starts, dtype=torch.int32, device=device)
        spans = zip(shape.lens, query_lens, strict=True)
        self.row_lens = torch.cat([torch.arange(n - q, n) + 1 for n, q in spans]).to(device)
        self.dense = self.dense_flags()
        self.all_dense = torch.ones_like(self.dense)
        self.theta = self.gaussian_theta()
        self.prompt_config = choose_prefill_config(
            head_dim=shape.head_dim,
            group_size=shape.group_size,
            cache_bytes=shape.stored.itemsize,
            warp_size=64 if torch.version.hip else 32,
        )
        self.out = torch.empty_like(self.query)
        self.num_kept = self._counts(shape.num_heads)
        self.v_tiles_read = self._counts(shape.num_kv_heads)

    def _counts(self, columns: int) -> Tensor:
        return torch.empty(self.starts[-1], columns, dtype=torch.int32, device=self.device)

    def attend(self, *, dense: Tensor | None = None, chunk: int | None = None) -> None:
        """Compute the prompts, whole or some tokens of every row at a time; results lie in out,
        num_kept and v_tiles_read.
        """
        if chunk is None:
            self._attend(slice(None), self.query_start_loc, self.seq_lens, dense)
            return
        for seq, (length, query_len) in enumerate(
            zip(self.shape.lens, self.query_lens, strict=True)
        ):
            for first in range(0, query_len, chunk):
                size = min(chunk, query_len - first)
                lens = torch.zeros_like(self.seq_lens)
                lens[seq] = length - query_len + first + size
                starts = torch.zeros_like(self.query_start_loc)
                starts[seq + 1 :] = size
                rows = slice(self.starts[seq] + first, self.starts[seq] + first + size)
                self._attend(rows, starts, lens, dense)

    def _attend(self, rows: slice, starts: Tensor, lens: Tensor, dense: Tensor | None) -> None:
        quantised = self.shape.cache_dtype is not None
        prefill_attention(
            self.query[rows],
            self.key_cache,
            self.value_cache,
            self.v_means,
            self.block_table,
            starts,
            lens,
            self.theta[rows],
            sm_scale=self.sm_scale,
            dense=(self.dense if dense is None else dense)[rows],
            out=self.out[rows],
            num_kept=self.num_kept[rows],
            v_tiles_read=self.v_tiles_read[rows],
            config=self.prompt_config,
            window=self.shape.window,
            soft_cap=self.shape.soft_cap,
            sinks=self.sinks,
            k_scale=self.k_scale if quantised else None,
            v_scale=self.v_scale if quantised else None,
        )

    def checked_rows(self, seq: int) -> Tensor:
        """Rows of a prompt that are compared with float64, the first and the last among them."""
        count = min(self.query_lens[seq], CHECKED_ROWS)
        return torch.linspace(
            self.starts[seq], self.starts[seq + 1] - 1, count, device=self.device
        ).long()

    def row_scores(self, seq: int, rows: Tensor) -> Tensor:
        """[num_heads, len(rows), length] float64."""
        return attention_scores(
            self.query[rows].double(),
            self.row(self.key_cache, seq).double() * self.scales[0],
            self.row_lens[rows],
            sm_scale=self.sm_scale,
            window=self.shape.window,
            soft_cap=self.shape.soft_cap,
        )

    def place_theta_in_gaps(self, seqs: Iterable[int] | None = None, ranks: int = 64) -> None:
        """Move the thresholds of the checked rows into the widest gap of scores near rank k."""
        for seq in range(len(self.query_lens)) if seqs is None else seqs:
            rows = self.checked_rows(seq)
            ordered = self.row_scores(seq, rows).sort(dim=-1, descending=True).values
            for at, row in enumerate(rows.tolist()):
                ranked = ordered[:, at]
                visible = int((ranked[0] > -math.inf).sum())
                first = min(self.shape.k, visible - 1)
                if first == 0:
                    self.theta[row] = -1e30
                    continue
                self.theta[row] = self.theta_in_gap(ranked, first, ranks)

    def expected_rows(
        self, seq: int, rows: Tensor, *, dense: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output (float64), num_kept and v_tiles_read of the specification; of dense attention
        where asked.
        """
        flags = (self.all_dense if dense else self.dense)[rows].bool()
        theta = self.theta[rows].double().masked_fill(flags[:, None], -math.inf)
        kept, out = self.specified(seq, self.row_scores(seq, rows), theta.T)
        read = kept.unflatten(0, (self.shape.num_kv_heads, -1)).any(1)
        read = torch.nn.functional.pad(read, (0, -read.shape[-1] % V_TILE))
        tiles = read.unflatten(-1, (-1, V_TILE)).any(-1).sum(-1).T
        return out, kept.sum(-1).T, tiles

    def run(self) -> Tensor:
        self.attend()
        return self.out

    def run_dense(self) -> Tensor:
        self.attend(dense=self.all_dense)
        return self.out

    def verify(self) -> tuple[float, bool]:
        worst, counts = 0.0, True
        for seq in self.checked_seqs():
            rows = self.checked_rows(seq)
            out, kept, tiles = self.expected_rows(seq, rows)
            worst = max(worst, error_of_budget(self.out[rows], out))
            counts &= torch.equal(self.num_kept[rows].long(), kept)
            counts &= torch.equal(self.v_tiles_read[rows].long(), tiles)
        return worst, counts

    def dense_error(self, out: Tensor) -> float:
        errors = []
        for seq in self.checked_seqs():
            rows = self.checked_rows(seq)
            expected, *_ = self.expected_rows(seq, rows, dense=True)
            errors.append(error_of_budget(out[rows], expected))
        return max(errors)

    def fractions(self) -> dict[str, float]:
        """Of the last run: keys that heads kept, and tiles of V with a kept key, by query token."""
        keys = float(self.row_lens.sum())
        tiles = float((self.row_lens + V_TILE - 1).div(V_TILE, rounding_mode="floor").sum())
        return {
            "kept_fraction": float(self.num_kept.sum()) / (keys * self.shape.num_heads),
            "v_tile_fraction": float(self.v_tiles_read.sum()) / (tiles * self.shape.num_kv_heads),
        }
