"""Times our kernels and the dense ones on one batch: a shape in, records out."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.lib import E4M3, Batch, Machine
from benchmarks.gpu.rivals import Rival, VllmTriton, sdpa_rivals
from benchmarks.gpu.shape import Shape
from vllm_toptheta.kernels.layout import group_size_of
from vllm_toptheta.kernels.sketch import GPU_GROUP, gpu_bytes

OURS, OUR_DENSE = "toptheta", "toptheta dense"
COLD_BYTES = 256 << 20
"""Read before every measurement, to push everything else out of the last cache."""
MAX_COPIES = 16

# For the interpreter, which cannot multiply bfloat16.
TINY = Shape((70,), 2, 2, 64, 16, torch.float16, min_kv_len=24)
TINY_MIN_PROB = 0.02

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


def timed_batches(shape: Shape, machine: Machine) -> list[Batch]:
    """Batches of a shape that one graph launches, each with keys of its own, so that what the clock
    cannot resolve does not matter; prompts take long enough."""
    if shape.is_prompt:
        return [Batch(shape, machine)]
    most, count = MAX_COPIES if machine.is_gpu else 2, len(shape.lens)
    copies = max(1, min(most, COLD_BYTES // shape.cache_bytes))
    whole = Batch(dataclasses.replace(shape, lens=shape.lens * copies), machine)
    return [whole.part(copy * count, count) for copy in range(copies)]


def kind_of(shape: Shape) -> str:
    """The table that a shape belongs to. Rows of one length that are all too short to be pruned
    make records of "dense speed", rows of several lengths "mixed speed"."""
    if shape.is_prompt:
        return "prompt speed"
    if max(shape.lens) <= shape.min_kv_len:
        return "dense speed"
    return "mixed speed" if len(set(shape.lens)) > 1 else "speed"


def about(check: str, shape: Shape) -> dict[str, Any]:
    names = {"rows x keys": shape.rows, "gqa": shape.heads, "cache": shape.cache_name}
    return {"check": check} | names


def bench(
    shape: Shape, min_probs: list[float], machine: Machine, vllm: VllmTriton | None
) -> list[dict[str, Any]]:
    """Check and time batches of one shape, one record for each `min_prob`; the first batch is
    compared with float64, for every kernel before its time is taken."""
    check, batches = kind_of(shape), timed_batches(shape, machine)
    dense: dict[str, list[Callable[[], object]]] = {}
    left_out, wrong = {}, {}
    every = [dense_rivals(batch, vllm) for batch in batches]
    for name, rival in every[0].items():
        try:
            error = batches[0].dense_error(rival.rows(rival.run()))
            if machine.is_gpu:  # not everything can be captured
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
    for min_prob in min_probs[:1] if check == "dense speed" else min_probs:
        for batch in batches:
            batch.layer.log_min_prob.fill_(math.log(min_prob))
            batch.run()
        error, counts = batches[0].verify()
        fractions = [batch.fractions() for batch in batches]
        mean = {n: sum(each[n] for each in fractions) / len(batches) for n in fractions[0]}
        candidates = dense | {OURS: [batch.run for batch in batches]}
        if check == "dense speed":
            candidates.pop(OUR_DENSE, None)  # the same launches
        times = time_variants(candidates, machine)
        ok = error <= 1 and counts and not wrong
        record = about(check, shape)
        if check != "dense speed":
            record["min_prob"] = min_prob
        # No speed of a wrong result.
        record |= speed(shape, times, mean["kept"]) if ok else {}
        record |= mean | {"error / budget": error, "counts": counts, "ok": ok}
        record |= {"ms": times, "left_out": left_out, "wrong": wrong}
        if machine.is_gpu:
            record["kernels, us"] = kernel_times(batches[0].run)
        records.append(record)
    return records


def dense_rivals(batch: Batch, vllm: VllmTriton | None) -> dict[str, Rival]:
    """Every dense kernel that may be able to compute this batch, ours among them."""
    found = {OUR_DENSE: Rival(batch.run_dense), **dict(sdpa_rivals(batch))}
    return found | (dict(vllm.rivals(batch)) if vllm else {})


def kernel_times(launch: Callable[[], object]) -> dict[str, float]:
    """Microseconds of each of our kernels in one launch; {} where torch cannot tell."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            launch()
            torch.cuda.synchronize()
    except RuntimeError as problem:
        print(f"     no profile: {problem}")
        return {}
    return {
        event.key.strip("_").removesuffix("_kernel"): round(event.device_time_total, 1)
        for event in profile.key_averages()
        if event.key.startswith("_")
    }


def byte_bound(shape: Shape, kept: float) -> float:
    """How much faster than dense decode can be, by bytes read: 2 / (1 + 1/r + 1/B), with 1/r the V
    rows read and 1/B the means of V. Means of a float8 cache have 16 bits, and rows that run dense
    read none. The sketch of K takes the place of the first 1.
    """
    key_bytes, head_dim = shape.stored.itemsize, shape.head_dim
    keys = 1.0
    if shape.has_sketch:
        keys = gpu_bytes(1, GPU_GROUP, head_dim) / (GPU_GROUP * head_dim * key_bytes)
    pruned = sum(length for length in shape.lens if length > shape.min_kv_len) / sum(shape.lens)
    means = shape.dtype.itemsize / shape.stored.itemsize / group_size_of(shape.block_size)
    return 2 / (keys + kept + means * pruned)


def speed(shape: Shape, times: dict[str, Times], kept: float) -> dict[str, Any]:
    """What times say: ours, the fastest other kernel's, and for decode, which bytes bound, the
    bytes that must be read over the time and the speed-up over what bytes allow.

    Args:
        times: milliseconds (p20, p50, p80) of each kernel, ours among them.
        kept: V rows read.
    """
    ours = times[OURS][1]
    others = {name: points[1] for name, points in times.items() if name != OURS}
    best = min(others, key=others.__getitem__) if others else None
    speed_up = others[best] / ours if best else None
    found: dict[str, Any] = {"best dense": best or "–", "dense ms": others[best] if best else None}
    found |= {"Top-θ ms": ours, "speed-up": speed_up}
    if shape.is_prompt:
        return found
    bound = byte_bound(shape, kept)
    found["of bound"] = speed_up / bound if speed_up else None
    found["GB/s"] = shape.cache_bytes / bound / ours / 1e6
    found["dense GB/s"] = shape.cache_bytes / others[best] / 1e6 if best else None
    return found


def bench_launches(shape: Shape, min_prob: float, machine: Machine) -> list[dict[str, Any]]:
    """Other launch parameters than those that serving chooses, which come first."""
    batches = timed_batches(shape, machine)
    for batch in batches:
        batch.layer.log_min_prob.fill_(math.log(min_prob))
    base = batches[0].layer.config
    configs = [base]
    if shape.is_prompt:
        for rows, stages in itertools.product((64, 128), (2, 3)):
            configs.append(dataclasses.replace(base, rows=rows, num_stages=stages))
    else:
        others = {"tile": 128, "num_warps": 8, "num_stages": 3, "gather_stages": 3}
        others |= {"programs_per_unit": 4, "scans_per_split": 1}
        configs += [dataclasses.replace(base, **{name: it}) for name, it in others.items()]
    records = []
    for config in list(dict.fromkeys(configs))[: None if machine.is_gpu else 2]:
        record = about("launch", shape) | {"config": str(config)}
        for batch in batches:
            batch.layer.config = config
        try:
            batches[0].run()
            error, counts = batches[0].verify()
            times = time_variants({OURS: [batch.run for batch in batches]}, machine, 10)
        except Exception as problem:  # out of shared memory or registers, in several classes
            print(f"     {config}: {type(problem).__name__}")
            continue
        record |= {"Top-θ ms": times[OURS][1], "error / budget": error}
        if machine.is_gpu:
            record["kernels, us"] = kernel_times(batches[0].run)
        records.append(record | {"ok": error <= 1 and counts})
    return records


def timed_shapes(
    lengths: list[int], prompts: list[int], machine: Machine, *, quick: bool
) -> list[Shape]:
    """What is timed, by weight: long decode rows, prompts, short dense rows, long rows among short
    ones."""
    if not machine.is_gpu:
        lens = [(70,), (20,), (70, 20)]
        shapes = [dataclasses.replace(TINY, lens=rows) for rows in lens]
        shapes.append(dataclasses.replace(TINY, lens=(66,), is_prompt=True))
    else:
        lengths = lengths[:1] if quick else lengths
        rows = [(n,) * batch for n in lengths for batch in ((8, 1) if quick else (8, 1, 16))]
        shapes = [Shape(lens) for lens in rows]
        shapes += [Shape((length,), is_prompt=True) for length in prompts]
        shapes += [Shape((512,) * 16), Shape((max(lengths),) * 4 + (512,) * 28)]
        if not quick:
            shapes += [dataclasses.replace(shape, heads=8) for shape in shapes[:4]]
    if machine.has_e4m3:
        shapes += [dataclasses.replace(s, cache_dtype=E4M3) for s in shapes if s.heads < 8]
    return shapes
