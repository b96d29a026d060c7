"""The GPU kernels and the CPU's keep the same keys of the same inputs."""

import pytest
import torch
from decode_runs import run
from kernels.cpu.decode_calls import layer_and_rows
from triton_interpreter import needs_interpreter

from vllm_toptheta.kernels import ops
from vllm_toptheta.testing.cases import Case, Result, Spec, error_budget, make_case

pytestmark = needs_interpreter

BF16 = torch.bfloat16
CASES = {
    "plain": Spec(lens=(275, 33, 1, 0, 64), dtype=BF16, seed=50),
    "window, floor": Spec(
        lens=(290, 139), dtype=BF16, window=137, min_mass=0.6, min_prob=0.2, seed=51
    ),
    "soft cap, sinks, dense row": Spec(
        lens=(275, 150),
        dtype=BF16,
        soft_cap=3.0,
        min_prob=0.02,
        sinks=True,
        dense_rows=(1,),
        seed=52,
    ),
    "best keys alone": Spec(lens=(290, 64), dtype=BF16, min_prob=0.99, seed=53),
    "group 32": Spec(lens=(310,), block_size=32, head_dim=80, dtype=BF16, seed=54),
}


def run_on_cpu(case: Case) -> Result:
    """The best CPU target on the same cache in the CPU's page layout."""
    pages, layout = case.cpu_pages()
    target = ops.available_target().target
    ops.update_side_data(pages, layout, case.slots(), target=target)
    result = Result.empty(case.spec)
    layer, rows = layer_and_rows(case, result, layout, target)
    layer.attend(rows, case.query, pages, result.out, case.sinks)
    return result


@pytest.mark.parametrize("name", CASES)
def test_same_counts_and_same_output(name: str) -> None:
    case = make_case(CASES[name])
    gpu, cpu = run(case), run_on_cpu(case)
    assert torch.equal(gpu.num_kept, cpu.num_kept)
    assert torch.equal(gpu.lifts, cpu.lifts)
    torch.testing.assert_close(gpu.kept_mass, cpu.kept_mass, rtol=0, atol=1e-5)
    difference = (gpu.out.double() - cpu.out.double()).abs()
    assert (difference <= 3 * error_budget(case, cpu.out.double())).all(), difference.max()
