"""Compiles every kernel specialisation in use for GPUs that are not here, and prints what the
binaries need as JSON.

Runs as a program, because compiling and interpreting exclude each other within one process. What is
compiled is what the launchers launch, specialised by Triton's own rules.
"""

import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton_launches import TARGETS, Recorder, Variant, recorded, variants

from vllm_toptheta.kernels import (
    triton_counts,
    triton_decode,
    triton_means,
    triton_prefill,
    triton_theta,
)
from vllm_toptheta.kernels.triton_config import choose_config, choose_prefill_config

SHARED_LIMITS = {
    "cuda:80": 163 << 10,
    "cuda:90": 227 << 10,
    "cuda:100": 227 << 10,
    "hip:gfx942": 64 << 10,
}
"""Bytes of shared memory a program may have."""


@dataclass(frozen=True)
class Shape:
    """One specialisation of the attention kernels."""

    head_dim: int = 128
    heads: int = 4
    block_size: int = 16
    group_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    compensation: bool = True

    @property
    def name(self) -> str:
        cache = str(self.cache_dtype or self.dtype).removeprefix("torch.")
        extra = ("+window" if self.window else "") + ("+cap" if self.soft_cap else "")
        extra += ("+sinks" if self.sinks else "") + ("" if self.compensation else "-means")
        query = str(self.dtype).removeprefix("torch.")
        sizes = f"d{self.head_dim} h{self.heads} b{self.block_size} g{self.group_size}"
        return f"{sizes} {query}/{cache}{extra}"


E4M3, E5M2, E4M3_AMD = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz
FP16 = torch.float16

SHAPES = [
    Shape(),
    Shape(heads=8, block_size=128, group_size=128),
    Shape(block_size=64, group_size=64),
    Shape(head_dim=64, heads=8, sinks=True, window=128),
    Shape(head_dim=80, heads=1, dtype=FP16),
    Shape(head_dim=96, heads=3, block_size=32, group_size=32),
    Shape(head_dim=112, heads=16),
    Shape(head_dim=256, heads=2, soft_cap=50.0, window=4096),
    Shape(head_dim=256, heads=8, block_size=128, group_size=128, dtype=FP16),
    Shape(cache_dtype=E4M3),
    Shape(head_dim=256, cache_dtype=E4M3),
    Shape(head_dim=64, cache_dtype=E5M2, dtype=FP16),
    Shape(compensation=False),
]
NUM_KV_HEADS = 8


def pages(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K, V and means as a server holds them, [blocks, kv heads, ...]; never touched, but too large
    for offsets of 32 bits, which the AMD backend would make use of.
    """
    heads, size, dim = NUM_KV_HEADS, shape.block_size, shape.head_dim
    groups, item = size // shape.group_size, dtype.itemsize
    kv_bytes = heads * size * 2 * dim * item
    page = (kv_bytes + heads * groups * dim * 2) // 128 * 128 + 256
    blocks = 2**31 // page + 1
    flat = torch.empty(blocks * page, dtype=torch.uint8)
    kv = flat.view(dtype).as_strided(
        (blocks, heads, size, 2 * dim), (page // item, 2 * dim, heads * 2 * dim, 1)
    )
    means = flat.view(shape.dtype).as_strided(
        (blocks, heads, groups, dim), (page // 2, groups * dim, dim, 1), kv_bytes // 2
    )
    return *kv.split(dim, dim=-1), means


def attention_launches(shape: Shape, amd: bool) -> list[Recorder]:
    """The launches of one layer: a decode step, a prefill step, and the update of the means."""
    cache_dtype = shape.cache_dtype or shape.dtype
    if amd and cache_dtype == E4M3:
        cache_dtype = E4M3_AMD
    num_heads = NUM_KV_HEADS * shape.heads
    key, value, means = pages(shape, cache_dtype)
    query = torch.empty(2, num_heads, shape.head_dim, dtype=shape.dtype)
    scale = torch.ones(1) if shape.cache_dtype else None
    common: dict[str, Any] = {
        "sm_scale": 0.1,
        "dense": torch.empty(2, dtype=torch.int8),
        "out": torch.empty_like(query),
        "num_kept": torch.empty(2, num_heads, dtype=torch.int32),
        "window": shape.window,
        "soft_cap": shape.soft_cap,
        "sinks": torch.empty(num_heads) if shape.sinks else None,
        "k_scale": scale,
        "v_scale": scale,
    }
    read = torch.empty(2, NUM_KV_HEADS, dtype=torch.int32)
    cache = (query, key, value, means if shape.compensation else None)
    block_table, theta = torch.empty(2, 32, dtype=torch.int32), torch.empty(2, num_heads)
    seq_lens = torch.empty(2, dtype=torch.int32)
    sizes = {"head_dim": shape.head_dim, "group_size": shape.group_size}
    with recorded(
        (triton_decode, "_split_kernel"),
        (triton_decode, "_merge_kernel"),
        (triton_prefill, "_prefill_kernel"),
        (triton_means, "_update_v_means_kernel"),
    ) as recorders:
        triton_decode.decode_attention(
            *cache,
            block_table,
            seq_lens,
            theta,
            v_rows_read=read,
            scratch=triton_decode.DecodeScratch.allocate(
                8, num_heads, NUM_KV_HEADS, shape.head_dim, "cpu"
            ),
            num_splits=4,
            config=choose_config(**sizes, cache_bytes=cache_dtype.itemsize),
            **common,
        )
        triton_prefill.prefill_attention(
            *cache,
            block_table,
            torch.empty(3, dtype=torch.int32),
            seq_lens,
            theta,
            v_tiles_read=read,
            config=choose_prefill_config(
                **sizes, cache_bytes=cache_dtype.itemsize, warp_size=64 if amd else 32
            ),
            **common,
        )
        if shape.compensation:
            triton_means.update_v_means(value, means, torch.zeros(1, dtype=torch.int64))
    return recorders


def step_launches() -> list[Recorder]:
    """The launches around a step's layers: 32 layers, 8 levels, 32 heads, 40 knots."""
    layers, rows = torch.zeros(32), torch.zeros(4)
    dense = torch.zeros(32, 4, dtype=torch.int8)
    kept = torch.zeros(32, 4, 32, dtype=torch.int32)
    read = torch.zeros(32, 4, 8, dtype=torch.int32)
    with recorded(
        (triton_theta, "_lookup_theta_kernel"), (triton_counts, "_count_kernel")
    ) as recorders:
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
            dense=dense,
        )
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
    return recorders


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
        # Of both kinds: they share one file.
        "registers": number("vgpr_count"),
        "spills": number("private_segment_fixed_size"),
        "shared": compiled.metadata.shared,
    }


def memory(asm: dict[str, Any]) -> dict[str, int]:
    """How the binary reads global memory: loads of 16 bytes, of 2, loads that a predicate can leave
    out, and asynchronous copies of 16 bytes, 8 and fewer.
    """
    if "ptx" not in asm:
        return {"wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm["amdgcn"]))}
    ptx = asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.\S+ \[[^]]*\], \[[^]]*\], (0x\w+)", ptx)
    return {
        "wide_copies": copies.count("0x10"),
        "narrow_copies": copies.count("0x8"),
        "scalar_copies": copies.count("0x4"),
        "wide_loads": ptx.count("ld.global.v4.b32"),
        "element_loads": len(re.findall(r"ld\.global\S*\.b16", ptx)),
        "predicated_loads": len(re.findall(r"@%p\d+ ld\.global", ptx)),
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


@functools.cache
def launched(target_name: str) -> list[tuple[str, Variant]]:
    """Names of shapes and what they launch; no two of them are one binary."""
    target = TARGETS[target_name]
    found: dict[tuple[str, str], tuple[str, Variant]] = {}
    for shape in SHAPES:
        if not is_served(shape, target_name):
            continue
        launches = attention_launches(shape, target.backend == "hip")
        if shape is SHAPES[0]:
            launches += step_launches()
        for variant in variants(launches, target):
            found.setdefault((variant.kernel, variant.key), (shape.name, variant))
    return list(found.values())


def compile_variant(place: tuple[str, int]) -> str:
    """Compile what the target launches at this index, and describe it."""
    target_name, index = place
    target = TARGETS[target_name]
    shape, variant = launched(target_name)[index]
    compiled = triton.compile(variant.source, target=target, options=variant.options)
    record = {
        "target": target_name,
        "shape": shape,
        "kernel": variant.kernel,
        "shared_limit": SHARED_LIMITS[target_name],
        "threads": variant.options["num_warps"] * target.warp_size,
        "stages": variant.options["num_stages"],
    }
    return json.dumps(record | memory(compiled.asm) | resources(compiled))


def main() -> None:
    wanted = sys.argv[1:] or list(TARGETS)
    places = [(name, index) for name in wanted for index in range(len(launched(name)))]
    # The slowest first, so that no core waits for another at the end.
    places.sort(key=lambda place: launched(place[0])[place[1]][1].kernel != "_prefill_kernel")
    # Not forked: the compiler has threads.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(os.cpu_count() or 1, 8)) as pool:
        for record in pool.imap_unordered(compile_variant, places):
            print(record, flush=True)


if __name__ == "__main__":
    main()
