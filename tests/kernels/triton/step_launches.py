"""What a step launches on a GPU once for all layers, recorded."""

import torch
from launches import Recorder, recorded

from vllm_toptheta.kernels.triton import counts

KERNELS = [(counts, "_count_kernel")]


def launches() -> list[Recorder]:
    """Counts of 4 single tokens and a prompt of 12; 32 layers, 32 heads, 8 kv heads."""
    by_layer, single = torch.zeros(32), torch.zeros(4)
    dense = torch.zeros(32, 16, dtype=torch.int8)
    by_kv_head = torch.zeros(32, 16, 8, dtype=torch.int32)
    with recorded(*KERNELS) as recorders:
        counts.count_step(
            torch.zeros(5, dtype=torch.int32),
            torch.zeros(6, dtype=torch.int32),
            counts.CountedLayers(by_layer.int(), by_layer.int(), by_layer.to(torch.int8)),
            counts.CountedRows(
                single,
                single,
                dense,
                by_kv_head,
                torch.zeros(32, 16, 32),
                by_kv_head,
                by_kv_head,
            ),
            single=slice(0, 4),
            skipped=0,
            prunes_prompts=True,
            out=torch.zeros(5, 32, len(counts.COLUMNS), dtype=torch.int64),
            heads=torch.zeros(32, 8 + 32 + 2, dtype=torch.int64),
        )
    return recorders
