"""The threshold look-up on the device against the table's own."""

import math
from typing import Any

import pytest
import torch
from threshold_fixtures import make_table
from torch import Tensor
from triton_interpreter import needs_interpreter

from vllm_toptheta.thresholds import KEEP_ALL, ThresholdTable

pytestmark = needs_interpreter

TABLE = make_table()  # levels 16 and 64, lengths 32, 128, 512; 2 layers, 4 heads
NO_WINDOW = 2**31 - 1


def level_of(k: float) -> float:
    """Position among the levels 16 and 64."""
    return (math.log2(k) - 4) / 2


def look_up(
    table: ThresholdTable, lens: list[int], row_ks: list[float] | None = None, **changes: Any
) -> tuple[Tensor, Tensor]:
    from vllm_toptheta.kernels.triton_theta import lookup_theta

    num_seqs = len(lens)
    row_ks = row_ks or [16.0] * num_seqs
    out = torch.full((2, num_seqs + 1, 4), math.nan)
    dense = torch.full((2, num_seqs + 1), -1, dtype=torch.int8)
    arguments: dict[str, Any] = {
        "layer_window": torch.full((2,), NO_WINDOW, dtype=torch.int32),
        "layer_k": torch.zeros(2),
        "layer_level": torch.zeros(2),
        "layer_dense": torch.zeros(2, dtype=torch.int8),
        "row_k": torch.tensor(row_ks),
        "row_level": torch.tensor([level_of(k) for k in row_ks]),
        "row_dense": torch.zeros(num_seqs),
        "min_len": 0,
    }
    lookup_theta(
        table.theta.transpose(0, 1).contiguous(),
        table.slope.transpose(0, 1).contiguous(),
        table.lengths.log2(),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        out=out,
        dense=dense,
        **(arguments | changes),
    )
    assert out[:, -1].isnan().all(), "a row beyond the batch was written"
    assert (dense[:, -1] == -1).all()
    return out[:, :-1], dense[:, :-1]


@pytest.mark.parametrize("k", [16.0, 17.5, 40.0, 64.0])
def test_follows_the_table_at_every_length_and_k(k: float) -> None:
    lens = [1, 31, 32, 33, 77, 128, 300, 511, 512, 513, 5000, 131072]
    theta, _ = look_up(TABLE, lens, [k] * len(lens))
    expected = TABLE.at_k(k).lookup(torch.tensor(lens))
    finite = expected > -1e20
    torch.testing.assert_close(theta[finite], expected[finite], rtol=1e-5, atol=1e-4)
    assert (theta[~finite] < -1e20).all()
    assert finite.any()
    assert k < 32 or not finite.all()


def test_keep_all_does_not_drown_its_neighbour() -> None:
    """At a knot, theta is the knot's, however huge the one before."""
    assert TABLE.theta[1, 0, 0, 0] == KEEP_ALL
    theta, _ = look_up(TABLE, [128], [64.0])
    torch.testing.assert_close(theta[0, 0, 0], TABLE.theta[1, 0, 0, 1])


def test_each_row_has_its_own_k() -> None:
    theta, _ = look_up(TABLE, [400, 400, 200], [16.0, 64.0, 30.0])
    for seq, (length, k) in enumerate([(400, 16.0), (400, 64.0), (200, 30.0)]):
        expected = TABLE.at_k(k).lookup(torch.tensor([length]))[:, 0]
        torch.testing.assert_close(theta[:, seq], expected, rtol=1e-5, atol=1e-4)


def test_a_layer_with_its_own_k_ignores_the_rows() -> None:
    theta, _ = look_up(
        TABLE,
        [400],
        [16.0],
        layer_k=torch.tensor([0.0, 64.0]),
        layer_level=torch.tensor([0.0, 1.0]),
    )
    torch.testing.assert_close(theta[0, 0], TABLE.at_k(16).lookup(torch.tensor([400]))[0, 0])
    torch.testing.assert_close(theta[1, 0], TABLE.at_k(64).lookup(torch.tensor([400]))[1, 0])


def test_a_window_bounds_the_length() -> None:
    windows = torch.tensor([NO_WINDOW, 256], dtype=torch.int32)
    theta, _ = look_up(TABLE, [2000], layer_window=windows)
    torch.testing.assert_close(theta[1, 0], TABLE.at_k(16).lookup(torch.tensor([256]))[1, 0])


def test_a_table_of_one_level() -> None:
    one = make_table()
    single = ThresholdTable(
        one.metadata,
        one.levels[:1],
        one.lengths,
        one.theta[:1],
        one.slope[:1],
        one.head_k[:1],
        one.lost_mass[:1],
    )
    theta, _ = look_up(single, [400])
    torch.testing.assert_close(theta, single.at_k(16).lookup(torch.tensor([400])))


def test_why_rows_run_dense() -> None:
    from vllm_toptheta.kernels import triton_theta as module

    _, dense = look_up(
        TABLE,
        [100, 101, 500, 500, 0],
        [16.0, 16.0, 16.0, 16.0, 16.0],
        row_dense=torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0]),
        min_len=100,
    )
    none, short, row = module.DENSE_NONE, module.DENSE_SHORT, module.DENSE_ROW
    assert dense[0].tolist() == [short, none, none, row, short]
    _, dense = look_up(
        TABLE,
        [500, 40],
        [64.0, 64.0],
        layer_window=torch.tensor([64, NO_WINDOW], dtype=torch.int32),
        layer_dense=torch.tensor([0, 1], dtype=torch.int8),
    )
    assert dense[0].tolist() == [module.DENSE_WINDOW] * 2
    assert dense[1].tolist() == [module.DENSE_LAYER] * 2
    _, dense = look_up(TABLE, [64, 65], [64.0, 64.0])
    assert dense[0].tolist() == [short, none]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="row_k must hold at least 2"):
        look_up(TABLE, [5, 6], row_k=torch.zeros(1))
    with pytest.raises(ValueError, match="row_dense must hold at least 1"):
        look_up(TABLE, [5], row_dense=torch.zeros(1, dtype=torch.int8))
