"""What the decode kernels read, counted from the masks of every load under the interpreter."""

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from decode_runs import new_means, run
from test_triton_sketch import case_of, specified, written
from torch import Tensor
from triton_interpreter import needs_interpreter

from vllm_toptheta.testing.cases import Case, Spec, make_case

pytestmark = needs_interpreter

SPEC = Spec(lens=(320, 192), dtype=torch.bfloat16, min_prob=0.15, head_dim=32, seed=40)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Addresses of all elements that kernels load."""
    from triton.runtime.interpreter import InterpreterBuilder

    addresses: list[np.ndarray] = []
    original = InterpreterBuilder.create_masked_load

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        addresses.append(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)])
        return original(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", create_masked_load)
    return addresses


def row_loads(addresses: list[np.ndarray], tensor: Tensor) -> Tensor:
    """How often each row of a (strided) tensor was loaded, in its shape without the last
    dimension."""
    strides = torch.tensor(tensor.stride()) * tensor.element_size()
    offsets = torch.zeros(tensor.shape, dtype=torch.int64)
    for axis, stride in enumerate(strides.tolist()):
        shape = [1] * tensor.dim()
        shape[axis] = -1
        offsets = offsets + (torch.arange(tensor.shape[axis]) * stride).view(shape)
    count = Counter(np.concatenate([a.ravel() for a in addresses]).tolist())
    flat = [count.get(tensor.data_ptr() + offset, 0) for offset in offsets.flatten().tolist()]
    per_element = torch.tensor(flat).view(tensor.shape)
    assert torch.equal(per_element.amin(-1), per_element.amax(-1)), "a row was loaded in part"
    return per_element[..., 0]


@dataclasses.dataclass
class Reads:
    """Loads of rows: of K and V [num_kv_heads, length] and of means [num_kv_heads, groups], by
    sequence."""

    keys: list[Tensor]
    values: list[Tensor]
    means: list[Tensor]


def reads(case: Case, loads: list[np.ndarray]) -> Reads:
    """Run the decode kernels and count what they load; other rows of the cache must not be."""
    from vllm_toptheta.kernels.triton.means import update_v_means

    pages, means = case.gpu_pages(), new_means(case)
    key_cache, value_cache = pages.split(case.spec.head_dim, dim=-1)
    update_v_means(value_cache, means, case.slots())
    loads.clear()
    run(case, pages=(pages, means))
    found = Reads([], [], [])
    for tensor, per_seq in zip((key_cache, value_cache, means), vars(found).values(), strict=True):
        per_row, wanted = row_loads(loads, tensor), 0
        for seq, length in enumerate(case.spec.lens):
            size = case.spec.block_size
            blocks = case.block_table[seq, : -(-length // size)].long()
            rows = per_row[blocks].transpose(0, 1).flatten(1)
            per_seq.append(rows if tensor is means else rows[:, :length])
            end = -(-length // 8) * 8 if tensor is key_cache else length  # K by whole runs
            wanted += int(per_seq[-1].sum()) + int(rows[:, length:end].sum())
        assert per_row.sum() == wanted, "other rows were read"
    return found


def in_runs(keys: Tensor) -> Tensor:
    """Keys [..., length] in whose runs of 8 some key is set."""
    return keys.unflatten(-1, (-1, 8)).any(-1).repeat_interleave(8, -1)


def test_k_once_and_again_in_runs_with_kept_keys_v_where_they_are_and_means_once(
    loads: list[np.ndarray],
) -> None:
    case = make_case(SPEC)
    found = reads(case, loads)
    for seq in range(2):
        chosen = case.select(seq)
        kept = chosen.kept[:, 0]
        wanted = chosen.probs[:, 0].log2().unflatten(0, (len(kept), -1)).amax(1)
        # Runs are listed by scores that are rounded up to eighths of an octave.
        near = wanted >= (case.log_min_prob[seq] / math.log(2) - 1 / 8)[:, None]
        assert in_runs(kept).float().mean() < 0.8, "the case prunes too little to show anything"
        again = found.keys[seq] - 1
        assert torch.equal(again, (again & in_runs(kept | near)).int())
        assert (again >= in_runs(kept).int()).all()
        assert torch.equal(again > 0, in_runs(again > 0))
        assert torch.equal(found.values[seq], kept.int())
        assert (found.means[seq] == 1).all()


def test_partial_groups_are_read_in_full(loads: list[np.ndarray]) -> None:
    case = make_case(dataclasses.replace(SPEC, lens=(300,), window=270))  # sees keys 30 to 299
    found = reads(case, loads)
    position = torch.arange(300)
    partial = (position >= 30) & ((position < 64) | (position >= 256))
    assert torch.equal(found.keys[0][0] > 0, position >= 24)
    assert (found.values[0][:, partial] == 1).all()
    assert torch.equal(found.values[0], case.select(0).kept[:, 0].int())
    assert found.means[0].tolist() == [[0, 1, 1, 1, 0]] * 2


def test_a_floor_reads_no_other_v_rows(loads: list[np.ndarray]) -> None:
    case = make_case(dataclasses.replace(SPEC, lens=(320,), min_mass=0.5, min_prob=0.2, seed=41))
    assert case.select(0).lifts.max() > 0
    found = reads(case, loads)
    assert torch.equal(found.values[0], case.select(0).kept[:, 0].int())
    assert found.keys[0].max() <= 3


def test_dense_rows_read_everything_once_and_no_means(loads: list[np.ndarray]) -> None:
    found = reads(make_case(dataclasses.replace(SPEC, lens=(70,), dense_rows=(0,))), loads)
    assert (found.keys[0] == 1).all()
    assert (found.values[0] == 1).all()
    assert (found.means[0] == 0).all()


def test_no_compensation_reads_no_means(loads: list[np.ndarray]) -> None:
    found = reads(make_case(dataclasses.replace(SPEC, lens=(128,), compensation=False)), loads)
    assert (found.means[0] == 0).all()


def test_k_is_read_where_a_group_is_not_trusted_and_codes_elsewhere(
    loads: list[np.ndarray],
) -> None:
    case = case_of(
        dataclasses.replace(SPEC, lens=(300,), head_dim=64, min_prob=0.02, seed=41), (2,)
    )
    pages, sketch = written(case)
    case = specified(case, sketch)
    loads.clear()
    run(case, pages=pages, sketch=sketch)
    blocks = case.block_table[0, :5].long()
    key, value = pages[0].split(case.spec.head_dim, dim=-1)
    by_row = [row_loads(loads, part)[blocks].transpose(0, 1).flatten(1) for part in (key, value)]
    kept, by_key = case.select(0).kept[:, 0], torch.zeros(320, dtype=torch.bool)
    by_key[128:192] = by_key[256:300] = True
    assert (by_row[0][:, by_key] > 0).all()
    assert (by_row[0][:, ~by_key][:, :192] == 0).all()
    assert torch.equal(by_row[1][:, :300], kept.int())
    codes = row_loads(loads, sketch.codes)[blocks].transpose(0, 1).flatten(1)
    assert (codes[:, ~by_key][:, :192] >= 1).all()
    assert codes.float().mean() < 1.9
