"""A GPU batch cut into requests of one token and others, without a wait for the device."""

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_toptheta.backend.dial import part_of_batch


def single_token_rows(starts: Tensor) -> slice:
    """The longest run of requests with one token.

    They come first, but behind those that verify drafts (and with these, on the V2 runner, prompts
    of just as many tokens). A batch of a captured graph has padding, without tokens, behind them.

    Args:
        starts: [num_reqs + 1] integer on the CPU, first token of each request.
    """
    longer = (starts.diff() > 1).nonzero().flatten().tolist()
    if not longer:
        return slice(0, len(starts) - 1)
    begins = [0, *(row + 1 for row in longer)]
    lens = (starts[[*longer, -1]] - starts[begins]).tolist()
    most = max(lens)
    first = begins[lens.index(most)]
    return slice(first, first + most)


def other_rows(cam: CommonAttentionMetadata, single: slice) -> list[slice]:
    """Batch rows before and behind the single-token requests, where there are tokens."""
    parts = (slice(0, single.start), slice(single.stop, cam.num_reqs))
    return [part for part in parts if tokens_of(cam, part) != slice(0, 0)]


def other_batches(
    cam: CommonAttentionMetadata, single: slice
) -> list[tuple[slice, CommonAttentionMetadata]]:
    """The same as batches of their own, each behind its tokens' place in the batch."""
    batches = []
    for rows in other_rows(cam, single):
        part = part_of_batch(cam, rows.start, rows.stop)
        part = part.replace(
            # vLLM's kernels choose their tiles by it.
            max_query_len=int(part.query_start_loc_cpu.diff().max()),
            # An own copy: Triton is compiled anew for lengths that start anywhere.
            seq_lens=part.seq_lens.clone(),
        )
        batches.append((tokens_of(cam, rows), part))
    return batches


def tokens_of(cam: CommonAttentionMetadata, rows: slice) -> slice:
    """Tokens of some rows of a batch; slice(0, 0) where there are none."""
    begin, end = cam.query_start_loc_cpu[[rows.start, rows.stop]].tolist()
    return slice(begin, end) if begin < end else slice(0, 0)


def requests_and_lens(cam: CommonAttentionMetadata) -> tuple[Tensor, Tensor]:
    """Request, and number of keys, of every query token of a batch, without waiting for the device.

    Returns:
        [num_tokens] int64 and int32.
    """
    num_tokens, device = cam.num_actual_tokens, cam.seq_lens.device
    query_lens = cam.query_start_loc.diff()
    request = torch.arange(cam.num_reqs, device=device)
    request = request.repeat_interleave(query_lens, output_size=num_tokens)
    # Token i of a request with q of n tokens sees n - q + i + 1 keys.
    before = cam.seq_lens[: cam.num_reqs] - query_lens + 1 - cam.query_start_loc[:-1]
    return request, before[request] + torch.arange(num_tokens, dtype=torch.int32, device=device)
