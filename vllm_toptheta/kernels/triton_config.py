"""Launch configurations: shapes and a device in, tile sizes, warps and the number of splits out.

Nothing is tuned while serving. Measured entries live in triton_tuned.json, which
scripts/tune_triton rewrites; shapes without an entry take the heuristic.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TUNED_PATH = Path(__file__).with_name("triton_tuned.json")

MAX_SPLITS = 64


@dataclass(frozen=True)
class LaunchConfig:
    """How the decode kernel is launched for one shape.

    Attributes:
        tile: keys per tile, a power of two and a multiple of the compensation group size.
        num_warps: warps of a stage-one program.
        num_stages: depth of the software pipeline over K tiles.
        programs_per_unit: programs wanted per multiprocessor when splits are chosen.
        min_tiles: a split has at least this many tiles, so that short rows are not cut into crumbs.
    """

    tile: int
    num_warps: int = 4
    num_stages: int = 2
    programs_per_unit: int = 4
    min_tiles: int = 2


def choose_config(
    *,
    head_dim: int,
    group_size: int,
    cache_bytes: int,
    device: str = "",
    shared_limit: int | None = None,
) -> LaunchConfig:
    """The configuration of one shape.

    Args:
        head_dim: width of a K row.
        group_size: tokens per compensation group, a power of two.
        cache_bytes: bytes of one cache element, 1 or 2.
        device: the device's name as torch reports it; "" for the heuristic.
        shared_limit: bytes of shared memory a program may have on the device; None does not check.

    Raises:
        ValueError: a tile of one compensation group does not fit.
    """
    tuned = _tuned().get(device, {}).get(f"{head_dim}/{group_size}/{cache_bytes}")
    if tuned is not None:
        return LaunchConfig(**tuned)
    # A K tile of 16 KiB leaves room for several programs a multiprocessor. A third pipeline stage
    # costs about 50 registers a thread and with them a program a multiprocessor; small tiles of
    # wide heads need it all the same, or the compiler spills.
    tile = max(64 if head_dim <= 128 else 32, group_size)
    padded = 1 << (head_dim - 1).bit_length()
    # Two K tiles, or K and V of a dense row, and the means of two tiles; the compiler never took
    # more.
    shared = (2 * tile + 48) * padded * cache_bytes
    if shared_limit is not None and shared > shared_limit:
        raise ValueError(
            f"groups of {group_size} tokens at head_dim {head_dim} need {shared >> 10} KiB "
            "of shared memory, the "
            f"device has {shared_limit >> 10}; choose a smaller group_size"
        )
    large = tile * head_dim > 8192
    return LaunchConfig(
        tile=tile,
        num_warps=8 if large else 4,
        num_stages=3 if head_dim > 128 and not large else 2,
    )


@dataclass(frozen=True)
class PrefillConfig:
    """How the prefill kernel is launched for one shape.

    Attributes:
        rows: query rows per program, tokens times heads of a kv head: a power of two, at least 16.
        tile: keys per tile, a multiple of V_TILE and of the compensation group size.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over K tiles.
    """

    rows: int = 64
    tile: int = 64
    num_warps: int = 8
    num_stages: int = 2


def choose_prefill_config(
    *, head_dim: int, group_size: int, cache_bytes: int, warp_size: int = 32
) -> PrefillConfig:
    """The prefill configuration of one shape.

    Args:
        head_dim: width of a K row.
        group_size: tokens per compensation group, a power of two.
        cache_bytes: bytes of one cache element, 1 or 2.
        warp_size: threads of a warp, 64 on AMD.
    """
    # What 256 threads hold without spilling; scores and outputs of more rows, or half the threads,
    # do not fit into registers.
    tile = max(64, group_size)
    padded = 1 << (head_dim - 1).bit_length()
    rows = (64 * 64 * 128) // (tile * padded)
    # Converting float8 takes registers; a third stage fetches block ids ahead, which frees some.
    is_deep = cache_bytes == 1 and warp_size == 32
    return PrefillConfig(
        rows=min(rows, 64), tile=tile, num_warps=256 // warp_size, num_stages=3 if is_deep else 2
    )


def choose_num_splits(
    num_seqs: int, num_kv_heads: int, num_units: int, programs_per_unit: int
) -> int:
    """Parts to cut every row into: enough to fill the device, a power of two, at most MAX_SPLITS.

    It depends on the batch size alone, never on the lengths of its rows, so that it is fixed when a
    graph is captured.

    Args:
        num_seqs: rows of the batch, padding included.
        num_kv_heads: kv heads.
        num_units: multiprocessors of the device.
        programs_per_unit: see LaunchConfig.
    """
    wanted = num_units * programs_per_unit / max(num_seqs * num_kv_heads, 1)
    splits = 1
    while splits < wanted and splits < MAX_SPLITS:
        splits *= 2
    return splits


@functools.cache
def _tuned() -> dict[str, dict[str, dict[str, int]]]:
    """{device name: {"head_dim/group_size/cache_bytes": fields of LaunchConfig}}."""
    if not TUNED_PATH.exists():
        return {}
    entries: dict[str, dict[str, dict[str, int]]] = json.loads(TUNED_PATH.read_text())
    return entries
