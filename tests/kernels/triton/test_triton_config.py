"""The launch heuristics."""

import pytest

pytest.importorskip("triton.language")

from vllm_toptheta.kernels.layout import LONG_GROUP, group_size_of
from vllm_toptheta.kernels.triton.config import MAX_SPLITS, choose_config, choose_num_splits


@pytest.mark.parametrize("head_dim", [32, 80, 128, 256])
@pytest.mark.parametrize("block_size", [16, 32, 80, 256])
def test_tiles_hold_whole_groups_and_divide_long_ones(head_dim: int, block_size: int) -> None:
    tile = choose_config(head_dim=head_dim).tile
    assert tile % group_size_of(block_size) == 0
    assert LONG_GROUP % tile == 0


@pytest.mark.parametrize(
    ("num_seqs", "num_kv_heads", "splits"),
    [(0, 8, 256), (1, 1, 256), (1, 8, 66), (2, 8, 33), (3, 8, 22), (66, 8, 1), (200, 8, 1)],
)
def test_splits_run_at_once(num_seqs: int, num_kv_heads: int, splits: int) -> None:
    assert choose_num_splits(num_seqs, num_kv_heads, 132, 4) == splits
    assert splits <= MAX_SPLITS
