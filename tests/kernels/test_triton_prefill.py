"""The Triton prefill kernel against the float64 specification, branch by branch, and against the
CPU kernel.
"""

import math
from typing import Any

import pytest
import torch
from cpu_cases import Spec, slots_of, with_options, write
from prefill_cases import PrefillCase, PrefillResult, make_prefill_case
from triton_interpreter import needs_interpreter
from triton_prefill_cases import GPUPages, gpu_pages, quantise, run

from vllm_toptheta.kernels import api

pytestmark = needs_interpreter

BF16, FP16 = torch.bfloat16, torch.float16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BASE = Spec(6, 2, 64, 32, 16, lens=(1, 63, 140, 90, 40), dtype=BF16)
QUERY_LENS = (1, 30, 40, 1, 0)


def spec(**changes: Any) -> Spec:
    return with_options(BASE, **changes)


CASES = {
    "plain": spec(),
    "fp16": spec(dtype=FP16, seed=1),
    "one head a group": spec(num_heads=2, lens=(63, 140, 90, 1, 0), seed=2),
    "sixteen heads a group": spec(num_heads=16, num_kv_heads=1, seed=3),
    "seven heads a group": spec(num_heads=7, num_kv_heads=1, block_size=16, seed=4),
    "head_dim 80": spec(head_dim=80, seed=5),
    "head_dim 96, group 128": spec(head_dim=96, block_size=128, group_size=128, seed=6),
    "head_dim 256, group 64": spec(head_dim=256, block_size=128, group_size=64, seed=7),
    "group 32": spec(block_size=96, group_size=32, seed=8),
    "no compensation": spec(compensation=False, seed=9),
    "window": spec(window=50, seed=10),
    "window of one key": spec(window=1, seed=11),
    "window within a group": spec(window=7, group_size=32, seed=12),
    "window, group 128": spec(window=133, lens=(1, 300, 63, 40, 0), block_size=128, group_size=128),
    "soft cap": spec(soft_cap=2.0, seed=13),
    "sinks": spec(sinks=True, seed=14),
    "window, sinks, soft cap": spec(window=100, sinks=True, soft_cap=3.0, seed=15),
    "keep almost all": spec(kept=0.9, seed=16),
    "keep one": spec(kept=0.0, seed=17),
}


def made(name: str) -> PrefillCase:
    chosen = CASES[name]
    return make_prefill_case(chosen, tuple(map(min, chosen.lens, QUERY_LENS)))


def check(case: PrefillCase, result: PrefillResult) -> None:
    """Counts equal the specification's; outputs err by rounding P, means and the output at most."""
    exact, _ = case.expected()
    assert torch.equal(result.num_kept, exact.num_kept)
    assert torch.equal(result.v_tiles_read, exact.v_tiles_read)
    unit = torch.finfo(case.spec.dtype).eps
    allowed = 2 * unit * float(exact.out.abs().max().clamp(min=1))
    torch.testing.assert_close(result.out.double(), exact.out, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", CASES)
def test_matches_the_specification(name: str) -> None:
    case = made(name)
    check(case, run(case))


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_matches_the_specification_on_float8(dtype: torch.dtype) -> None:
    case = make_prefill_case(spec(dtype=FP16, seed=20), QUERY_LENS)
    quantise(case, dtype)
    check(case, run(case, gpu_pages(case, dtype)))


@pytest.mark.parametrize("rows", [16, 64, 128])
def test_the_size_of_row_tiles_does_not_matter(rows: int) -> None:
    case = made("window, sinks, soft cap")
    check(case, run(case, rows=rows))


def test_dense_rows_ignore_theta() -> None:
    case = make_prefill_case(spec(window=100, sinks=True, seed=21), QUERY_LENS)
    case.dense[1::3] = True  # in tiles with rows that are pruned
    check(case, run(case))
    case.dense.fill_(True)  # whole tiles
    check(case, run(case))


def test_theta_of_minus_infinity_keeps_every_key() -> None:
    case = make_prefill_case(spec(seed=22), QUERY_LENS)
    case.theta.fill_(-math.inf)
    check(case, run(case))


@pytest.mark.parametrize("theta", [1e30, math.inf])
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("changes", [{}, {"compensation": False}, {"group_size": 32}], ids=str)
def test_a_row_never_loses_its_best_key(changes: Any, window: int | None, theta: float) -> None:
    case = make_prefill_case(spec(window=window, seed=23, **changes), QUERY_LENS)
    case.theta.fill_(theta)
    result = run(case)
    assert (result.num_kept == 1).all()
    check(case, result)


def test_tiles_of_best_keys_are_counted_once() -> None:
    case = make_prefill_case(spec(num_heads=4, num_kv_heads=1, lens=(230,), seed=24), (60,))
    # Heads 0 and 1 agree and keep nothing; head 2 agrees with them and keeps; head 3 is on its own.
    case.query[:, 1] = case.query[:, 2] = case.query[:, 0]
    case.theta[:, :2] = 1e30
    check(case, run(case))
    case.theta.fill_(1e30)
    result = run(case)
    assert result.v_tiles_read.max() == 2
    check(case, result)


def joined(case: PrefillCase, chunk: int) -> PrefillResult:
    """`chunk` query tokens of every sequence at a time."""
    parts, done, pages = case.empty(len(case.query)), [0] * len(case.query_lens), gpu_pages(case)
    while any(d < q for d, q in zip(done, case.query_lens, strict=True)):
        take = tuple(min(chunk, q - d) for d, q in zip(done, case.query_lens, strict=True))
        done = [d + t for d, t in zip(done, take, strict=True)]
        part = run(case, pages, upto=tuple(done), take=take)
        rows, _ = case.chunk(tuple(done), take)
        for name in ("out", "num_kept", "v_tiles_read"):
            getattr(parts, name)[rows] = getattr(part, name)
    return parts


def assert_same(result: PrefillResult, other: PrefillResult) -> None:
    assert torch.equal(result.num_kept, other.num_kept)
    assert torch.equal(result.v_tiles_read, other.v_tiles_read)
    torch.testing.assert_close(result.out, other.out, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("changes", [{}, {"window": 70, "sinks": True, "soft_cap": 3.0}], ids=str)
def test_chunks_do_not_matter(changes: Any) -> None:
    case = make_prefill_case(spec(lens=(100, 70), seed=25, **changes), (60, 40))
    whole = run(case)
    for chunk in (32, 13):
        assert_same(joined(case, chunk), whole)


def test_chunks_prefix_hits_and_neighbours_of_a_long_prompt_do_not_matter() -> None:
    """Chunks as a server cuts them: the second sequence starts behind a prefix that is cached."""
    changes = {"num_heads": 4, "num_kv_heads": 1, "lens": (530, 400), "kept": 0.05, "seed": 29}
    case = make_prefill_case(spec(**changes), (530, 110))
    cpu = case.run(api.available_impl().impl)
    pages = gpu_pages(case)
    assert_same(run(case, pages), cpu)
    assert_same(joined(case, 256), cpu)
    # The last 18 tokens, as after a hit of 512, beside one token of the other sequence.
    hit = run(case, pages, upto=(530, 110), take=(18, 1))
    rows, _ = case.chunk((530, 110), (18, 1))
    assert torch.equal(hit.num_kept, cpu.num_kept[rows])
    assert torch.equal(hit.v_tiles_read, cpu.v_tiles_read[rows])
    assert cpu.num_kept.float().mean() < 30


def one_hot(case: PrefillCase) -> None:
    """V rows that are one-hot in the position, so that the output shows the kept set."""
    length = case.spec.lens[0]
    hot = torch.eye(length, case.spec.head_dim).to(case.spec.dtype)
    case.cache.values[0] = hot[:, None].expand(-1, case.spec.num_kv_heads, -1).contiguous()
    write(case.cache, 0)


def test_kept_sets_are_the_cpu_kernels_whatever_the_chunk() -> None:
    case = make_prefill_case(
        Spec(4, 2, 128, 32, 16, lens=(128,), compensation=False, dtype=BF16, seed=26), (128,)
    )
    one_hot(case)
    cpu = case.run(api.available_impl().impl)
    kept = cpu.out != 0
    for result in (run(case), joined(case, 50), joined(case, 9)):
        assert torch.equal(result.out != 0, kept)
        assert torch.equal(result.num_kept, cpu.num_kept)
        assert torch.equal(result.v_tiles_read, cpu.v_tiles_read)
    assert 0.05 < kept.sum() / (4 * 128 * 129 / 2) < 0.2


@pytest.mark.parametrize("name", ["plain", "window, sinks, soft cap", "keep one"])
def test_counts_and_outputs_are_the_cpu_kernels(name: str) -> None:
    case = made(name)
    assert_same(run(case), case.run(api.available_impl().impl))


def test_the_other_sequences_do_not_matter() -> None:
    case = make_prefill_case(spec(lens=(140, 63, 1, 100), seed=27), (140, 20, 1, 30))
    together = run(case)
    for seq in range(4):
        alone = tuple(q if i == seq else 0 for i, q in enumerate(case.query_lens))
        part, rows = run(case, upto=case.query_lens, take=alone), case.rows_of(seq)
        for name in ("out", "num_kept", "v_tiles_read"):
            # The same tiles of the same rows: not a bit may differ.
            assert torch.equal(getattr(part, name), getattr(together, name)[rows]), name


def hide(case: PrefillCase, pages: GPUPages, value: float) -> None:
    """Fill what no row sees of the cache, and the means of groups seen in part, with a value."""
    seen = torch.zeros(pages.key.shape[0], case.spec.block_size, dtype=torch.bool)
    window = case.spec.window
    for seq, length in enumerate(case.spec.lens):
        first = max(length - case.query_lens[seq] + 1 - (window or length), 0)
        slots = slots_of(case.cache, seq)[first:]
        seen[slots // case.spec.block_size, slots % case.spec.block_size] = True
    groups = seen.unflatten(1, (-1, case.spec.group_size)).all(-1)
    pages.key.transpose(1, 2)[~seen] = value
    pages.value.transpose(1, 2)[~seen] = value
    pages.means.transpose(1, 2)[~groups] = value


@pytest.mark.parametrize("kept", [0.05, 0.9])
@pytest.mark.parametrize("window", [None, 45])
def test_what_no_row_sees_never_reaches_the_output(window: int | None, kept: float) -> None:
    """Slots that were never written, and those of a block's earlier owner."""
    case = make_prefill_case(spec(lens=(63, 141), window=window, kept=kept, seed=28), (20, 50))
    exact, _ = case.expected()
    results = []
    for value in (math.nan, 1e4):
        pages = gpu_pages(case)
        hide(case, pages, value)
        results.append(run(case, pages))
        assert torch.equal(results[-1].num_kept, exact.num_kept)
        torch.testing.assert_close(results[-1].out.double(), exact.out, rtol=0, atol=3e-2)
    assert torch.equal(results[0].out, results[1].out)


def test_pruning_is_visible() -> None:
    """The cases would pass a dense kernel if nothing were pruned."""
    case = made("plain")
    result = run(case)
    longest = case.rows_of(2).stop - 1
    assert result.num_kept[longest].max() < 140 / 4
    case.dense.fill_(True)
    dense, _ = case.expected()
    assert (dense.out[longest] - result.out[longest].double()).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta": torch.zeros(29, 4)}, r"theta must be \[30, 4\]"),
        ({"dense": torch.zeros(30)}, "dense must be contiguous"),
        ({"v_tiles_read": torch.zeros(30, 4, dtype=torch.int32)}, "v_tiles_read must be"),
        ({"query_start_loc": torch.zeros(2, dtype=torch.int32)}, "query_start_loc must be"),
        ({"block_table": torch.zeros(2, 3)}, r"block_table must be \[2, max_blocks\]"),
        ({"k_scale": torch.ones(1)}, "together"),
        ({"sinks": torch.zeros(3)}, "sinks must be"),
        ({"rows": 17}, "multiple of 2"),
        ({"tile": 96}, "multiple of 64"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    from vllm_toptheta.kernels.triton_config import PrefillConfig
    from vllm_toptheta.kernels.triton_prefill import prefill_attention

    case = make_prefill_case(Spec(4, 2, 64, 32, 16, lens=(10, 80), dtype=BF16), (10, 20))
    pages = gpu_pages(case)
    config = PrefillConfig(rows=changes.pop("rows", 32), tile=changes.pop("tile", 64))
    arguments: dict[str, Any] = {
        "query": case.query,
        "key_cache": pages.key,
        "value_cache": pages.value,
        "v_means": pages.means,
        "block_table": case.cache.block_table,
        "query_start_loc": torch.tensor([0, 10, 30], dtype=torch.int32),
        "seq_lens": torch.tensor([10, 80], dtype=torch.int32),
        "theta": case.theta,
        "sm_scale": 0.1,
        "dense": torch.zeros(30, dtype=torch.int8),
        "out": torch.empty_like(case.query),
        "num_kept": torch.empty(30, 4, dtype=torch.int32),
        "v_tiles_read": torch.empty(30, 2, dtype=torch.int32),
        "config": config,
    }
    with pytest.raises(ValueError, match=message):
        prefill_attention(**(arguments | changes))
