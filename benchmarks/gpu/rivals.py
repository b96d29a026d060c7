"""Dense attention kernels that the GPU scripts compare ours with: torch's, and vLLM's Triton
kernel, installed or carried by carry_vllm_triton.py.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.lib import Batch

CARRIED = Path(__file__).resolve().parents[2] / "build" / "vllm_triton"
MODULE = "vllm.v1.attention.ops.triton_unified_attention"

# What vLLM's backend passes: a split in 16 for batches too small for a grid of 128 programs.
SEGMENTS, SMALL_GRID = 16, 128


@dataclass(frozen=True)
class Rival:
    """One dense kernel on one batch.

    Attributes:
        run: the launch, as it is timed.
        rows: what it returns, as [num_rows, num_heads, head_dim].
    """

    run: Callable[[], Tensor]
    rows: Callable[[Tensor], Tensor] = lambda out: out


@dataclass(frozen=True)
class VllmTriton:
    """vLLM's module of the kernel, and where it comes from."""

    module: ModuleType
    origin: str

    @classmethod
    def find(cls, folder: Path | None, *, installed: bool) -> "VllmTriton | None":
        """The carried kernel where there is one, else that of an installed vLLM, else None.

        Args:
            folder: where carry_vllm_triton.py wrote it; None for its default.
            installed: whether an installed vLLM may be used.

        Raises:
            ValueError: there is no kernel in the folder that was asked for.
        """
        if folder is not None and not (folder / "vllm").is_dir():
            raise ValueError(
                f"{folder} holds no vLLM kernel; write it where vLLM is installed: "
                f"python -m benchmarks.gpu.carry_vllm_triton {folder}"
            )
        folder = folder or CARRIED
        if (folder / "vllm").is_dir():
            sys.path.insert(0, str(folder.resolve()))
        elif not installed or importlib.util.find_spec("vllm") is None:
            return None
        module = importlib.import_module(MODULE)
        version, path = sys.modules["vllm"].__version__, Path(str(module.__file__))
        return cls(module, f"vLLM {version}, {path.parents[4]}")

    def rivals(self, batch: Batch) -> Iterator[tuple[str, Rival]]:
        shape, num_seqs = batch.shape, len(batch.shape.lens)
        longest = max(shape.lens) if shape.is_prompt else 1
        threshold = SMALL_GRID // shape.num_kv_heads
        rows = (min(num_seqs, threshold), shape.num_heads, SEGMENTS)
        dim = triton.next_power_of_2(shape.head_dim)
        partial = torch.empty(*rows, dim, device=batch.row_lens.device)
        maxima, sums = (torch.empty(rows, device=batch.row_lens.device) for _ in range(2))
        out = torch.empty_like(batch.layer.query)
        modes, is_quantised = self.module.KVQuantMode, shape.cache_dtype is not None

        def run() -> Tensor:
            self.module.unified_attention(
                q=batch.layer.query,
                k=batch.layer.key.transpose(1, 2),
                v=batch.layer.value.transpose(1, 2),
                out=out,
                cu_seqlens_q=batch.layer.query_start_loc,
                max_seqlen_q=longest,
                seqused_k=batch.layer.seq_lens,
                max_seqlen_k=max(shape.lens),
                softmax_scale=shape.head_dim**-0.5,
                causal=True,
                window_size=(-1, -1),
                block_table=batch.layer.block_table,
                softcap=0,
                q_descale=None,
                k_descale=batch.layer.options["k_scale"],
                v_descale=batch.layer.options["v_scale"],
                seq_threshold_3D=threshold,
                num_par_softmax_segments=SEGMENTS,
                softmax_segm_output=partial,
                softmax_segm_max=maxima,
                softmax_segm_expsum=sums,
                kv_quant_mode=modes.FP8_PER_TENSOR if is_quantised else modes.NONE,
            )
            return out

        yield "vllm triton", Rival(run)


def flash_attention() -> tuple[Callable[..., Tensor], int] | None:
    """FlashAttention of an installed vLLM, and its version, 3 or 4, where this GPU has one."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
        from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported
    except (ImportError, OSError):
        return None
    versions = [version for version in (3, 4) if is_fa_version_supported(version)]
    return (flash_attn_varlen_func, versions[0]) if versions else None


def sdpa_rivals(batch: Batch) -> Iterator[tuple[str, Rival]]:
    """torch's kernels on contiguous K and V: the group's heads as it takes them, and for decode as
    rows of one head. They have neither float8 nor rows of different lengths.
    """
    shape = batch.shape
    if shape.cache_dtype is not None or len(set(shape.lens)) != 1:
        return
    if not batch.layer.machine.fits(shape.cache_bytes):
        print(f"     no room for torch's kernels beside {shape.describe()}")
        return
    key, value = (_contiguous(batch, cache) for cache in (batch.layer.key, batch.layer.value))
    backends = [("math", SDPBackend.MATH)]
    if batch.layer.machine.is_gpu:
        flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
        backends = [("flash", flash), ("cudnn", cudnn)]

    def runner(backend: SDPBackend, query: Tensor, causal: bool) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    scale=shape.head_dim**-0.5,
                    is_causal=causal,
                    enable_gqa=query.shape[1] != key.shape[1],
                )

        return run

    for name, backend in backends:
        if shape.is_prompt:
            query = (
                batch.layer.query.unflatten(0, (len(shape.lens), -1)).transpose(1, 2).contiguous()
            )
            yield (
                f"sdpa {name}",
                Rival(runner(backend, query, True), lambda out: out.transpose(1, 2).flatten(0, 1)),
            )
            continue
        query = batch.layer.query[:, :, None]
        packed = batch.layer.query.unflatten(1, (shape.num_kv_heads, shape.heads))
        yield f"sdpa {name}", Rival(runner(backend, query, False), lambda out: out[:, :, 0])
        yield (
            f"sdpa {name} packed",
            Rival(runner(backend, packed, False), lambda out: out.flatten(1, 2)),
        )


def _contiguous(batch: Batch, cache: Tensor) -> Tensor:
    """[num_seqs, num_kv_heads, length, head_dim], rows of one length."""
    shape = batch.shape
    size = (len(shape.lens), shape.num_kv_heads, shape.lens[0], shape.head_dim)
    rows = torch.empty(size, dtype=cache.dtype, device=cache.device)
    for seq in range(len(shape.lens)):
        rows[seq].copy_(batch.row(cache, seq).transpose(0, 1))
    return rows
