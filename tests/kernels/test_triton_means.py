"""The stored V means: which groups are written, with what."""

import pytest
import torch
from triton_cases import Case, new_means
from triton_interpreter import needs_interpreter

pytestmark = needs_interpreter


@pytest.mark.parametrize(
    "case",
    [
        Case([75, 64], seed=60),
        Case([70], block_size=64, group_size=32, head_dim=80, dtype=torch.float16, seed=61),
        Case([40], cache_dtype=torch.float8_e4m3fn, head_major=True, seed=62),
    ],
    ids=["bf16", "fp16, group 32, head_dim 80", "fp8, head-major"],
)
def test_complete_groups_only(case: Case) -> None:
    from vllm_toptheta.kernels.triton_means import update_v_means

    means = new_means(case)
    slots = torch.cat([torch.tensor([-1, -1]), case.slots()])
    update_v_means(case.value_cache, means, slots)
    written = torch.zeros(means.shape[:3], dtype=torch.bool)
    per_block = case.block_size // case.group_size
    for seq, length in enumerate(case.lens):
        for group in range(length // case.group_size):
            block = int(case.block_table[seq, group // per_block])
            written[block, :, group % per_block] = True
            rows = case.values[seq][group * case.group_size :][: case.group_size] / case.scales[1]
            torch.testing.assert_close(
                means[block, :, group % per_block].double(),
                rows.mean(0),
                rtol=torch.finfo(case.dtype).eps,
                atol=1e-6,
            )
    assert torch.equal(written, ~means.isnan().any(-1))


def test_a_group_is_written_when_its_last_slot_is() -> None:
    from vllm_toptheta.kernels.triton_means import update_v_means

    case = Case([32], seed=63)
    means = new_means(case)
    slots = case.slots()
    update_v_means(case.value_cache, means, slots[:15])
    assert means.isnan().all()
    update_v_means(case.value_cache, means, slots[15:16])
    assert not means[case.block_table[0, 0].item()].isnan().any()


def test_wrong_shapes_are_refused() -> None:
    from vllm_toptheta.kernels.triton_means import update_v_means

    value = torch.zeros(2, 1, 16, 64)
    with pytest.raises(ValueError, match="do not belong"):
        update_v_means(value, torch.zeros(2, 1, 1, 32), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="slot_mapping must be"):
        update_v_means(value, torch.zeros(2, 1, 1, 64), torch.zeros(1, dtype=torch.int32))
