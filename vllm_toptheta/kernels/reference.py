"""The executable specification of Top-theta attention in plain PyTorch: queries, keys, values and
thresholds in, outputs and kept masks out.

Every function works in the dtype of its inputs: float64 for tests, float32 for calibration and
evaluation.
"""

import math

import torch
from torch import Tensor


def attention_scores(
    query: Tensor,
    key: Tensor,
    row_lens: Tensor,
    *,
    sm_scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Scores of query rows against all keys, with the keys a row may not see at -inf.

    Args:
        query: [num_rows, num_heads, head_dim].
        key: [num_keys, num_kv_heads, head_dim]; query head h reads kv head h // group_size.
        row_lens: [num_rows] integer, keys visible to the row counted from position 0
            (causal row at position i: i + 1); at most num_keys.
        sm_scale: factor on q.k.
        window: a row sees only its last `window` keys; None for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); None for none.

    Returns:
        [num_heads, num_rows, num_keys], units of q.k * sm_scale.
    """
    num_rows, num_heads, head_dim = query.shape
    num_keys, num_kv_heads, _ = key.shape
    grouped = query.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
    scores = (grouped @ key.permute(1, 2, 0)).view(num_heads, num_rows, num_keys) * sm_scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    position = torch.arange(num_keys, device=key.device)
    hidden = position >= row_lens[:, None]
    if window is not None:
        hidden = hidden | (position < row_lens[:, None] - window)
    return scores.masked_fill_(hidden, -math.inf)


def select_by_theta(scores: Tensor, theta: Tensor) -> Tensor:
    """Keep the keys whose score reaches theta, and always the row's best visible key.

    Args:
        scores: [num_heads, num_rows, num_keys], -inf where hidden.
        theta: [num_heads, num_rows], units of the scores; -inf keeps every visible key.

    Returns:
        [num_heads, num_rows, num_keys] bool.
    """
    kept = scores >= theta[..., None]
    kept.scatter_(-1, scores.argmax(-1, keepdim=True), True)
    return kept & (scores > -math.inf)


def select_top_k(scores: Tensor, k: Tensor | int) -> Tensor:
    """Keep the k highest visible scores of each row: the exact top-k that thresholds approximate.

    Args:
        scores: [num_heads, num_rows, num_keys], -inf where hidden.
        k: keys to keep, one number or [num_heads].

    Returns:
        [num_heads, num_rows, num_keys] bool.
    """
    num_keys = scores.shape[-1]
    per_head = torch.as_tensor(k, device=scores.device).expand(scores.shape[0]).clamp(max=num_keys)
    top = scores.topk(int(per_head.max()), dim=-1).values
    kth = top.gather(-1, (per_head - 1).view(-1, 1, 1).expand(-1, scores.shape[1], 1))
    return (scores >= kth) & (scores > -math.inf)


def attention_weights(
    scores: Tensor, kept: Tensor, *, group_size: int | None, sinks: Tensor | None = None
) -> Tensor:
    """Weights on V: exact-denominator probabilities of kept keys plus the compensation of the lost
    ones.

    The denominator runs over all visible keys. The lost mass of every aligned group of `group_size`
    tokens is spread evenly over the group's visible keys, which is the same as multiplying it with
    their mean V.

    Args:
        scores: [num_heads, num_rows, num_keys], -inf where hidden.
        kept: [num_heads, num_rows, num_keys] bool.
        group_size: tokens per compensation group; None drops the lost mass.
        sinks: [num_heads] extra logit in the denominator, as in gpt-oss; None for none.

    Returns:
        [num_heads, num_rows, num_keys].
    """
    if sinks is None:
        probs = torch.softmax(scores, dim=-1)
    else:
        column = sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, scores.shape[1], 1)
        probs = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    weights = probs * kept
    if group_size is None:
        return weights
    num_keys = scores.shape[-1]
    padding = (0, -num_keys % group_size)

    def grouped(x: Tensor) -> Tensor:
        padded: Tensor = torch.nn.functional.pad(x, padding).unflatten(-1, (-1, group_size))
        return padded

    lost = grouped(probs - weights).sum(-1, keepdim=True)
    visible = grouped((scores > -math.inf).to(scores.dtype))
    spread = (lost / visible.sum(-1, keepdim=True).clamp(min=1)) * visible
    return weights + spread.flatten(-2)[..., :num_keys]


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """Sum V rows with per-head weights.

    Args:
        weights: [num_heads, num_rows, num_keys].
        value: [num_keys, num_kv_heads, head_dim].

    Returns:
        [num_rows, num_heads, head_dim].
    """
    num_heads, num_rows, num_keys = weights.shape
    num_kv_heads, head_dim = value.shape[1:]
    out = weights.view(num_kv_heads, -1, num_keys) @ value.transpose(0, 1)
    return out.view(num_heads, num_rows, head_dim).transpose(0, 1)


def count_v_rows(kept: Tensor, num_kv_heads: int) -> Tensor:
    """V rows that any query head of the group keeps.

    Args:
        kept: [num_heads, num_rows, num_keys] bool.
        num_kv_heads: kv heads; num_heads must be a multiple.

    Returns:
        [num_rows, num_kv_heads] int64.
    """
    by_group: Tensor = kept.unflatten(0, (num_kv_heads, -1)).any(1)
    return by_group.sum(-1).transpose(0, 1)
