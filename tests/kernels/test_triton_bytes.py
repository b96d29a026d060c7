"""What the kernels read, counted from the masks of every load under the interpreter."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import triton_prefill_cases
from cpu_cases import Spec, with_options
from prefill_cases import PrefillCase, make_prefill_case
from triton_cases import Case, run
from triton_interpreter import needs_interpreter

from vllm_toptheta.kernels.api import V_TILE
from vllm_toptheta.kernels.reference import select_by_theta

pytestmark = needs_interpreter


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


def element_loads(addresses: list[np.ndarray], tensor: torch.Tensor) -> torch.Tensor:
    """How often each element of a (strided) tensor was loaded, in the tensor's shape."""
    strides = torch.tensor(tensor.stride()) * tensor.element_size()
    offsets = torch.zeros(tensor.shape, dtype=torch.int64)
    for axis, stride in enumerate(strides.tolist()):
        shape = [1] * tensor.dim()
        shape[axis] = -1
        offsets = offsets + (torch.arange(tensor.shape[axis]) * stride).view(shape)
    count = Counter(np.concatenate([a.ravel() for a in addresses]).tolist())
    flat = [count.get(tensor.data_ptr() + offset, 0) for offset in offsets.flatten().tolist()]
    return torch.tensor(flat).view(tensor.shape)


def kept_rows(case: Case, seq: int) -> torch.Tensor:
    """[num_kv_heads, length] bool, rows that any head of the group keeps."""
    kept = select_by_theta(case.scores(seq)[:, None], case.theta[seq].double()[:, None])
    return kept[:, 0].unflatten(0, (case.num_kv_heads, -1)).any(1)


def by_position(case: Case, per_slot: torch.Tensor, seq: int) -> torch.Tensor:
    """Loads [num_kv_heads, length] of a row's tokens, from loads [blocks, heads, slots, dim]."""
    assert torch.equal(per_slot.amin(-1), per_slot.amax(-1)), "a row was loaded in part"
    blocks = case.block_table[seq].long()
    rows = per_slot[..., 0][blocks].permute(1, 0, 2).flatten(1)
    return rows[:, : case.lens[seq]]


def run_counted(
    case: Case, loads: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, ...]:
    """Loads of every element of K, V and the means during the decode launches."""
    import triton_cases

    held: list[torch.Tensor] = []
    original = triton_cases.new_means

    def new_means(case: Case) -> torch.Tensor:
        held.append(original(case))
        return held[0]

    monkeypatch.setattr(triton_cases, "new_means", new_means)
    from vllm_toptheta.kernels import triton_means

    update = triton_means.update_v_means

    def update_and_forget(*args: Any) -> None:
        update(*args)
        loads.clear()

    monkeypatch.setattr(triton_means, "update_v_means", update_and_forget)
    run(case, num_splits=3)
    return tuple(
        element_loads(loads, tensor) for tensor in (case.key_cache, case.value_cache, held[0])
    )


def test_reads_k_once_kept_v_rows_once_and_means_once_a_group(
    loads: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case([160, 96], k=4, seed=40)
    key, value, means = run_counted(case, loads, monkeypatch)
    for seq, length in enumerate(case.lens):
        assert (by_position(case, key, seq) == 1).all()
        assert torch.equal(by_position(case, value, seq) == 1, kept_rows(case, seq))
        assert by_position(case, value, seq).max() == 1
        blocks = case.block_table[seq, : length // case.group_size].long()
        assert (means[blocks] == 1).all()
    total = sum(case.lens) * case.num_kv_heads * case.head_dim
    union = sum(int(kept_rows(case, seq).sum()) for seq in range(2)) * case.head_dim
    assert key.sum() == total, "K of other rows was read"
    assert value.sum() == union, "V of other rows was read"
    assert means.sum() == total / case.group_size
    assert value.sum() < 0.2 * total, "the case prunes too little to show anything"


def test_partial_groups_are_read_in_full_and_nothing_else_is(
    loads: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case([151], k=4, window=130, seed=41)  # sees keys 21 to 150
    key, value, means = run_counted(case, loads, monkeypatch)
    position = torch.arange(151)
    visible = position >= 21
    partial = visible & ((position < 32) | (position >= 144))
    assert torch.equal(by_position(case, key, 0)[0] == 1, visible)
    assert torch.equal(by_position(case, value, 0) == 1, kept_rows(case, 0) | partial)
    per_group = means[case.block_table[0].long()][:, 0, 0, 0]
    assert per_group.tolist() == [0, 0, *[1] * 7, 0, 0]


def test_dense_rows_read_v_once_and_no_means(
    loads: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case([70], dense_rows=(0,), seed=42)
    key, value, means = run_counted(case, loads, monkeypatch)
    assert (by_position(case, key, 0) == 1).all()
    assert (by_position(case, value, 0) == 1).all()
    assert means.sum() == 0


def test_the_best_key_costs_one_row(
    loads: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case([160], k=4, heads=1, best_only_rows=(0,), num_kv_heads=1, seed=43)
    key, value, means = run_counted(case, loads, monkeypatch)
    assert torch.equal(by_position(case, value, 0) == 1, kept_rows(case, 0))
    assert value.sum() == case.head_dim
    assert means.sum() == (10 + 1) * case.head_dim, (
        "one mean more, which the best key's row replaces"
    )


PROMPT = Spec(4, 2, 64, 32, 16, lens=(448,), dtype=torch.bfloat16, kept=0.005, seed=44)


def make_prompt(**changes: Any) -> PrefillCase:
    """The last 32 tokens of a prompt; each half of them attends alike, so that V tiles are skipped.

    A tile of 32 rows holds 16 tokens with both heads of a kv head.
    """
    case = make_prefill_case(with_options(PROMPT, **changes), (32,))
    for start in (0, 16):
        case.query[start : start + 16] = case.query[start]
    scores = case.scores(0)
    for row in range(32):
        third = scores[:, row].sort(-1, descending=True).values[:, 2:4].mean(-1)
        case.theta[row] = third.float()
    return case


def kept_by_tiles(case: PrefillCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that a row keeps, and those that a row sees in groups it sees in part: masks
    [row tiles, num_kv_heads, length].
    """
    kept = select_by_theta(case.scores(0), case.theta.double().T)
    position, ends = torch.arange(case.spec.lens[0]), case.row_lens(0)[:, None]
    partial = (position >= ends // 16 * 16) & (position < ends)
    groups = (case.spec.num_kv_heads, -1)

    def union(mask: torch.Tensor) -> torch.Tensor:
        return mask.unflatten(0, groups).any(1).unflatten(1, (2, 16)).any(2).transpose(0, 1)

    return union(kept), union(partial.expand(kept.shape))


def loads_by_position(case: PrefillCase, per_slot: torch.Tensor) -> torch.Tensor:
    """Loads [num_kv_heads, length], from loads [blocks, heads, slots, dim]."""
    assert torch.equal(per_slot.amin(-1), per_slot.amax(-1)), "a row was loaded in part"
    length = case.spec.lens[0]
    blocks = case.cache.block_table[0, : length // case.spec.block_size].long()
    assert per_slot.sum() == per_slot[blocks].sum(), "another block was read"
    return per_slot[..., 0][blocks].permute(1, 0, 2).flatten(1)


def test_prompts_read_k_once_a_row_tile_and_of_v_what_a_row_keeps(loads: list[np.ndarray]) -> None:
    case = make_prompt()
    pages = triton_prefill_cases.gpu_pages(case)
    triton_prefill_cases.run(case, pages, rows=32)
    key, value = (
        loads_by_position(case, element_loads(loads, tensor)) for tensor in (pages.key, pages.value)
    )
    kept, partial = kept_by_tiles(case)
    seen = torch.stack([torch.arange(448) < 432, torch.ones(448, dtype=torch.bool)])
    assert torch.equal(key, seen.sum(0).expand(2, -1))
    assert torch.equal(value, (kept | partial).sum(0))
    tiles = (kept | partial).unflatten(-1, (-1, V_TILE)).any(-1)
    assert tiles.float().mean() < 0.7, "the case skips too little to show anything"
    means = element_loads(loads, pages.means)[..., 0]
    blocks = case.cache.block_table[0, :14].long()
    per_group = means[blocks].permute(1, 0, 2).flatten(1)
    # The last group of a row tile is complete for its last row only.
    assert torch.equal(per_group[0], torch.tensor([*[2] * 27, 1]))


def test_prompts_multiply_v_only_where_a_row_keeps_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    dots = []
    original = InterpreterBuilder.create_dot

    def create_dot(self: Any, *args: Any) -> Any:
        dots.append(1)
        return original(self, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    case = make_prompt(compensation=False)
    triton_prefill_cases.run(case, rows=32)
    kept, _ = kept_by_tiles(case)
    with_survivors = int(kept.unflatten(-1, (-1, V_TILE)).any(-1).sum())
    key_tiles = 2 * (7 + 7)
    assert len(dots) == key_tiles + with_survivors
    assert with_survivors < 0.7 * key_tiles
