"""Times our kernels and the dense ones on one batch: a shape in, one record per k out."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_lib import Batch, Machine, Shape
from gpu_prompts import PromptBatch
from gpu_rivals import VllmTriton, dense_rivals

OURS, OUR_DENSE = "toptheta", "toptheta dense"
COLD_BYTES = 256 << 20
"""Read before every measurement, to push everything else out of the last cache."""
MAX_COPIES = 16

Times = tuple[float, float, float]


def time_variants(
    variants: dict[str, list[Callable[[], object]]], machine: Machine, repeats: int = 20
) -> dict[str, Times]:
    """Milliseconds per launch (p20, p50, p80) of each variant: graphs, cold cache, interleaved.

    Where there is no GPU every launch runs once and times are NaN.

    Args:
        variants: launches that are captured into one graph, one after the other; each reads data of
            its own.
    """
    if not machine.is_gpu:
        for launches in variants.values():
            for launch in launches:
                launch()
        return dict.fromkeys(variants, (math.nan,) * 3)
    graphs = {}
    for name, launches in variants.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for launch in launches:
                launch()
        torch.cuda.current_stream().wait_stream(stream)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for launch in launches:
                launch()
    # Reading leaves clean lines behind; lines that were written would go to memory while we time.
    cold = torch.zeros(COLD_BYTES // 4, dtype=torch.float32, device=machine.device)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 3):
        for name, graph in graphs.items():
            cold.sum()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat >= 3:
                times[name].append(begin.elapsed_time(end) / len(variants[name]))
    points = torch.tensor([0.2, 0.5, 0.8])
    return {
        name: tuple(torch.tensor(values).quantile(points).tolist())  # type: ignore[misc]
        for name, values in times.items()
    }


def copies_of(shape: Shape, machine: Machine) -> int:
    """Batches of a shape that one graph launches, so that what the clock cannot resolve does not
    matter.
    """
    most = MAX_COPIES if machine.is_gpu else 2
    return max(1, min(most, COLD_BYTES // shape.cache_bytes))


def decode_batches(shape: Shape, machine: Machine) -> list[Batch]:
    """Batches of one shape on one cache, each with keys of its own."""
    copies, count = copies_of(shape, machine), len(shape.lens)
    whole = Batch(dataclasses.replace(shape, lens=shape.lens * copies), machine)
    return [whole.part(copy * count, count) for copy in range(copies)]


def bench_decode(
    shape: Shape, ks: list[int], machine: Machine, vllm: VllmTriton | None
) -> list[dict[str, Any]]:
    """One token per row. Rows of one length that are all too short to be pruned make records of
    "dense speed", rows of several lengths "mixed speed".
    """
    check = "mixed speed" if len(set(shape.lens)) > 1 else "speed"
    if max(shape.lens) <= shape.min_kv_len:
        check, ks = "dense speed", ks[:1]
    return _bench(check, shape, decode_batches(shape, machine), ks, vllm)


def bench_prompt(
    shape: Shape, ks: list[int], machine: Machine, vllm: VllmTriton | None
) -> list[dict[str, Any]]:
    """Whole prompts."""
    return _bench("prompt speed", shape, [PromptBatch(shape, shape.lens, machine)], ks, vllm)


def _bench(
    check: str,
    shape: Shape,
    batches: Sequence[Batch],
    ks: list[int],
    vllm: VllmTriton | None,
) -> list[dict[str, Any]]:
    """Check and time batches of one shape; the first is compared with float64."""
    machine = batches[0].machine
    about = {
        "check": check,
        "shape": shape.rows,
        "batch": len(shape.lens),
        "length": max(shape.lens),
        "gqa": shape.heads,
        "cache": shape.cache_name,
    }
    dense: dict[str, list[Callable[[], object]]] = {}
    left_out, wrong = {}, {}
    every = [dense_rivals(batch, vllm) for batch in batches]
    for name, rival in every[0].items():
        try:
            error = batches[0].dense_error(rival.rows(rival.run()))
            time_variants({name: [rival.run]}, machine, repeats=1)
        except Exception as problem:  # a kernel that this device or this torch does not have
            if name == OUR_DENSE:
                raise
            left_out[name] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[0]}"
            continue
        if error > 1:
            wrong[name] = round(error, 3)
            continue
        dense[name] = [rivals[name].run for rivals in every]
    records = []
    for k in ks:
        for batch in batches:
            batch.prepare(k)
            batch.run()
        error, counts = batches[0].verify()
        fractions = _mean([batch.fractions() for batch in batches])
        candidates = dense | {OURS: [batch.run for batch in batches]}
        if check == "dense speed":
            candidates.pop(OUR_DENSE, None)  # the same launches
        times = time_variants(candidates, machine)
        ok = error <= 1 and counts and not wrong
        record = about | {"k": k} | fractions | {"error_of_budget": error, "counts": counts}
        record |= speed(shape, times, fractions.get("v_row_fraction"))
        record |= {"left_out": left_out, "wrong": wrong, "ok": ok}
        if not ok:  # no speed of a wrong result
            record |= dict.fromkeys(("speed_up", "of_bound"))
        records.append(record)
    return records


def _mean(fractions: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: round(sum(each[name] for each in fractions) / len(fractions), 5)
        for name in fractions[0]
    }


def byte_bound(shape: Shape, v_row_fraction: float) -> float:
    """How much faster than dense decode can be, by bytes read: 2 / (1 + 1/r + 1/B), with 1/r the V
    rows read and 1/B the means of V. Means of a float8 cache have 16 bits, and rows that run dense
    read none.
    """
    pruned = sum(length for length in shape.lens if length > shape.min_kv_len) / sum(shape.lens)
    return 2 / (1 + v_row_fraction + shape.means_ratio * pruned)


def speed(shape: Shape, times: dict[str, Times], v_row_fraction: float | None) -> dict[str, Any]:
    """What times say.

    Args:
        times: milliseconds (p20, p50, p80) of each kernel, ours among them.
        v_row_fraction: V rows read; None for prompts, which bytes do not bound.

    Returns:
        ms: as times; best_dense: the fastest other kernel, None without one; speed_up: its time
        over ours; GB/s and dense GB/s: bytes that must be read over time; of_bound: speed_up over
        what bytes allow.
    """
    ours = times[OURS][1]
    others = {name: points[1] for name, points in times.items() if name != OURS}
    best = min(others, key=others.__getitem__) if others else None
    found: dict[str, Any] = {
        "ms": {name: [round(point, 4) for point in points] for name, points in times.items()},
        "best_dense": best,
        "speed_up": others[best] / ours if best else None,
    }
    if v_row_fraction is None:
        return found
    bound = byte_bound(shape, v_row_fraction)
    found["GB/s"] = shape.cache_bytes / bound / ours / 1e6
    if best:
        found["dense GB/s"] = shape.cache_bytes / others[best] / 1e6
        found["bound"] = bound
        found["of_bound"] = others[best] / ours / bound
    return found
