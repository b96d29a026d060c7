"""The prompt rows of a GPU step: vLLM's batch in, thresholds per token on the device out.

Prompts never run inside a captured graph, so their tensors are made for the step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from vllm_toptheta.backend.gpu_tensors import StepTensors
from vllm_toptheta.backend.prompts import PromptRows
from vllm_toptheta.request_options import RequestOptions


def plan_prompts(
    tensors: StepTensors,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    num_tokens: int,
    options: Mapping[int, RequestOptions],
) -> PromptRows:
    """Look up what every prompt token is to do, without waiting for the device.

    Args:
        tensors: thresholds of the builder's layers.
        block_table: [num_prompts, max_blocks] int32 on the device.
        query_start_loc: [num_prompts + 1] int32 on the device, from 0 to num_tokens.
        seq_lens: [num_prompts] int32 on the device.
        num_tokens: tokens of all prompts.
        options: what requests asked for, by prompt, where it is not the default.
    """
    device, num_layers = tensors.device, len(tensors.layers.index)
    wishes = tensors.wishes(torch.ones(len(seq_lens), dtype=torch.bool), options)
    query_lens = query_start_loc.diff()
    prompt = torch.arange(len(seq_lens), device=device)
    prompt = prompt.repeat_interleave(query_lens, output_size=num_tokens)
    # Row i of a prompt with q of n tokens sees n - q + i + 1 keys.
    before = seq_lens - query_lens + 1 - query_start_loc[:-1]
    row_lens = before[prompt] + torch.arange(num_tokens, dtype=torch.int32, device=device)

    def empty(*sizes: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(num_layers, num_tokens, *sizes, dtype=dtype, device=device)

    theta, dense = empty(tensors.shape.num_heads, dtype=torch.float32), empty(dtype=torch.int8)
    by_token = wishes.to(device, non_blocking=True)[:, prompt]
    tensors.look_up(row_lens, by_token, theta, dense)
    return PromptRows(
        block_table=block_table,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        theta=theta,
        dense=dense,
        num_kept=empty(tensors.shape.num_heads),
        v_tiles_read=empty(tensors.shape.num_kv_heads),
    )
