"""The contract of the kernels: what is refused, and with which words."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_cases import IMPLS, Case, Spec, make_case, needs_native
from torch import Tensor

from vllm_toptheta.kernels import api, build_native, cpu
from vllm_toptheta.kernels.api import PageLayout


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((33, 64, 16), "block_size must be a multiple of 16"),
        ((1024, 64, 16), "up to 512"),
        ((0, 64, 16), "block_size"),
        ((32, 72, 16), "head_dim must be a multiple of 16"),
        ((32, 64, 8), r"group_size must be one of \(16, 32, 64, 128\), got 8"),
        ((32, 64, 64), r"does not divide block_size 32; choose one of \[16, 32\]"),
    ],
)
def test_layouts_are_checked(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PageLayout(*sizes)


@pytest.mark.parametrize("layout", [PageLayout(32, 80, 32), PageLayout(128, 64, 16)], ids=str)
def test_views_share_the_page_without_overlap(layout: PageLayout) -> None:
    shape = (3, 2, layout.block_size, layout.content_elements)
    kv_cache = torch.zeros(2, *shape).transpose(0, 1)[:, 1]
    views = layout.views(kv_cache)
    assert views.key_cache.shape == (3, 2, layout.head_dim, layout.block_size)
    assert views.key_cache_vllm.data_ptr() == views.key_cache.data_ptr()
    for number, part in enumerate((views.key_cache, views.value_cache, views.v_means), start=1):
        part += number
    pages = kv_cache.flatten(2)
    size = layout.block_size * layout.head_dim
    used = 2 * size + size // layout.group_size
    assert (pages[..., :size] == 1).all()
    assert (pages[..., size : 2 * size] == 2).all()
    assert (pages[..., 2 * size : used] == 3).all()
    assert (pages[..., used:] == 0).all()


def changed(case: Case, name: str, value: object) -> dict[str, object]:
    spec = case.spec
    num_seqs = len(spec.lens)
    arguments: dict[str, object] = {
        "query": case.query,
        "kv_cache": case.kv_cache,
        "layout": spec.layout,
        "block_table": case.block_table,
        "seq_lens": torch.tensor(spec.lens, dtype=torch.int32),
        "theta": case.theta,
        "sm_scale": spec.sm_scale,
        "dense": case.dense,
        "compensation": True,
        "window": None,
        "soft_cap": None,
        "sinks": None,
        "out": torch.empty(num_seqs, spec.num_heads, spec.head_dim),
        "num_kept": torch.empty(num_seqs, spec.num_heads, dtype=torch.int32),
        "v_rows_read": torch.empty(num_seqs, spec.num_kv_heads, dtype=torch.int32),
        "impl": "torch",
    }
    current = arguments[name]
    arguments[name] = value(current) if callable(value) else value
    return arguments


def second_half(x: Tensor) -> Tensor:
    """The same values as every second element of the last dimension."""
    return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", lambda x: x[:, :3], "num_heads 3 is not a multiple of num_kv_heads 2"),
        ("query", lambda x: x[0], "query must be"),
        ("query", lambda x: x.bfloat16(), "query must be .* torch.float32"),
        ("query", second_half, "rows of query must be contiguous"),
        ("query", lambda x: x[..., :48], "query must be"),
        ("kv_cache", lambda x: x[..., :-1], "kv_cache must be"),
        ("kv_cache", second_half, "last two dimensions of kv_cache must be contiguous"),
        ("kv_cache", lambda x: x.double(), "kv_cache must be one of"),
        ("layout", PageLayout(32, 64, 32), "kv_cache must be"),
        ("block_table", lambda x: x.long(), "block_table must be .* torch.int32"),
        ("block_table", lambda x: x[:2], "block_table must be"),
        ("seq_lens", lambda x: x.long(), "seq_lens must be .* torch.int32"),
        ("seq_lens", second_half, "seq_lens must be contiguous"),
        ("theta", lambda x: x.double(), "theta must be .* torch.float32"),
        ("dense", lambda x: x.int(), "dense must be .* torch.bool"),
        ("out", lambda x: x[1:], "out must be"),
        ("num_kept", lambda x: x.long(), "num_kept must be .* torch.int32"),
        ("v_rows_read", lambda x: x[:, :1], "v_rows_read must be"),
        ("sinks", torch.zeros(3), "sinks must be"),
        ("window", 0, "window must be positive or None, got 0"),
        ("soft_cap", 0.0, "soft_cap must be positive or None, got 0"),
        ("impl", "cuda", 'impl must be "native" or "torch", got \'cuda\''),
    ],
)
def test_arguments_are_checked(name: str, value: object, message: str) -> None:
    case = make_case(Spec())
    with pytest.raises(ValueError, match=message):
        api.decode_attention(**changed(case, name, value))


@pytest.mark.parametrize("bad", [-1, 10_000])
@pytest.mark.parametrize("impl", IMPLS)
def test_blocks_outside_the_cache_are_refused(impl: str, bad: int) -> None:
    case = make_case(Spec())
    case.block_table[3, 1] = bad
    with pytest.raises(ValueError, match="outside the KV cache"):
        case.run(impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_batch_is_nothing_to_do(impl: str) -> None:
    empty = torch.empty(0, dtype=torch.int32)
    api.decode_attention(
        torch.empty(0, 4, 64),
        torch.zeros(2, 2, 32, PageLayout(32, 64, 16).content_elements),
        PageLayout(32, 64, 16),
        empty.view(0, 3),
        empty,
        torch.empty(0, 4),
        sm_scale=1.0,
        dense=torch.empty(0, dtype=torch.bool),
        compensation=True,
        window=None,
        soft_cap=None,
        sinks=None,
        out=torch.empty(0, 4, 64),
        num_kept=empty.view(0, 4),
        v_rows_read=empty.view(0, 2),
        impl=impl,
    )


def test_a_missing_library_is_named_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LIBRARY_NAME", "libmissing.so")
    monkeypatch.setattr(cpu, "load_native", cpu.load_native.__wrapped__)
    available = api.available_impl()
    assert available.impl == "torch"
    assert available.reason is not None
    assert "libmissing.so" in available.reason
    with pytest.raises(RuntimeError, match='impl="native" is not available: .*libmissing.so'):
        make_case(Spec()).run("native")


@needs_native
def test_the_library_builds_into_any_directory(tmp_path: Path) -> None:
    library = build_native.build_native(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [library.name]
    check = "import torch, ctypes, sys; print(ctypes.CDLL(sys.argv[1]).topt_cpu_supported())"
    done = subprocess.run(
        [sys.executable, "-c", check, str(library)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1"


def test_compiler_problems_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_native.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="'no-such-compiler' not found; install g"):
        build_native.build_native(tmp_path)
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'print(\"broken\"); exit(1)'")
    with pytest.raises(RuntimeError, match="failed: .*\nbroken"):
        build_native.build_native(tmp_path)
    monkeypatch.setattr(build_native.platform, "machine", lambda: "riscv64")
    with pytest.raises(RuntimeError, match="this machine is riscv64"):
        build_native.build_native(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("impl", IMPLS)
def test_a_block_table_that_is_too_short_is_refused(impl: str) -> None:
    case = make_case(Spec())
    case.block_table = case.block_table[:, :5]
    with pytest.raises(ValueError, match="outside the KV cache"):
        case.run(impl)
