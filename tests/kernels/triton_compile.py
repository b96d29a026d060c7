"""Compiles every kernel specialisation in use for GPUs that are not here, and prints what the
binaries need as JSON.

Runs as a program, because compiling and interpreting exclude each other within one process. What is
compiled is what the launchers launch: their calls are recorded instead of executed.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from vllm_toptheta.kernels import (
    triton_counts,
    triton_decode,
    triton_means,
    triton_prefill,
    triton_theta,
)
from vllm_toptheta.kernels.triton_config import choose_config, choose_prefill_config

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}

SHARED_LIMITS = {
    "cuda:80": 163 << 10,
    "cuda:90": 227 << 10,
    "cuda:100": 227 << 10,
    "hip:gfx942": 64 << 10,
}
"""Bytes of shared memory a program may have."""


@dataclass
class Shape:
    """One specialisation of the attention kernels."""

    head_dim: int = 128
    heads: int = 4
    block_size: int = 16
    group_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None
    soft_cap: float | None = None
    sinks: bool = False
    compensation: bool = True
    num_splits: int = 16

    @property
    def name(self) -> str:
        cache = str(self.cache_dtype or self.dtype).removeprefix("torch.")
        extra = ("+cap" if self.soft_cap else "") + ("+sinks" if self.sinks else "")
        extra += "" if self.compensation else "-means"
        query = str(self.dtype).removeprefix("torch.")
        sizes = f"d{self.head_dim} h{self.heads} b{self.block_size} g{self.group_size}"
        return f"{sizes} {query}/{cache}{extra}"


E4M3, E5M2, E4M3_AMD = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz

SHAPES = [
    Shape(),
    Shape(heads=8, block_size=128, group_size=128),
    Shape(block_size=64, group_size=64),
    Shape(head_dim=64, heads=8, sinks=True),
    Shape(head_dim=80, heads=1, dtype=torch.float16),
    Shape(head_dim=96, heads=3, block_size=32, group_size=32),
    Shape(head_dim=112, heads=16),
    Shape(head_dim=256, heads=2, soft_cap=50.0),
    Shape(head_dim=256, heads=8, block_size=128, group_size=128, dtype=torch.float16),
    Shape(cache_dtype=E4M3),
    Shape(head_dim=256, cache_dtype=E4M3),
    Shape(head_dim=64, cache_dtype=E5M2, dtype=torch.float16),
    Shape(compensation=False, num_splits=64),
]


@dataclass
class Recorder:
    """Stands in for a jit function and notes how it would have been launched."""

    function: Any
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.calls.append((args, kwargs))


def source(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for these arguments, and the compiler options among them."""
    options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(function.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name in function.arg_names}
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, (name, parameter) in enumerate(
        zip(function.arg_names, function.params, strict=True)
    ):
        value = values[name]
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (is_int and value == 1):
            signature[name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (is_int and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(function, signature, constants, attributes), options


@contextlib.contextmanager
def recorded(module: Any, *names: str) -> Iterator[list[Recorder]]:
    """Record the launches of some jit functions of a module."""
    functions = [getattr(module, name) for name in names]
    recorders = [Recorder(function) for function in functions]
    for name, recorder in zip(names, recorders, strict=True):
        setattr(module, name, recorder)
    try:
        yield recorders
    finally:
        for name, function in zip(names, functions, strict=True):
            setattr(module, name, function)


Call = tuple[str, ASTSource, dict[str, Any]]


def sources(recorders: list[Recorder]) -> Iterator[Call]:
    """What Triton would compile for recorded launches."""
    for recorder in recorders:
        for args, kwargs in recorder.calls:
            yield recorder.function.__name__, *source(recorder.function, args, kwargs)


def attention_calls(shape: Shape, amd: bool) -> Iterator[Call]:
    """The launches of one layer: a decode step, a prefill step, and the update of the means."""
    cache_dtype = shape.cache_dtype or shape.dtype
    if amd and cache_dtype == E4M3:
        cache_dtype = E4M3_AMD
    num_kv_heads, num_heads = 8, 8 * shape.heads
    kv = torch.empty(2, shape.block_size, num_kv_heads, 2 * shape.head_dim, dtype=cache_dtype)
    key, value = kv.transpose(1, 2).split(shape.head_dim, dim=-1)
    groups = shape.block_size // shape.group_size
    means = torch.empty(2, num_kv_heads, groups, shape.head_dim, dtype=shape.dtype)
    query = torch.empty(2, num_heads, shape.head_dim, dtype=shape.dtype)
    scale = torch.ones(1) if shape.cache_dtype else None
    common: dict[str, Any] = {
        "sm_scale": 0.1,
        "dense": torch.empty(2, dtype=torch.int8),
        "out": torch.empty_like(query),
        "num_kept": torch.empty(2, num_heads, dtype=torch.int32),
        "soft_cap": shape.soft_cap,
        "sinks": torch.empty(num_heads) if shape.sinks else None,
        "k_scale": scale,
        "v_scale": scale,
    }
    read = torch.empty(2, num_kv_heads, dtype=torch.int32)
    cache = (query, key, value, means if shape.compensation else None)
    block_table, theta = torch.empty(2, 32, dtype=torch.int32), torch.empty(2, num_heads)
    seq_lens = torch.empty(2, dtype=torch.int32)
    sizes = {"head_dim": shape.head_dim, "group_size": shape.group_size}
    with recorded(triton_decode, "_split_kernel", "_merge_kernel") as recorders:
        triton_decode.decode_attention(
            *cache,
            block_table,
            seq_lens,
            theta,
            v_rows_read=read,
            scratch=triton_decode.DecodeScratch.allocate(
                2 * shape.num_splits, num_heads, num_kv_heads, shape.head_dim, "cpu"
            ),
            num_splits=shape.num_splits,
            config=choose_config(**sizes, cache_bytes=cache_dtype.itemsize),
            **common,
        )
    yield from sources(recorders)
    with recorded(triton_prefill, "_prefill_kernel") as recorders:
        triton_prefill.prefill_attention(
            *cache,
            block_table,
            torch.empty(3, dtype=torch.int32),
            seq_lens,
            theta,
            v_tiles_read=read,
            config=choose_prefill_config(**sizes, warp_size=64 if amd else 32),
            **common,
        )
    yield from sources(recorders)
    if shape.compensation:
        with recorded(triton_means, "_update_v_means_kernel") as recorders:
            triton_means.update_v_means(value, means, torch.zeros(1, dtype=torch.int64))
        yield from sources(recorders)


def step_calls() -> Iterator[Call]:
    """The launches around a step's layers: 32 layers, 8 levels, 32 heads, 40 knots."""
    layers, rows = torch.zeros(32), torch.zeros(4)
    with recorded(triton_theta, "_lookup_theta_kernel") as recorders:
        triton_theta.lookup_theta(
            torch.zeros(32, 8, 32, 40),
            torch.zeros(32, 8, 32),
            torch.arange(40.0),
            layer_window=layers.int(),
            layer_k=layers,
            layer_level=layers,
            layer_dense=layers.to(torch.int8),
            seq_lens=rows.int(),
            row_k=rows,
            row_level=rows,
            row_dense=rows,
            min_len=1024,
            out=torch.zeros(32, 4, 32),
            dense=torch.zeros(32, 4, dtype=torch.int8),
        )
    yield from sources(recorders)
    dense = torch.zeros(32, 4, dtype=torch.int8)
    kept = torch.zeros(32, 4, 32, dtype=torch.int32)
    read = torch.zeros(32, 4, 8, dtype=torch.int32)
    with recorded(triton_counts, "_count_kernel") as recorders:
        triton_counts.count_step(
            torch.zeros(6, dtype=torch.int32),
            torch.zeros(7, dtype=torch.int32),
            triton_counts.CountedLayers(
                layers.int(), layers.int(), layers, layers, torch.zeros(8, 32, 32)
            ),
            triton_counts.CountedRows(rows, rows, dense, kept, read, 4),
            triton_counts.CountedPrompts(dense, kept, read),
            prunes_prompts=True,
            prunes_generated=True,
            out=torch.zeros(6, 32, len(triton_counts.COLUMNS), dtype=torch.int64),
        )
    yield from sources(recorders)


def resources(compiled: Any) -> dict[str, int]:
    """Registers, spilled bytes or registers, and shared memory, read from the binary."""
    if "cubin" in compiled.asm:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            report = subprocess.run(
                [tool, "--dump-resource-usage", file.name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        usage = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", report)}
        return {
            "registers": usage["REG"],
            "spills": usage["STACK"] + usage["LOCAL"],
            "shared": compiled.metadata.shared,
        }
    assembly = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "shared": compiled.metadata.shared,
    }


def is_served(shape: Shape, target: str) -> bool:
    """Whether the backend would accept the shape on the target."""
    if target == "cuda:80" and shape.cache_dtype == E4M3:
        return False  # compute capability 8.9 brought it; vLLM refuses it below
    try:
        choose_config(
            head_dim=shape.head_dim,
            group_size=shape.group_size,
            cache_bytes=(shape.cache_dtype or shape.dtype).itemsize,
            shared_limit=SHARED_LIMITS[target],
        )
    except ValueError:
        return False
    return True


def main() -> None:
    wanted = sys.argv[1:] or list(TARGETS)
    for target_name in wanted:
        target = TARGETS[target_name]
        for shape in SHAPES:
            if not is_served(shape, target_name):
                continue
            calls = list(attention_calls(shape, target.backend == "hip"))
            if shape is SHAPES[0]:
                calls += list(step_calls())
            for name, kernel_source, options in calls:
                compiled = triton.compile(kernel_source, target=target, options=options)
                record = {
                    "target": target_name,
                    "shape": shape.name,
                    "kernel": name,
                    "shared_limit": SHARED_LIMITS[target_name],
                }
                assembly = compiled.asm["ttgir"]
                record["async_copies"] = assembly.count("async_copy_global_to_local")
                record["predicated_loads"] = (
                    len(re.findall(r"@%p\d+ ld\.global", compiled.asm["ptx"]))
                    if "ptx" in compiled.asm
                    else 0
                )
                print(json.dumps(record | resources(compiled)), flush=True)


if __name__ == "__main__":
    main()
