"""Every kernel specialisation compiles for GPUs that are not here, within a budget of registers and
without spills.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_interpreter import VARIABLE

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent

# Four warps of 168 registers leave three programs a multiprocessor, which hide V loads behind each
# other; wide heads and float8 conversion take more and get two.
REGISTERS = {
    "_split_kernel": 168,
    "_merge_kernel": 128,
    "_update_v_means_kernel": 64,
    "_lookup_theta_kernel": 64,
}
WIDE_REGISTERS = 255
TARGETS = ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"]


@pytest.fixture(scope="module", params=TARGETS)
def binaries(request: pytest.FixtureRequest) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment["PYTHONPATH"] = str(HERE.parent.parent)
    done = subprocess.run(
        [sys.executable, HERE / "triton_compile.py", request.param],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_registers_spills_and_shared_memory(binaries: list[dict]) -> None:
    assert {record["kernel"] for record in binaries} >= set(REGISTERS)
    for record in binaries:
        if record["kernel"] not in REGISTERS:
            continue  # prefill and counting compile; their budgets are not settled yet
        # ptxas aims at occupancy and parks one scalar of the merge once per program.
        allowed = 8 if record["kernel"] == "_merge_kernel" else 0
        assert record["spills"] <= allowed, record
        assert record["shared"] <= record["shared_limit"], record
        is_wide = "d256" in record["shape"] or "float8" in record["shape"]
        if record["target"].startswith("cuda"):
            budget = REGISTERS[record["kernel"]]
            if is_wide and record["kernel"] == "_split_kernel":
                budget = WIDE_REGISTERS
            assert record["registers"] <= budget, record


def test_k_is_prefetched_and_v_loads_are_predicated(binaries: list[dict]) -> None:
    for record in binaries:
        if record["kernel"] == "_split_kernel" and record["target"].startswith("cuda"):
            assert record["async_copies"] > 0, record
            assert record["predicated_loads"] > 0, record
