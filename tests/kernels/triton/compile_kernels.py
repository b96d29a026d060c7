"""Compiles the GPU kernels for GPUs that are not here, and prints what the binaries need as JSON.

Runs as a program, because compiling and interpreting exclude each other within one process. What is
compiled is what the launchers launch, specialised by Triton's own rules. Compiling takes seconds a
binary, so each target gets shapes of its own.
"""

import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import decode_launches
import prefill_launches
import step_launches
import torch
import triton
from compile_shapes import Shape
from launches import TARGETS, Variant, variants

SHARED_LIMITS = {
    "cuda:80": 163 << 10,
    "cuda:90": 227 << 10,
    "cuda:100": 227 << 10,
    "hip:gfx942": 64 << 10,
}
"""Bytes of shared memory a program may have."""

BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = {
    "cuda:80": [
        Shape(head_dim=64, heads=8, block_size=16, dtype=FP16, sinks=True, window=128),
        Shape(head_dim=64, heads=8, dtype=FP16, sketch=True),
    ],
    "cuda:90": [
        Shape(),
        Shape(head_dim=80, heads=1, block_size=32),
        Shape(head_dim=256, heads=2, dtype=FP16, soft_cap=50.0),
        Shape(sketch=True),
    ],
    "cuda:100": [
        Shape(heads=8, block_size=128, cache_dtype=torch.float8_e4m3fn),
        Shape(block_size=128, sketch=True),
    ],
    "hip:gfx942": [
        Shape(block_size=16, cache_dtype=torch.float8_e4m3fnuz),
        Shape(sketch=True),
    ],
}
COSTLY = {"_scan_kernel", "_floor_kernel", "_gather_kernel", "_prefill_kernel"}
OF_SKETCH = {"_centres_kernel", "_update_sketch_kernel"}
"""What is compiled for every shape; the other kernels once a target."""


def resources(compiled: Any) -> dict[str, int]:
    """Registers, spilled bytes or registers, shared memory, and on CUDA the instructions of the
    longest loop, read from the binary."""
    if "cubin" in compiled.asm:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            report = subprocess.run(
                [tool, "--dump-resource-usage", "--dump-sass", file.name],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        usage = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", report)}
        return {
            "registers": usage["REG"],
            "spills": usage["STACK"] + usage["LOCAL"],
            "shared": compiled.metadata.shared,
            "loop": longest_loop(report),
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


def longest_loop(sass: str) -> int:
    """Instructions, of 16 bytes each, between the target of a branch backwards and the branch."""
    jumps = re.findall(r"/\*([0-9a-f]{4,})\*/[^;/]*\bBRA\b[^;/]*0x([0-9a-f]+) ?;", sass)
    spans = [(int(at, 16) - int(target, 16)) // 16 + 1 for at, target in jumps]
    # A program ends with a jump to itself.
    return max((span for span in spans if span > 1), default=0)


def memory(asm: dict[str, Any]) -> dict[str, int]:
    """How the binary reads global memory: loads of 16 bytes, of 2, loads that a predicate can leave
    out, asynchronous copies of 16 bytes, 8 and fewer, tiles of K in flight, and how often float8
    becomes bfloat16.
    """
    to_bf16 = len(re.findall(r"tt\.fp_to_fp .*f8\w+, .*-> tensor<\w+xbf16", asm["ttgir"]))
    if "ptx" not in asm:
        wide = len(re.findall(r"(?:global|buffer)_load_dwordx4", asm["amdgcn"]))
        return {"wide_loads": wide, "float8_to_bfloat16": to_bf16}
    ptx = asm["ptx"]
    # A program's first buffer of two dimensions is that of K.
    buffers = re.findall(r"local_alloc.*!ttg.memdesc<(\d+)x\d+x\d+x", asm["ttgir"])
    copies = re.findall(r"cp\.async\.c[ag]\.\S+ \[[^]]*\], \[[^]]*\], (0x\w+)", ptx)
    return {
        "float8_to_bfloat16": to_bf16,
        "wide_copies": copies.count("0x10"),
        "narrow_copies": copies.count("0x8"),
        "scalar_copies": copies.count("0x4"),
        "k_tiles": int(buffers[0]) if buffers else 0,
        "wide_loads": ptx.count("ld.global.v4.b32"),
        "element_loads": len(re.findall(r"ld\.global\S*\.b16", ptx)),
        "predicated_loads": len(re.findall(r"@%p\d+ ld\.global", ptx)),
    }


@functools.cache
def launched(target_name: str) -> list[tuple[str, Variant]]:
    """Names of shapes and what they launch on a target."""
    found = []
    for shape in SHAPES[target_name]:
        launches = decode_launches.launches(shape, TARGETS[target_name])
        if not shape.sketch:  # prompts do not scan it
            launches += prefill_launches.launches(shape)
        if not found:
            launches += step_launches.launches()
        every = {recorder.function.__name__ for recorder in launches}
        names = COSTLY | OF_SKETCH if found else every
        for variant in variants(launches, TARGETS[target_name]):
            if variant.kernel in names:
                found.append((shape.name, variant))
    return found


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
    places.sort(key=lambda place: launched(place[0])[place[1]][1].kernel not in COSTLY)
    # Not forked: the compiler has threads.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(os.cpu_count() or 1, 8)) as pool:
        for record in pool.imap_unordered(compile_variant, places):
            print(record, flush=True)


if __name__ == "__main__":
    main()
