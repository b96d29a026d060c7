"""What the GPU check compares with float64: outputs, counts and kept sets of small batches, bit by
bit where bits are promised.
"""

import dataclasses
import math
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.lib import E4M3, Layer, Machine, error_of_budget, served_pages
from benchmarks.gpu.rivals import flash_attention
from vllm_toptheta.kernels.sketch import GPU_GROUP, Sketch, parts_of
from vllm_toptheta.kernels.triton.means import update_v_means
from vllm_toptheta.kernels.triton.sketch import update_sketch
from vllm_toptheta.testing.cases import Case, Result, Spec, make_case, with_sketches

Record = dict[str, Any]

BF16, FP16 = torch.bfloat16, torch.float16
# Peaked attention: of thousands of keys few stand near a threshold, so that there are gaps for it.
BASE = Spec(
    32, 8, 128, 64, (4096, 333, 1, 0, 2048), dtype=BF16, min_prob=0.002, tile=64, query_scale=8.0
)
TINY = Spec(4, 2, 64, 64, (70, 33, 0), dtype=FP16, min_prob=0.02, tile=64)


def spec(lens: tuple[int, ...], **changes: Any) -> Spec:
    return dataclasses.replace(BASE, lens=lens, **changes)


DECODE = [
    BASE,
    spec((2500, 900), min_prob=0.05, min_mass=0.6, seed=1),
    spec((2500, 900), cache_dtype=E4M3, seed=2),
    spec((3000, 129), num_heads=64, block_size=16, seed=3),
    spec((3000, 129), num_heads=8, head_dim=64, sinks=True, compensation=False, seed=4),
    spec((1000, 70), num_kv_heads=2, head_dim=80, dtype=FP16, block_size=32, seed=5),
    spec((1500, 64), num_heads=4, num_kv_heads=2, head_dim=256, soft_cap=8.0, seed=6),
    spec((2500, 900, 40), window=777, block_size=128, dense_rows=(1,), seed=7),
    spec((1500, 900), min_prob=0.99, window=333, block_size=80, seed=8),
    spec((2500, 900), cache_dtype=E4M3, num_kv_heads=2, head_dim=256, num_heads=8, seed=9),
]
SKETCHED = [
    BASE,
    spec((2500, 900), min_prob=0.05, min_mass=0.6, block_size=128, seed=1),
    spec((1500, 333), num_heads=8, head_dim=64, sinks=True, window=777, seed=2),
]
PROMPTS = [
    spec((1200, 333, 1), query_lens=(70, 40, 1)),
    spec((900, 150), query_lens=(40, 40), cache_dtype=E4M3, seed=1),
    spec((900, 129), num_heads=64, query_lens=(30, 20), sinks=True, block_size=16, seed=2),
    spec((400,), query_lens=(70,), num_heads=8, head_dim=80, dtype=FP16, block_size=32, seed=3),
    spec((500, 64), query_lens=(40, 64), num_heads=4, num_kv_heads=2, head_dim=256, soft_cap=8.0),
    spec((900, 200), query_lens=(40, 40), window=333, dense_rows=tuple(range(0, 40, 3)), seed=4),
]
DETERMINISM = spec((1500, 900, 2047), num_heads=16, num_kv_heads=4)
GRAPH = spec((3000, 900, 64, 2100))
FLASH = [
    PROMPTS[0],
    PROMPTS[-1],
    spec((900, 200), query_lens=(40, 1), num_heads=4, num_kv_heads=1, block_size=16, seed=5),
]
TINY_PROMPT = dataclasses.replace(TINY, lens=(70, 33), query_lens=(12, 5))
TINY_DETERMINISM = dataclasses.replace(TINY, lens=(70, 33))


def layer_of(case: Case, machine: Machine, *, sketched: bool = False) -> Layer:
    """A case on a device, in pages as vLLM lays them out, with a sketch of K or without."""
    spec, device = case.spec, machine.device
    kv_cache, means, sketch = pages_of(case, machine, sketch=sketched)
    kv_cache.copy_(case.gpu_pages())
    key, value = kv_cache.split(spec.head_dim, dim=-1)
    slots = case.slots().to(device)
    update_v_means(value, means, slots)
    if sketch is not None:
        update_sketch(key, sketch, slots)
    scales = [torch.tensor([s], device=device) if spec.cache_dtype else None for s in case.scales]
    return Layer(
        query=case.query.to(device),
        key=key,
        value=value,
        means=means,
        block_table=case.block_table.to(device),
        query_start_loc=case.query_start_loc.to(device),
        seq_lens=case.seq_lens.to(device),
        log_min_prob=case.log_min_prob.to(device),
        min_mass=case.min_mass.to(device),
        dense=case.dense.to(device, torch.int8),
        weights=case.weights.to(device),
        options={
            "sm_scale": spec.sm_scale,
            "window": spec.window,
            "soft_cap": spec.soft_cap,
            "sinks": None if case.sinks is None else case.sinks.to(device),
            "k_scale": scales[0],
            "v_scale": scales[1],
        },
        is_prompt=spec.query_lens is not None,
        machine=machine,
        max_len=max(spec.lens),
        sketch=sketch,
    )


def pages_of(
    case: Case, machine: Machine, *, sketch: bool = False
) -> tuple[Tensor, Tensor, Sketch | None]:
    spec = case.spec
    sizes = (case.num_blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
    stored = spec.cache_dtype or spec.dtype
    return served_pages(sizes, stored, spec.dtype, machine.device, sketch=sketch)


def chunk_of(layer: Layer, spec: Spec, first: int, count: int) -> tuple[Layer, Tensor]:
    """The query tokens `first` to `first + count` of every sequence, and which rows these are."""
    starts, queries = layer.query_start_loc.tolist(), spec.query_lens or ()
    spans = [(min(first, q), min(first + count, q)) for q in queries]
    rows = torch.cat(
        [torch.arange(s + a, s + b) for s, (a, b) in zip(starts, spans, strict=False)]
    ).to(layer.query.device)
    behind = torch.tensor([q - b for q, (_, b) in zip(queries, spans, strict=True)])
    sizes = torch.tensor([0, *(b - a for a, b in spans)])
    chunk = dataclasses.replace(
        layer,
        query_start_loc=sizes.cumsum(0).to(layer.seq_lens),
        seq_lens=layer.seq_lens - behind.to(layer.seq_lens),
        **{name: getattr(layer, name)[rows] for name in ("query", "log_min_prob", "dense")},
    )
    return chunk, rows


def kept_sets(layer: Layer, case: Case, num_splits: int) -> Tensor:
    """[num_seqs, num_heads, longest] bool, read off outputs whose V rows tell the key's position.

    V is one-hot in the position modulo head_dim, for one stretch of head_dim positions at a time.
    """
    spec, pieces = case.spec, []
    for start in range(0, max(spec.lens), spec.head_dim):
        kv_cache, means, _ = pages_of(case, layer.machine)
        kv_cache.zero_()
        value = kv_cache[..., spec.head_dim :]
        for seq, length in enumerate(spec.lens):
            position = torch.arange(start, max(min(start + spec.head_dim, length), start))
            block = case.block_table[seq, position // spec.block_size].long()
            value[block, :, position % spec.block_size, position - start] = 1
        result = layer.result()
        dataclasses.replace(layer, value=value, means=means.zero_()).attend(result, num_splits)
        pieces.append((result.out > 0).cpu())
    return torch.cat(pieces, -1)


def compared(layer: Layer, result: Result, expected: Result) -> tuple[float, bool]:
    """Largest error over its budget, and whether everything that is counted is right."""
    found = {name: tensor.cpu() for name, tensor in vars(result).items()}
    same = (found["kept_mass"] - expected.kept_mass).abs().max() < 1e-4
    for name in ("num_kept", "v_tiles_read" if layer.is_prompt else "lifts"):
        same &= torch.equal(found[name], getattr(expected, name))
    return error_of_budget(found["out"], expected.out), bool(same)


def about(check: str, spec: Spec) -> Record:
    """What a record says of its case: the fields that are not everybody's."""
    changed = [
        f"{field.name}={str(value).removeprefix('torch.')}"
        for field in dataclasses.fields(spec)
        if (value := getattr(spec, field.name)) != getattr(BASE, field.name)
        and field.name not in ("lens", "query_lens", "seed", "dense_rows")
    ]
    queries = f" last {list(spec.query_lens)}" if spec.query_lens else ""
    return {"check": check, "shape": f"{list(spec.lens)}{queries} {' '.join(changed)}".strip()}


def check_decode(spec: Spec, machine: Machine) -> Record:
    """Outputs and counts against float64."""
    case = make_case(spec)
    return decoded("decode", layer_of(case, machine), case)


def check_sketched(spec: Spec, machine: Machine) -> Record:
    """The same where rows scan the sketch of K, of which a group in three has keys that 8 bits are
    not enough for."""
    case = make_case(spec)
    for keys in case.keys:
        for group in range(0, len(keys) // GPU_GROUP, 3):
            keys[group * GPU_GROUP] *= 60
    layer = layer_of(case, machine, sketched=True)
    assert layer.sketch is not None
    sketch = Sketch(*(part.cpu() for part in layer.sketch))
    case = with_sketches(case, parts_of(sketch).flatten(2, 3), sketch.bounds)
    layer.log_min_prob.copy_(case.log_min_prob)
    return decoded("sketched", layer, case)


def decoded(check: str, layer: Layer, case: Case) -> Record:
    worst, counts, expected = 0.0, True, case.expected()
    for num_splits in (1, 7):
        result = layer.result()
        layer.attend(result, num_splits)
        error, same = compared(layer, result, expected)
        worst, counts = max(worst, error), counts and same
    found = about(check, case.spec) | {"error_of_budget": worst, "counts": counts}
    return found | {"ok": worst <= 1 and counts}


def check_prompts(spec: Spec, machine: Machine) -> Record:
    """Outputs and counts against float64, and counts against those of chunks."""
    case = make_case(spec)
    layer = layer_of(case, machine)
    whole, longest, same = layer.result(), max(spec.query_lens or ()), True
    layer.attend(whole)
    error, counts = compared(layer, whole, case.expected())
    for first in range(0, longest, longest // 3):
        chunk, rows = chunk_of(layer, spec, first, longest // 3)
        part = chunk.result()
        chunk.attend(part)
        same &= torch.equal(part.num_kept, whole.num_kept[rows])
        same &= torch.equal(part.v_tiles_read, whole.v_tiles_read[rows])
    found = about("prompts", spec) | {"error_of_budget": error, "counts": counts, "chunks": same}
    return found | {"ok": error <= 1 and counts and same}


def check_flash(spec: Spec, machine: Machine) -> Record:
    """vLLM's FlashAttention over our padded pages, as our backend calls it for prompts, against
    float64."""
    case, found = make_case(spec), flash_attention()
    assert found is not None
    attend, version = found
    case.dense.fill_(True)
    layer = layer_of(case, machine)
    out = torch.full_like(layer.query, math.nan)
    attend(
        q=layer.query,
        k=layer.key.transpose(1, 2),
        v=layer.value.transpose(1, 2),
        out=out,
        cu_seqlens_q=layer.query_start_loc,
        max_seqlen_q=max(spec.query_lens or ()),
        seqused_k=layer.seq_lens,
        max_seqlen_k=max(spec.lens),
        softmax_scale=spec.sm_scale,
        causal=True,
        window_size=[spec.window - 1, 0] if spec.window else [-1, -1],
        block_table=layer.block_table,
        fa_version=version,
    )
    error = error_of_budget(out.cpu(), case.expected().out)
    record = about(f"FlashAttention {version}", spec) | {"error_of_budget": error}
    return record | {"ok": error <= 1}


def check_determinism(spec: Spec, machine: Machine) -> Record:
    """Kept sets for any number of splits and any batch; outputs for equal launches."""
    case = make_case(spec)
    # Where a key's probability is the threshold, the last bit decides.
    for row, (_, visible) in enumerate(spec.rows):
        scores = case.scores(row)[:, 0]
        log_probs = scores - scores.logsumexp(-1, keepdim=True)
        wanted = log_probs.unflatten(0, (spec.num_kv_heads, -1)).amax(1)
        case.log_min_prob[row] = wanted.sort(-1, descending=True).values[:, min(64, visible // 2)]
    layer, same = layer_of(case, machine), {}
    first = kept_sets(layer, case, 1)
    for num_splits in (2, 5, 64):
        same[f"splits {num_splits}"] = torch.equal(kept_sets(layer, case, num_splits), first)
    for seq in range(len(spec.lens)):
        alone = kept_sets(layer.part(seq, 1), case, 5)[0]
        same[f"row {seq} alone"] = torch.equal(alone, first[seq])
    one, other = layer.result(), layer.result()
    layer.attend(one, 5)
    layer.attend(other, 5)
    same["equal launches"] = torch.equal(one.out, other.out)
    found = about("determinism", spec) | same | {"mean_kept": float(first.sum(-1).float().mean())}
    return found | {"ok": all(same.values())}


def check_graph(spec: Spec, machine: Machine) -> Record:
    """A graph captured on short rows and replayed on other lengths, blocks, thresholds, floors and
    dense flags."""
    layer, same = layer_of(make_case(spec), machine), {}
    names = ("seq_lens", "block_table", "log_min_prob", "min_mass", "dense")
    held = {name: getattr(layer, name).clone() for name in names}
    for name in names:
        getattr(layer, name).fill_(1 if name == "seq_lens" else 0)
    result = layer.result()
    layer.attend(result)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.attend(result)
    changes: dict[str, tuple[float, ...]] = {
        "dense": (0, 1, 0, 0),
        "seq_lens": (spec.lens[0] - 1, spec.lens[1] - 10, 0, 5),
        "min_mass": (0.9, 0, 0, 0),
    }
    for what, change in (("same rows", {}), ("a dense row, padding and a floor", changes)):
        for name, tensor in held.items():
            getattr(layer, name).copy_(torch.tensor(change[name]) if name in change else tensor)
        graph.replay()
        replayed = {name: tensor.clone() for name, tensor in vars(result).items()}
        eager = layer.result()
        layer.attend(eager)
        same[what] = all(
            torch.equal(replayed[name], getattr(eager, name))
            for name in ("out", "num_kept", "kept_mass", "lifts")
        )
    return about("graph replay", spec) | same | {"ok": all(same.values())}


def guarded(check: Callable[[Spec, Machine], Record], spec: Spec, machine: Machine) -> Record:
    """What one check finds, or that it raised, so that the others still run."""
    try:
        return check(spec, machine)
    except Exception as problem:
        return about(check.__name__, spec) | failure(problem)


def failure(problem: Exception) -> Record:
    traceback.print_exc()
    first = (str(problem).strip().splitlines() or [""])[0]
    return {"error": f"{type(problem).__name__}: {first}", "ok": False}
