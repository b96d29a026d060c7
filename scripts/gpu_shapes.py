"""What the GPU check runs: shapes whose results are compared, and shapes that are timed."""

import argparse
import dataclasses
import itertools

import torch
from gpu_lib import ALL_DENSE, E4M3, Machine, Shape

FP16, E5M2 = torch.float16, torch.float8_e5m2
MIN_KV_LEN = 1024  # what serving does by default: rows of at most so many keys run dense

CORRECTNESS = [
    Shape((4096, 333, 1, 0, 2048)),
    Shape((3000, 129), heads=8, num_kv_heads=4),
    Shape((3000, 129), heads=1, head_dim=64, sinks=True),
    Shape((1000, 70), heads=16, num_kv_heads=2, head_dim=80, dtype=FP16),
    Shape((1500,), head_dim=96, block_size=32, group_size=32),
    Shape((1500,), head_dim=112, heads=3),
    Shape((1500, 64), head_dim=256, soft_cap=3.0, num_kv_heads=2),
    Shape((2000, 555), block_size=128, group_size=128),
    Shape((2000,), block_size=64, group_size=16, head_dim=256, dtype=FP16),
    Shape((2500, 900, 40), window=777),
    Shape((2500, 900), window=1024, compensation=False),
    Shape((2500, 900), best_only=True),
    Shape((2500, 900), best_only=True, window=333),
    Shape((2500, 900), min_kv_len=ALL_DENSE, sinks=True),
    Shape((2500, 900, 64), min_kv_len=1024),
    Shape((2500, 900), cache_dtype=E4M3),
    Shape((2500, 900), cache_dtype=E4M3, head_dim=256, num_kv_heads=2),
    Shape((2500, 900), cache_dtype=E5M2, dtype=FP16, head_dim=64),
]
PROMPTS = [
    (Shape((4096, 333, 1)), (1500, 333, 1)),
    (Shape((3000, 129), heads=8, num_kv_heads=4, sinks=True), (3000, 60)),
    (Shape((1000,), heads=1, num_kv_heads=4, head_dim=80, dtype=FP16), (1000,)),
    (Shape((1500,), head_dim=96, heads=7, block_size=32, group_size=32), (500,)),
    (Shape((1500, 64), head_dim=256, soft_cap=3.0, num_kv_heads=2), (700, 64)),
    (Shape((2000, 555), block_size=128, group_size=128), (900, 555)),
    (Shape((2500, 900), window=777, best_only=True), (1000, 900)),
    (Shape((2500, 900), window=1024, compensation=False), (1000, 100)),
    (Shape((2500, 900), min_kv_len=ALL_DENSE, sinks=True), (1000, 900)),
    (Shape((2500, 900), cache_dtype=E4M3), (1000, 900)),
]
DETERMINISM = Shape((1500, 900, 2047), k=20)
GRAPH = Shape((3000, 900, 64, 2100))

# For the interpreter, which cannot multiply bfloat16.
TINY = Shape((70, 33, 0), num_kv_heads=2, heads=2, head_dim=64, k=6, dtype=FP16)
TINY_PROMPT = (dataclasses.replace(TINY, lens=(70, 33)), (40, 33))
TINY_DETERMINISM = dataclasses.replace(TINY, lens=(70, 33), k=20)
TINY_MIN_KV_LEN = 24


def readable(shapes: list[Shape], machine: Machine) -> list[Shape]:
    """Shapes whose cache the machine can read."""
    unreadable = set() if machine.has_e4m3 else {E4M3}
    if torch.version.hip:
        unreadable.add(E5M2)
    return [shape for shape in shapes if shape.cache_dtype not in unreadable]


def timed_decode(options: argparse.Namespace, machine: Machine) -> list[Shape]:
    """Decode batches: first the long large ones, which the goals are about."""
    variants = [
        Shape((1,), heads=heads, cache_dtype=dtype, min_kv_len=MIN_KV_LEN)
        for dtype, heads in itertools.product((None, E4M3), options.gqa)
    ]
    if not machine.is_gpu:
        tiny = dataclasses.replace(TINY, min_kv_len=TINY_MIN_KV_LEN)
        lens = [(70, 70), (20,), (70, 20)]
        return [
            dataclasses.replace(tiny, lens=row_lens, cache_dtype=dtype)
            for row_lens, dtype in itertools.product(lens, (None, E4M3))
        ]
    lens = [(length,) * batch for length in options.length for batch in options.batch]
    lens.sort(key=lambda rows: (not _is_in_goals(rows), -sum(rows)))
    short = [(length,) * batch for length in options.dense_length for batch in options.batch]
    mixed = [
        (long,) * 4 + (min(options.dense_length, default=512),) * 28
        for long in options.mixed_length
    ]
    # Goals first, and one of every other kind before the rest, in case time runs out.
    order = [*filter(_is_in_goals, lens), *short, *mixed]
    order += [rows for rows in lens if rows not in order]
    shapes = [dataclasses.replace(shape, lens=rows) for rows in order for shape in variants]
    return readable(shapes, machine)


def _is_in_goals(lens: tuple[int, ...]) -> bool:
    return lens[0] >= 32768 and len(lens) >= 8


def timed_prompts(options: argparse.Namespace, machine: Machine) -> list[Shape]:
    """Whole prompts."""
    base, lens = Shape((1,), min_kv_len=MIN_KV_LEN), [(length,) for length in options.prompt]
    if not machine.is_gpu:
        base, lens = dataclasses.replace(TINY, min_kv_len=TINY_MIN_KV_LEN), [(40,)]
    return readable(
        [
            dataclasses.replace(base, lens=rows, cache_dtype=dtype)
            for rows, dtype in itertools.product(lens, (None, E4M3))
        ],
        machine,
    )


def bytes_needed(shape: Shape) -> float:
    """Memory a timed batch takes without the contiguous copies for torch's kernels: the cache, the
    means, and float64 copies of one row for the reference.
    """
    row = max(shape.lens) * shape.num_kv_heads * shape.head_dim * 8
    return shape.cache_bytes * (1 + shape.means_ratio / 2) + 6 * row + (1 << 30)
