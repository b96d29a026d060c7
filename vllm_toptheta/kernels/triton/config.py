"""How the GPU attention kernels are launched for a shape. Nothing is tuned while serving."""

from dataclasses import dataclass

from vllm_toptheta.kernels.layout import V_TILE

MAX_SPLITS = 256


@dataclass(frozen=True)
class LaunchConfig:
    """How the decode kernels are launched for one shape.

    Attributes:
        tile: keys per tile: a power of two, whole compensation groups and no more than LONG_GROUP.
        num_warps: warps of a program that reads K.
        num_stages: depth of the software pipeline of the scan: with fewer than five, which follow
            the block table to K and on, no tile of K is on its way while another is used.
        gather_stages: depth of the software pipelines of the steps after it.
        programs_per_unit: programs wanted per multiprocessor when splits are chosen.
        scans_per_split: parts of a split that are scanned at a time: programs of the scan are
            smaller than those of the gather, so that more of them run at once.
        min_tiles: a split of the scan has at least this many tiles, so that short rows are not cut
            into crumbs.
    """

    tile: int = 64
    num_warps: int = 4
    num_stages: int = 5
    gather_stages: int = 2
    programs_per_unit: int = 2
    scans_per_split: int = 2
    min_tiles: int = 2


def choose_config(*, head_dim: int, warp_size: int = 32) -> LaunchConfig:
    """The configuration of one shape.

    Args:
        head_dim: width of a K row.
        warp_size: threads of a warp, 64 on AMD.
    """
    # On AMD what is fetched ahead lies in registers.
    stages = 2 if warp_size == 32 else 1
    return LaunchConfig(num_warps=8 if head_dim > 128 else 4, gather_stages=stages)


@dataclass(frozen=True)
class PrefillConfig:
    """How the prefill kernel is launched for one shape.

    Attributes:
        rows: query rows per program, tokens times heads of a kv head: a power of two, at least 16.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over K tiles.
    """

    rows: int = 64
    num_warps: int = 8
    num_stages: int = 2


def choose_prefill_config(*, head_dim: int, cache_bytes: int, warp_size: int = 32) -> PrefillConfig:
    """The prefill configuration of one shape.

    Args:
        head_dim: width of a K row.
        cache_bytes: bytes of one cache element, 1 or 2.
        warp_size: threads of a warp, 64 on AMD.
    """
    # What 256 threads hold without spilling; scores and outputs of more rows, or half the threads,
    # do not fit into registers.
    padded = 1 << (head_dim - 1).bit_length()
    rows = (64 * 64 * 128) // (V_TILE * padded)
    # Converting float8 takes registers; a third stage fetches block ids ahead, which frees some.
    is_deep = cache_bytes == 1 and warp_size == 32
    return PrefillConfig(
        rows=min(rows, 64), num_warps=256 // warp_size, num_stages=3 if is_deep else 2
    )


def choose_num_splits(
    num_seqs: int, num_kv_heads: int, num_units: int, programs_per_unit: int
) -> int:
    """Parts to cut every row into: as many as the device runs at once, from 1 to MAX_SPLITS.

    It depends on the batch size alone, never on the lengths of its rows, so that it is fixed when a
    graph is captured.

    Args:
        num_seqs: rows of the batch, padding included.
        num_kv_heads: kv heads.
        num_units: multiprocessors of the device.
        programs_per_unit: see LaunchConfig.
    """
    splits = num_units * programs_per_unit // max(num_seqs * num_kv_heads, 1)
    return min(max(splits, 1), MAX_SPLITS)
