"""What a target's own counts mean in COLUMNS, and who of several ranks tells them."""

import pytest

pytest.importorskip("vllm", reason="needs an installed vLLM")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from threshold_fixtures import make_identity  # noqa: E402

from vllm_toptheta.backend.counts import RankHeads, in_units  # noqa: E402
from vllm_toptheta.kernels.columns import COLUMNS, MASS_UNIT, UNITS  # noqa: E402


def units(heads: RankHeads) -> dict[str, int]:
    return dict(zip(COLUMNS, heads.units(torch.device("cpu")).tolist(), strict=True))


def test_a_token_is_a_row_of_every_head_and_a_list_is_a_groups() -> None:
    found = units(RankHeads(6, 2, first_replica=True))
    assert found["rows"] == found["dense_off"] == found["prefill_keys_scored"] == 6
    assert found["keys_kept"] == found["keys_dense"] == found["rows_lifted"] == 3
    assert found["v_rows_scored"] == found["prefill_v_tiles"] == 2
    assert found["v_rows_read"] == found["keys_target"] == found["kept_mass"] == 1


def test_kv_heads_that_several_ranks_hold_are_told_by_one() -> None:
    identity = make_identity()
    group = identity.num_heads // identity.num_kv_heads
    ranks = [RankHeads.of(identity, 1, 1, rank) for rank in range(identity.num_heads)]
    assert [rank.first_replica for rank in ranks] == [i % group == 0 for i in range(len(ranks))]
    first, second = units(ranks[0]), units(ranks[1])
    of_kv_heads = {name for name in COLUMNS if name.removeprefix("prefill_").startswith("v_")}
    assert {name for name in COLUMNS if first[name] != second[name]} == of_kv_heads
    assert not any(second[name] for name in of_kv_heads)
    assert {UNITS[name] for name in of_kv_heads} == {"kv_heads", "lists"}


def test_shares_are_integers_that_add_up_in_any_order() -> None:
    assert in_units(np.array([0.0, 1.0, 0.5], dtype=np.float32)).tolist() == [
        0,
        MASS_UNIT,
        MASS_UNIT // 2,
    ]
