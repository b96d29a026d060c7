"""The counts of a step on the device, against plain sums."""

from typing import Any

import pytest
import torch
from triton_interpreter import needs_interpreter

from vllm_toptheta.kernels.columns import COLUMNS
from vllm_toptheta.kernels.columns import MASS_UNIT as UNIT

pytestmark = needs_interpreter

HEADS, KV_HEADS, GROUP = 6, 3, 2
NO_WINDOW = 2**31 - 1
WINDOWS = (NO_WINDOW, 40)
PLACES = (3, 1)
"""Where the layers lie among those of the model."""

LENS = [300, 70, 0, 90, 200, 5]
QUERIES = [1, 1, 1, 1, 75, 3]
NUM_SINGLE = 4
"""A generated token, one that follows a k, padding, the last token of a prompt; then prompts."""


@pytest.fixture
def step() -> dict[str, Any]:
    """Arguments of `count_step`, as kernels might have written them."""
    from vllm_toptheta.kernels.triton.counts import CountedLayers, CountedRows

    generator = torch.Generator().manual_seed(0)
    tokens = sum(QUERIES)
    per_layer = (len(WINDOWS), tokens)

    def integers(high: int, *sizes: int) -> torch.Tensor:
        return torch.randint(0, high, (*per_layer, *sizes), generator=generator).int()

    dense = integers(5).to(torch.int8)
    # A pruned row in each layer, whatever the seed.
    dense[:, :2] = torch.tensor([[0, 0], [2, 0]])
    return {
        "seq_lens": torch.tensor(LENS, dtype=torch.int32),
        "query_start_loc": torch.tensor([0, *QUERIES]).cumsum(0).int(),
        "layers": CountedLayers(
            index=torch.tensor(PLACES, dtype=torch.int32),
            window=torch.tensor(WINDOWS, dtype=torch.int32),
            follows_k=torch.tensor([1, 0], dtype=torch.int8),
        ),
        "rows": CountedRows(
            is_prompt=torch.tensor([0.0, 0, 0, 1]),
            target=torch.tensor([0.0, 1000, 0, 0]),
            dense=dense,
            num_kept=integers(40, KV_HEADS),
            # Times the unit exact in float32.
            kept_mass=integers(1025, HEADS) / 1024,
            lifts=integers(3, KV_HEADS),
            v_tiles_read=integers(4, KV_HEADS),
        ),
        "single": slice(0, NUM_SINGLE),
        "skipped": 0,
        "prunes_prompts": True,
        "heads": torch.zeros(len(WINDOWS), KV_HEADS + HEADS + 2, dtype=torch.int64),
    }


def count(step: dict[str, Any]) -> torch.Tensor:
    """Columns of every request and layer, in UNITS; sums per head are added to `heads`."""
    from vllm_toptheta.kernels.triton.counts import count_step

    out = torch.zeros(len(LENS), 4, len(COLUMNS), dtype=torch.int64)
    count_step(**step, out=out)
    return out


def expected(step: dict[str, Any], request: int, slot: int) -> dict[str, int]:
    """The columns of one request and layer that are not 0."""
    rows, window = step["rows"], WINDOWS[slot]
    first = int(step["query_start_loc"][request])
    tokens = range(first, first + QUERIES[request])
    ends = [LENS[request] - QUERIES[request] + 1 + i for i in range(QUERIES[request])]
    visible = sum(min(end, window) for end in ends)
    mass = int((rows.kept_mass[slot, tokens].double() * UNIT + 0.5).floor().sum())
    lists = int(rows.num_kept[slot, tokens].sum())
    codes = rows.dense[slot, tokens].tolist()
    num_rows = QUERIES[request]
    is_prompt = request >= NUM_SINGLE or bool(rows.is_prompt[request])
    found = {"dense_prefill": sum(code != 0 for code in codes)} if is_prompt else {}
    if is_prompt and step["prunes_prompts"]:
        tiles, read = 0, 0
        if request >= NUM_SINGLE:
            tiles = sum(-(-end // 64) - max(end - window, 0) // 64 for end in ends)
            read = int(rows.v_tiles_read[slot, tokens].sum())
        found |= {
            "prefill_rows": num_rows,
            "prefill_keys_scored": visible,
            "prefill_keys_kept": lists,
            "prefill_v_tiles": tiles,
            "prefill_v_tiles_read": read,
            "prefill_kept_mass": mass,
        }
    elif not is_prompt:
        reason = ("", "dense_short", "dense_window", "dense_layer", "dense_off")[codes[0]]
        target = int(rows.target[request]) if slot == 0 and not reason else 0
        lifted = int((rows.lifts[slot, first] > 0).sum())
        found = {
            "rows": num_rows,
            "keys_scored": visible,
            "keys_kept": lists,
            "v_rows_scored": visible,
            "v_rows_read": lists,
            "keys_dense": 0 if target else lists,
            "keys_target": min(target, visible * HEADS),
            "kept_mass": mass,
            "rows_lifted": 0 if reason else lifted,
        }
        found |= {reason: num_rows} if reason else {}
    return {name: value for name, value in found.items() if value}


def check(step: dict[str, Any]) -> torch.Tensor:
    out = count(step)
    for request in range(len(LENS)):
        for slot, place in enumerate(PLACES):
            found = dict(zip(COLUMNS, out[request, place].tolist(), strict=True))
            wanted = expected(step, request, slot) if LENS[request] else {}
            assert {name: value for name, value in found.items() if value} == wanted
    assert not out[:, [0, 2]].any(), "a layer that is not the builder's was counted"
    return out


def test_every_column(step: dict[str, Any]) -> None:
    out = check(step)
    column = dict(zip(COLUMNS, out.sum((0, 1)).tolist(), strict=True))
    assert all(column[name] for name in COLUMNS if not name.startswith("dense_"))
    # 1000 keys were wanted of a row of 70.
    assert out[1, PLACES[0], COLUMNS.index("keys_target")] == 70 * HEADS


def test_heads_add_up_over_steps(step: dict[str, Any]) -> None:
    first = check(step).sum(0)
    sums, rows = step["heads"], step["rows"]
    generated = [0, 1]  # neither padding nor the last token of a prompt
    kept = rows.num_kept[:, generated].sum(1)
    mass = (rows.kept_mass[:, generated].double() * UNIT + 0.5).long().sum(1)
    visible = [300 + 70, 40 + 40]
    assert sums[:, :KV_HEADS].tolist() == kept.tolist()
    assert sums[:, KV_HEADS:-2].tolist() == mass.tolist()
    assert sums[:, -2].tolist() == visible
    assert sums[:, -1].tolist() == [2, 2]
    once = sums.clone()
    assert torch.equal(check(step).sum(0), first)
    assert torch.equal(step["heads"], 2 * once)


def test_every_reason(step: dict[str, Any]) -> None:
    for code in range(5):
        step["rows"].dense[:] = code
        check(step)


def test_prompts_of_another_kernel_are_dense(step: dict[str, Any]) -> None:
    step["prunes_prompts"] = False
    step["rows"].dense[:, NUM_SINGLE:] = 1
    check(step)


def test_wrong_shapes_are_refused(step: dict[str, Any]) -> None:
    from vllm_toptheta.kernels.triton.counts import count_step

    out = torch.zeros(len(LENS), 4, len(COLUMNS) + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="out must be contiguous"):
        count_step(**step, out=out)
    step["heads"] = step["heads"][:, 1:]
    with pytest.raises(ValueError, match="heads must be contiguous"):
        count_step(**step, out=out[..., 1:].contiguous())
