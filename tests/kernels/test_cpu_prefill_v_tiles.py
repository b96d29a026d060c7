"""Which V rows the native prefill kernel reads: each V tile of 64 keys is skipped, listed or
multiplied whole on its own."""

import math

import pytest
import torch
from cpu_cases import Spec, needs_native, slots_of, write
from prefill_cases import PrefillCase, check_prefill, unplaced_case

from vllm_toptheta.kernels.api import V_TILE

pytestmark = needs_native

LENGTH, QUERY_LEN = 700, 60
WHOLE = [0, 3, 4, 5, 8, 10]
"""V tiles of which every row keeps every key. The kernel's key tiles have two each: here (whole,
none), (none, whole), (whole, whole), (none, none), (whole, few), (whole)."""
FEW = [9 * V_TILE + i for i in (0, 17, 18, 63)]
"""Keys that every row keeps of the V tile beside a whole one."""


def placed_case(spec: Spec) -> tuple[PrefillCase, torch.Tensor]:
    """Scores near 1 for the keys to keep and near -1 for the others, thresholds at 0.

    So what is not kept still has an eighth of the mass, which compensation must return.

    Returns:
        The case, and which keys are kept: [LENGTH] bool.
    """
    case = unplaced_case(spec, (QUERY_LEN,))
    position = torch.arange(LENGTH)
    kept = torch.isin(position // V_TILE, torch.tensor(WHOLE))
    kept |= torch.isin(position, torch.tensor(FEW))
    case.query.mul_(0.1)
    case.query[..., 0] = 1 / spec.sm_scale
    case.cache.keys[0][..., 0] = torch.where(kept, 1.0, -1.0)[:, None]
    write(case.cache, 0)
    return case, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compensation", [True, False])
@pytest.mark.parametrize("group_size", [16, 64, 128])
def test_v_rows_that_nobody_keeps_are_not_read_beside_v_tiles_that_are_multiplied_whole(
    group_size: int, compensation: bool, dtype: torch.dtype
) -> None:
    spec = Spec(3, 1, 64, 128, group_size, (LENGTH,), dtype, compensation=compensation)
    case, kept = placed_case(spec)
    exact, _ = case.expected()
    assert (exact.v_tiles_read == len(WHOLE) + 1).all()
    result = case.run("native")
    check_prefill(case, result)
    # Means were written with the values: only reading the rows themselves meets what follows.
    slots = slots_of(case.cache, 0)[~kept]
    value = spec.layout.views(case.cache.kv_cache).value_cache.transpose(1, 2)
    value[slots // spec.block_size, slots % spec.block_size] = math.nan
    assert torch.equal(case.run("native").out, result.out)
    assert torch.equal(case.run_in_chunks("native", 7).out.isfinite(), result.out.isfinite())
