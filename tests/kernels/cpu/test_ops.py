"""The contract of the CPU kernels: what is refused, and with which words."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from decode_calls import TARGETS, decode, layer_and_rows, needs_native
from torch import Tensor

from vllm_toptheta.kernels import ops
from vllm_toptheta.kernels.cpu import build, native
from vllm_toptheta.kernels.decode import DecodeLayer, DecodeRows
from vllm_toptheta.kernels.layout import PageLayout
from vllm_toptheta.testing.cases import Result, Spec, make_case


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((33, 64), "block_size must be a multiple of 16"),
        ((1024, 64), "up to 512"),
        ((0, 64), "block_size"),
        ((32, 72), "head_dim must be a multiple of 16"),
        ((48, 64, "amx"), "multiples of 32, got 48 and 64"),
    ],
)
def test_layouts_are_checked(sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PageLayout(*sizes)


@pytest.mark.parametrize("layout", [PageLayout(32, 80), PageLayout(128, 64)], ids=str)
def test_parts_share_the_page_without_overlap(layout: PageLayout) -> None:
    shape = (3, 2, layout.block_size, layout.content_elements)
    kv_cache = torch.zeros(2, *shape).transpose(0, 1)[:, 1]
    parts = (layout.keys(kv_cache), layout.values(kv_cache), layout.v_means(kv_cache))
    for number, part in enumerate(parts, start=1):
        part += number
    pages = kv_cache.flatten(2)
    size = layout.block_size * layout.head_dim
    used = 2 * size + size // layout.group_size
    assert (pages[..., :size] == 1).all()
    assert (pages[..., size : 2 * size] == 2).all()
    assert (pages[..., 2 * size : used] == 3).all()
    assert (pages[..., used:] == 0).all()


LAYER = ("layout", "weights", "sm_scale", "window", "soft_cap", "target")
CALL = ("query", "kv_cache", "out", "sinks")


def arguments() -> dict[str, object]:
    case = make_case(Spec())
    pages, layout = case.cpu_pages()
    result = vars(Result.empty(case.spec))
    return {
        "query": case.query,
        "kv_cache": pages,
        "layout": layout,
        "block_table": case.block_table,
        "seq_lens": case.seq_lens,
        "log_min_prob": case.log_min_prob[None],
        "min_mass": case.min_mass,
        "sm_scale": case.spec.sm_scale,
        "dense": case.dense[None],
        "weights": case.weights,
        "window": None,
        "soft_cap": None,
        "sinks": None,
        "out": result["out"],
        **{name: result[name][None] for name in ("num_kept", "kept_mass", "lifts")},
        "target": "eager",
    }


def attend(given: dict[str, object]) -> DecodeLayer:
    """One layer's call, from its arguments by name."""
    rest = dict(given)
    layer = DecodeLayer(0, **{name: rest.pop(name) for name in LAYER})  # type: ignore[arg-type]
    call = {name: rest.pop(name) for name in CALL}
    layer.attend(DecodeRows(**rest), **call)  # type: ignore[arg-type]
    return layer


def second_half(x: Tensor) -> Tensor:
    """The same values as every second element of the last dimension."""
    return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", lambda x: x[:, :3], "query must be"),
        ("weights", lambda x: x[:3], "got 1, 2 and 6"),
        ("query", lambda x: x[0], "query must be"),
        ("query", lambda x: x.bfloat16(), "query must be .* torch.float32"),
        ("query", second_half, "rows of query must be contiguous"),
        ("query", lambda x: x[..., :48], "query must be"),
        ("kv_cache", lambda x: x[..., :-1], "kv_cache must be"),
        ("kv_cache", second_half, "last two dimensions of kv_cache must be contiguous"),
        ("kv_cache", lambda x: x.double(), "kv_cache must be one of"),
        ("layout", PageLayout(32, 64), "kv_cache must be"),
        ("block_table", lambda x: x.long(), "block_table must be .* torch.int32"),
        ("block_table", lambda x: x[:2], "block_table must be"),
        ("block_table", lambda x: x[0], "block_table must be"),
        ("seq_lens", lambda x: x.long(), "seq_lens must be .* torch.int32"),
        ("seq_lens", second_half, "seq_lens must be contiguous"),
        ("log_min_prob", lambda x: x.double(), "log_min_prob must be .* torch.float32"),
        ("log_min_prob", lambda x: x[..., :1], "num_kept must be"),
        ("log_min_prob", lambda x: x[0], "log_min_prob and kept_mass must be"),
        ("log_min_prob", second_half, "rows of log_min_prob must be contiguous"),
        ("min_mass", lambda x: x[:1], "min_mass must be"),
        ("weights", lambda x: x[:, :4], "weights must be"),
        ("dense", lambda x: x.int(), "dense must be .* torch.bool"),
        ("out", lambda x: x[1:], "out must be"),
        ("num_kept", lambda x: x.long(), "num_kept must be .* torch.int32"),
        ("kept_mass", lambda x: x[:, :1], "kept_mass must be"),
        ("kept_mass", lambda x: x[..., :1].contiguous(), "got 1, 2 and 1"),
        ("lifts", lambda x: x.long(), "lifts must be .* torch.int32"),
        ("sinks", torch.zeros(3), "sinks must be"),
        ("window", 0, "window must be positive or None, got 0"),
        ("soft_cap", 0.0, "soft_cap must be positive or None, got 0"),
        ("target", "cuda", 'target must be "native" or "eager", got \'cuda\''),
    ],
)
def test_arguments_are_checked(name: str, value: object, message: str) -> None:
    given = arguments()
    given[name] = value(given[name]) if callable(value) else value
    with pytest.raises(ValueError, match=message):
        attend(given)


def test_heads_are_a_multiple_of_kv_heads() -> None:
    given = arguments()
    for name in ("query", "out"):
        given[name] = given[name][:, :5]  # type: ignore[index]
    given["weights"] = given["weights"][:5]  # type: ignore[index]
    given["kept_mass"] = given["kept_mass"][..., :5].contiguous()  # type: ignore[index]
    with pytest.raises(ValueError, match="num_heads 5 is not a multiple of num_kv_heads 2"):
        attend(given)


@needs_native
def test_what_is_prepared_is_checked_again_where_it_differs() -> None:
    """One layer's second step has other rows, pages, sinks and strides."""
    other = make_case(Spec(lens=(300, 5), sinks=True, seed=9))
    layer = attend({**arguments(), "target": "native"})
    pages, layout = other.cpu_pages()
    ops.update_side_data(pages, layout, other.slots(), target="native")
    result, expected = Result.empty(other.spec), decode(other)
    layer.weights.copy_(other.weights)
    _, rows = layer_and_rows(other, result, layout, "native")
    wide = torch.zeros(4, 9, 64)
    query, out = wide[:, :6], torch.zeros(4, 7, 64)[:, 1:]
    query[:2] = other.query
    layer.attend(rows, query, pages, out, other.sinks)
    assert torch.equal(out[:2], expected.out)
    assert torch.equal(result.num_kept, expected.num_kept)
    assert (out[2:] == 0).all()
    with pytest.raises(ValueError, match="query must be"):
        layer.attend(rows, query[:, :5], pages, out, other.sinks)
    with pytest.raises(ValueError, match="kv_cache must be"):
        layer.attend(rows, query, pages[..., :-1], out, other.sinks)
    layer.attend(rows, query, pages, out)
    without = decode(replace(other, sinks=None))
    assert torch.equal(out[:2], without.out)


@pytest.mark.parametrize("target", TARGETS)
def test_an_empty_batch_is_nothing_to_do(target: ops.Target) -> None:
    given = arguments()
    for name in ("query", "block_table", "seq_lens", "min_mass", "out"):
        given[name] = given[name][:0]  # type: ignore[index]
    for name in ("log_min_prob", "dense", "num_kept", "kept_mass", "lifts"):
        given[name] = given[name][:, :0]  # type: ignore[index]
    attend({**given, "target": target})


def test_a_missing_library_is_named_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = native.load_library(Path("/nonexistent/libmissing.so"))
    monkeypatch.setattr(native, "load_native", lambda: missing)
    available = ops.available_target()
    assert available.target == "eager"
    assert available.reason is not None
    assert "libmissing.so" in available.reason
    with pytest.raises(RuntimeError, match='target="native" is not available: .*libmissing.so'):
        decode(make_case(Spec(lens=(1,))))


@needs_native
def test_a_library_of_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_ABI_VERSION", 999)
    found = native.load_library(Path(build.__file__).parent / build.LIBRARY_NAME)
    assert found.library is None
    assert found.reason is not None
    assert (
        "expected 999; rebuild it with: python -m vllm_toptheta.kernels.cpu.build" in found.reason
    )


def test_compiler_problems_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="'no-such-compiler' not found; install g"):
        build.build_native(tmp_path)
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'print(\"broken\"); exit(1)'")
    with pytest.raises(RuntimeError, match="failed: .*\nbroken"):
        build.build_native(tmp_path)
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    with pytest.raises(RuntimeError, match="this machine is riscv64"):
        build.build_native(tmp_path)
    assert list(tmp_path.iterdir()) == []


@needs_native
def test_the_library_needs_neither_python_nor_torch() -> None:
    check = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).topt_cpu_supported())"
    library = str(Path(build.__file__).parent / build.LIBRARY_NAME)
    done = subprocess.run(
        [sys.executable, "-c", check, library], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize("target", TARGETS)
def test_a_block_table_that_is_too_short_is_refused(target: ops.Target) -> None:
    case = make_case(Spec(lens=(523,)))
    pages, _ = case.cpu_pages()
    short = replace(case, block_table=case.block_table[:, :5])
    with pytest.raises(ValueError, match="outside the KV cache"):
        decode(short, target, pages=pages)
