"""The executable specification of Top-theta attention in plain PyTorch.

A key is kept where its attention probability reaches a threshold, so selection follows the softmax.
One list per kv head: a key is kept where any query head of the group wants it, and all of them
accumulate it. Every function works in the dtype of its inputs: float64 for tests, float32 for
calibration and evaluation.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_toptheta.kernels.layout import LONG_GROUP, MAX_LIFTS


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
        key: [num_keys, num_kv_heads, head_dim]; query head h reads kv head h // heads_per_kv_head.
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


def whole_groups(visible: Tensor, group_size: int) -> Tensor:
    """Aligned groups of tokens that a row sees completely: those whose mean V is stored.

    Args:
        visible: [num_rows, num_keys] bool; key 0 is the first of a group.
        group_size: tokens per short compensation group.

    Returns:
        [num_rows, ceil(num_keys / group_size)] bool.
    """
    whole: Tensor = _grouped(visible, group_size).all(-1)
    return whole


def _grouped(x: Tensor, size: int) -> Tensor:
    """The last dimension cut into runs of `size`, zeros behind the end."""
    padded: Tensor = torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    return padded


class Selection(NamedTuple):
    """What rows keep.

    Attributes:
        kept: [num_kv_heads, num_rows, num_keys] bool.
        probs: [num_heads, num_rows, num_keys], softmax over all visible keys, a sink included in
            its denominator.
        kept_mass: [num_heads, num_rows], the kept keys' share of the probability of all keys.
        lifts: [num_kv_heads, num_rows] int64, how often `min_mass` halved the threshold.
        visible: [num_rows, num_keys] bool, keys the row may see.
    """

    kept: Tensor
    probs: Tensor
    kept_mass: Tensor
    lifts: Tensor
    visible: Tensor


def softmax(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Probabilities of the visible keys.

    Args:
        scores: [num_heads, num_rows, num_keys], -inf where hidden.
        sinks: [num_heads] extra logit in the denominator, as in gpt-oss; None for none.
    """
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    column = sinks.to(scores.dtype).view(-1, 1, 1).expand(-1, scores.shape[1], 1)
    return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]


def select(
    scores: Tensor,
    log_min_prob: Tensor,
    min_mass: Tensor | float,
    *,
    group_size: int,
    sinks: Tensor | None = None,
) -> Selection:
    """The rule of decode rows.

    A key is kept where max over the group's heads of log p reaches `log_min_prob`. A head's best
    key is always kept, and so are all keys of groups that the row sees in part: they have no stored
    mean, so that their V rows would be read anyway. While the kept share of some head's probability
    is below `min_mass`, the threshold of this row and kv head halves, at most MAX_LIFTS times.

    Args:
        scores: [num_heads, num_rows, num_keys], -inf where hidden; key 0 is the first of a group.
        log_min_prob: [num_kv_heads, num_rows], natural logarithm.
        min_mass: [num_rows] or one number, 0 for no floor.
        group_size: tokens per short compensation group.
        sinks: [num_heads] extra logit in the denominator; None for none.
    """
    num_kv_heads = log_min_prob.shape[0]
    probs = softmax(scores, sinks)
    sink = scores.new_full((scores.shape[0], 1), -math.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None]
    # Not log(probs): what underflows as a probability still has a logarithm.
    log_probs = scores - torch.logaddexp(scores.logsumexp(-1), sink)[..., None]
    wanted = log_probs.unflatten(0, (num_kv_heads, -1)).amax(1)
    always = _always_kept(scores, num_kv_heads, group_size)
    visible = (scores > -math.inf)[0]
    threshold = log_min_prob.to(scores.dtype).clone()
    floor = torch.as_tensor(min_mass, dtype=scores.dtype, device=scores.device)
    lifts = torch.zeros_like(threshold, dtype=torch.int64)
    mass = probs.sum(-1)
    for step in range(MAX_LIFTS + 1):
        kept = (wanted >= threshold[..., None]) & visible | always
        share = _kept_mass(probs, kept) / mass
        low = share.unflatten(0, (num_kv_heads, -1)).amin(1) < floor
        if step == MAX_LIFTS or not low.any():
            break
        lifts += low
        threshold = torch.where(low, threshold - math.log(2), threshold)
    return Selection(kept, probs, share, lifts, visible)


def select_running(
    scores: Tensor,
    log_min_prob: Tensor,
    *,
    group_size: int,
    tile: int,
    sinks: Tensor | None = None,
) -> Selection:
    """The rule of prompt rows, which one pass over K can decide: the denominator is what the row
    has seen so far.

    Tiles of keys come in this order: the first of the sequence, the one that holds the row's own
    key, then the others from the front. A key is tested against the denominator up to and including
    its own tile, which is at most the final one, so that the row keeps a superset of what `select`
    keeps without a floor. The order depends on positions alone.

    Args:
        scores: [num_heads, num_rows, num_keys], -inf where hidden; key 0 is the first of the
            sequence.
        log_min_prob: [num_kv_heads, num_rows], natural logarithm.
        group_size: tokens per short compensation group.
        tile: tokens per tile.
        sinks: [num_heads] extra logit in the denominator; None for none. It counts from the start.
    """
    num_kv_heads, num_keys = log_min_prob.shape[0], scores.shape[-1]
    visible = (scores > -math.inf)[0]
    own = (num_keys - 1 - visible.flip(-1).to(torch.int8).argmax(-1)) // tile
    pad = (0, -num_keys % tile)
    tiles = torch.nn.functional.pad(scores, pad, value=-math.inf).unflatten(-1, (-1, tile))
    per_tile = tiles.logsumexp(-1)
    index = torch.arange(per_tile.shape[-1], device=scores.device)
    # Rank of each tile in its row's order.
    order = torch.where(index == own[:, None], 0.5, index.to(torch.float64))
    order = torch.where(index == 0, 0.0, order).argsort(-1)
    rank = order.argsort(-1).expand(scores.shape[0], -1, -1)
    seen = per_tile.gather(-1, order.expand(scores.shape[0], -1, -1)).logcumsumexp(-1)
    if sinks is not None:
        seen = torch.logaddexp(seen, sinks.to(scores.dtype).view(-1, 1, 1))
    so_far = seen.gather(-1, rank).repeat_interleave(tile, -1)[..., :num_keys]
    log_probs = (scores - so_far).masked_fill(scores == -math.inf, -math.inf)
    wanted = log_probs.unflatten(0, (num_kv_heads, -1)).amax(1)
    kept = (wanted >= log_min_prob.to(scores.dtype)[..., None]) & visible
    kept |= _always_kept(scores, num_kv_heads, group_size, best=False)
    probs = softmax(scores, sinks)
    share = _kept_mass(probs, kept) / probs.sum(-1)
    lifts = torch.zeros_like(log_min_prob, dtype=torch.int64)
    return Selection(kept, probs, share, lifts, visible)


def _always_kept(
    scores: Tensor, num_kv_heads: int, group_size: int, *, best: bool = True
) -> Tensor:
    """Keys that no threshold drops, [num_kv_heads, num_rows, num_keys] bool."""
    visible = (scores > -math.inf)[0]
    whole = whole_groups(visible, group_size).repeat_interleave(group_size, -1)
    always = (visible & ~whole[:, : scores.shape[-1]]).expand(num_kv_heads, -1, -1)
    if not best:
        return always
    of_head = torch.zeros_like(scores, dtype=torch.bool)
    of_head.scatter_(-1, scores.argmax(-1, keepdim=True), True)
    of_kv_head: Tensor = of_head.unflatten(0, (num_kv_heads, -1)).any(1)
    return always | of_kv_head & visible


def _kept_mass(probs: Tensor, kept: Tensor) -> Tensor:
    """[num_heads, num_rows] probability of the kept keys."""
    by_group: Tensor = probs.unflatten(0, (kept.shape[0], -1)) * kept[:, None]
    return by_group.sum(-1).flatten(0, 1)


def compensated_output(
    selection: Selection, value: Tensor, weights: Tensor, *, group_size: int
) -> Tensor:
    """Weighted V rows of the kept keys, and of the means of their neighbourhoods for the mass of
    the others.

    With the weights w of a head, its kept mass m and the mass T of all keys:

        (w0 + w1 T / m) sum_kept p v + w2 sum_g lost_g mean_g + w3 sum_G lost_G mean_G
            + w4 lost mean

    g are the aligned groups of `group_size` tokens that the row sees completely, G those of
    LONG_GROUP tokens, whose mean is the mean of the g in them, and the last mean is over all g.
    Where w0 + w1 is 1, a row that loses nothing gets its dense output.

    Args:
        selection: what rows keep; key 0 is the first of a long group.
        value: [num_keys, num_kv_heads, head_dim].
        weights: [num_heads, NUM_WEIGHTS].
        group_size: tokens per short compensation group.

    Returns:
        [num_rows, num_heads, head_dim].
    """
    kept, probs = selection.kept, selection.probs
    num_kv_heads, _, num_keys = kept.shape
    by_head = kept.repeat_interleave(probs.shape[0] // num_kv_heads, 0)
    direct = probs * by_head
    w = weights.to(probs).T[..., None, None]  # NUM_WEIGHTS x [num_heads, 1, 1]
    # A prompt row may keep nothing.
    share = selection.kept_mass.clamp(min=torch.finfo(probs.dtype).tiny)
    out = weighted_values(direct * (w[0] + w[1] / share[..., None]), value)
    # Groups that a row sees in part lose nothing: they are kept as a whole.
    whole = whole_groups(selection.visible, group_size)
    lost = _grouped(probs - direct, group_size).sum(-1) * whole
    counts = whole.to(probs)
    per_long = LONG_GROUP // group_size
    long_lost = _grouped(lost, per_long).sum(-1)
    long_count = _grouped(counts, per_long).sum(-1).clamp(min=1)
    long_share = (long_lost / long_count).repeat_interleave(per_long, -1)[..., : lost.shape[-1]]
    all_share = lost.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)
    on_means = w[2] * lost + (w[3] * long_share + w[4] * all_share) * counts
    padded = torch.nn.functional.pad(value, (0, 0, 0, 0, 0, -num_keys % group_size))
    means = padded.unflatten(0, (-1, group_size)).mean(1)
    return out + weighted_values(on_means, means)


def select_top_k(scores: Tensor, k: Tensor | int) -> Tensor:
    """Keep the k highest visible scores of each row: exact top-k, per head.

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
    out = weights.reshape(num_kv_heads, -1, num_keys) @ value.transpose(0, 1)
    return out.view(num_heads, num_rows, head_dim).transpose(0, 1)
