"""The stored V means: which groups are written, with what."""

import pytest
import torch
from decode_runs import new_means
from triton_interpreter import needs_interpreter

from vllm_toptheta.testing.cases import Spec, make_case

pytestmark = needs_interpreter

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        Spec(lens=(139, 64), dtype=BF16, seed=60),
        Spec(lens=(70,), block_size=32, head_dim=80, dtype=FP16, seed=61),
        Spec(lens=(40,), block_size=80, dtype=BF16, cache_dtype=torch.float8_e4m3fn, seed=62),
    ],
    ids=["bf16", "fp16, group 32, head_dim 80", "fp8, group 16"],
)
def test_complete_groups_only(spec: Spec, head_major: bool) -> None:
    from vllm_toptheta.kernels.triton.means import update_v_means

    case = make_case(spec)
    value_cache = case.gpu_pages(head_major=head_major)[..., spec.head_dim :]
    means = new_means(case)
    update_v_means(value_cache, means, torch.cat([torch.tensor([-1, -1]), case.slots()]))
    written = torch.zeros(means.shape[:3], dtype=torch.bool)
    size = spec.group_size
    per_block = spec.block_size // size
    for seq, length in enumerate(spec.lens):
        for group in range(length // size):
            block = int(case.block_table[seq, group // per_block])
            written[block, :, group % per_block] = True
            rows = case.values[seq][group * size :][:size].double()
            torch.testing.assert_close(
                means[block, :, group % per_block].double(),
                rows.mean(0),
                rtol=torch.finfo(spec.dtype).eps,
                atol=1e-6,
            )
    assert torch.equal(written, ~means.isnan().any(-1))


def test_a_group_is_written_when_its_last_slot_is() -> None:
    from vllm_toptheta.kernels.triton.means import update_v_means

    case = make_case(Spec(lens=(64,), dtype=BF16, seed=63))
    value_cache, means = case.gpu_pages()[..., 64:], new_means(case)
    slots = case.slots()
    update_v_means(value_cache, means, slots[:63])
    assert means.isnan().all()
    update_v_means(value_cache, means, slots[63:])
    assert not means[int(case.block_table[0, 0])].isnan().any()


def test_wrong_shapes_are_refused() -> None:
    from vllm_toptheta.kernels.triton.means import update_v_means

    value = torch.zeros(2, 1, 16, 64)
    with pytest.raises(ValueError, match="v_means must be"):
        update_v_means(value, torch.zeros(2, 1, 1, 32), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="slot_mapping must be"):
        update_v_means(value, torch.zeros(2, 1, 1, 64), torch.zeros(1, dtype=torch.int32))
