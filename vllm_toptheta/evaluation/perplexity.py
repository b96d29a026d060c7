"""A model, text and threshold tables in; perplexity and rows read under dense, top-k and Top-theta
attention out.

Teacher-forced: every position of a document is a row, so one pass measures what decoding would have
done at each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vllm_toptheta.calibration.attention import (
    AttentionCall,
    dense_attention,
    pruned_attention,
    replaced_attention,
)
from vllm_toptheta.calibration.calibrate import load_model, read_corpus, repo_name
from vllm_toptheta.kernels import reference
from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.threshold_store import ThresholdStore
from vllm_toptheta.thresholds import LevelThresholds, ThresholdTable

LONG_ROW = 1024
"""Rows longer than this are also counted on their own: short rows keep almost everything and hide
the rest.
"""

HEADINGS = (
    f"{'variant':28} {'k':>6} {'group':>5} {'perplexity':>10} {'vs dense':>9} "
    f"{'kept':>7} {'V rows':>7} {'kept>1024':>9} {'V>1024':>9} {'kept/k':>9}"
)


@dataclass(frozen=True)
class PerplexityResult:
    """One variant's outcome over all documents.

    Attributes:
        variant: "dense", "top_k", or "toptheta" with the table's label.
        k: target keys per row; 0 for dense.
        compensation_group: tokens per compensation group; 0 without compensation.
        perplexity: exp of the mean negative log likelihood per token.
        ratio_to_dense: perplexity divided by the dense one's.
        kept_fraction: kept keys / visible keys, over heads.
        v_row_fraction: V rows that any query head of a group keeps / visible V rows.
        long_kept_fraction: kept_fraction over rows longer than 1024; NaN without such rows.
        long_v_row_fraction: v_row_fraction over rows longer than 1024; NaN without such rows.
        achieved_over_target: mean kept keys of rows longer than twice k / what the budgets promise
            there.
        num_tokens: predicted tokens.
    """

    variant: str
    k: float
    compensation_group: int
    perplexity: float
    ratio_to_dense: float
    kept_fraction: float
    v_row_fraction: float
    long_kept_fraction: float
    long_v_row_fraction: float
    achieved_over_target: float
    num_tokens: int

    def to_row(self) -> str:
        """One line under HEADINGS."""
        return (
            f"{self.variant:28} {self.k:6g} {self.compensation_group:5d} {self.perplexity:10.4f} "
            f"{self.ratio_to_dense - 1:+9.2%} {self.kept_fraction:7.4f} {self.v_row_fraction:7.4f} "
            f"{self.long_kept_fraction:9.4f} {self.long_v_row_fraction:9.4f} "
            f"{self.achieved_over_target:9.3f}"
        )


@dataclass
class _Tally:
    """Sums of what a variant keeps, over layers, rows and heads."""

    kept: float = 0.0
    visible: float = 0.0
    v_rows: float = 0.0
    visible_v_rows: float = 0.0

    def add(self, kept: Tensor, v_rows: Tensor, visible: Tensor, rows: Tensor) -> None:
        """Count some rows: kept [num_heads, n], v_rows [n, num_kv_heads], visible [n], rows [n]
        bool.
        """
        self.kept += float(kept[:, rows].sum())
        self.visible += float(visible[rows].sum()) * kept.shape[0]
        self.v_rows += float(v_rows[rows].sum())
        self.visible_v_rows += float(visible[rows].sum()) * v_rows.shape[1]

    @property
    def kept_fraction(self) -> float:
        return self.kept / self.visible if self.visible else math.nan

    @property
    def v_row_fraction(self) -> float:
        return self.v_rows / self.visible_v_rows if self.visible_v_rows else math.nan


class PrunedAttention:
    """An attention for `replaced_attention` that keeps what `select` says and counts it."""

    def __init__(
        self,
        select: Callable[[AttentionCall, Tensor, Tensor], Tensor],
        budgets: Tensor,
        *,
        group_size: int | None,
        renormalize: bool = False,
        min_kv_len: int = 0,
    ) -> None:
        """Set up empty counts.

        Args:
            select: call, scores [num_heads, n, num_keys] and row positions [n] to the kept mask.
            budgets: [num_layers, num_heads], keys a row should keep.
            group_size: tokens per compensation group; None drops the lost mass.
            renormalize: take the softmax over the kept keys alone, so that no mass is lost.
            min_kv_len: rows of at most so many keys are dense.
        """
        self._select = select
        self._budgets = budgets
        self._group_size = group_size
        self._renormalize = renormalize
        self._min_kv_len = min_kv_len
        self.all_rows = _Tally()
        self.long_rows = _Tally()
        self._achieved = 0.0
        self._target = 0.0

    @property
    def achieved_over_target(self) -> float:
        """Kept keys / budget, over the rows longer than twice the budget."""
        return self._achieved / self._target if self._target else math.nan

    def __call__(self, call: AttentionCall) -> Tensor:
        """Compute one layer."""

        def select(scores: Tensor, rows: Tensor) -> Tensor:
            kept = self._select(call, scores, rows)
            dense_rows = rows + 1 <= self._min_kv_len
            return (
                torch.where(dense_rows[:, None], scores > -math.inf, kept)
                if dense_rows.any()
                else kept
            )

        def observe(kept: Tensor, rows: Tensor) -> None:
            visible = rows + 1 if call.window is None else (rows + 1).clamp(max=call.window)
            num_kept = kept.sum(-1)
            v_rows = reference.count_v_rows(kept, call.key.shape[1])
            self.all_rows.add(num_kept, v_rows, visible, torch.ones_like(rows, dtype=torch.bool))
            self.long_rows.add(num_kept, v_rows, visible, rows + 1 > LONG_ROW)
            budget = self._budgets[call.layer][:, None].to(visible.device)
            counted = visible > 2 * budget
            self._achieved += float((num_kept * counted).sum())
            self._target += float((budget * counted).sum())

        return pruned_attention(
            call,
            select,
            group_size=self._group_size,
            renormalize=self._renormalize,
            observe=observe,
        )


def top_theta_attention(
    level: LevelThresholds, *, group_size: int | None, min_kv_len: int = 0
) -> PrunedAttention:
    """Top-theta by the reference, at one k.

    Args:
        level: thresholds, from `ThresholdTable.at_k`.
        group_size: tokens per compensation group; None drops the lost mass.
        min_kv_len: rows of at most so many keys are dense.
    """
    thetas: dict[tuple[int, int], Tensor] = {}

    def select(call: AttentionCall, scores: Tensor, rows: Tensor) -> Tensor:
        chunk = (int(rows[0]), int(rows[-1]))
        if chunk not in thetas:
            thetas[chunk] = level.lookup(rows + 1)
        return reference.select_by_theta(
            scores, thetas[chunk][call.layer].transpose(0, 1).to(scores.device)
        )

    return PrunedAttention(select, level.head_k, group_size=group_size, min_kv_len=min_kv_len)


def top_k_attention(k: int, num_layers: int, num_heads: int) -> PrunedAttention:
    """Exact top-k of every row, the same k for all heads: the softmax over the k best keys,
    uncompensated.
    """
    return PrunedAttention(
        lambda _, scores, __: reference.select_top_k(scores, k),
        torch.full((num_layers, num_heads), float(k)),
        group_size=None,
        renormalize=True,
    )


def negative_log_likelihood(
    model: PreTrainedModel, document: Tensor, attention: Callable[[AttentionCall], Tensor]
) -> float:
    """Sum over the document's tokens but the first, in nats.

    Args:
        model: a causal language model in eval mode.
        document: [length] int64 token ids.
        attention: computes every layer.
    """
    ids = document[None].to(model.device)
    with replaced_attention(model, attention), torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


def evaluate_perplexity(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    ks: Sequence[float],
    tables: Sequence[tuple[str, ThresholdTable]],
    *,
    group_sizes: Sequence[int | None] = (16,),
    min_kv_len: int = 0,
    with_top_k: bool = True,
    report: Callable[[PerplexityResult], object] | None = None,
) -> list[PerplexityResult]:
    """Compare dense, exact top-k and Top-theta attention on the same tokens.

    Args:
        model: a causal language model in eval mode.
        documents: token ids, [length] int64 each.
        ks: target keys per row.
        tables: label and table of each Top-theta variant.
        group_sizes: compensation groups to try with each table; None for no compensation.
        min_kv_len: rows of at most so many keys are dense under Top-theta.
        with_top_k: also run uncompensated exact top-k.
        report: told every result as soon as it is known.

    Returns:
        Dense first, then for each k exact top-k and every table.

    Raises:
        ValueError: a k lies outside a table's levels.
    """
    num_tokens = sum(document.numel() - 1 for document in documents)
    results: list[PerplexityResult] = []

    def measure(
        variant: str, k: float, group_size: int | None, attention: PrunedAttention | None
    ) -> None:
        total = sum(
            negative_log_likelihood(model, document, attention or dense_attention)
            for document in documents
        )
        perplexity = math.exp(total / num_tokens)
        empty = _Tally(1, 1, 1, 1)
        all_rows, long_rows = (
            (attention.all_rows, attention.long_rows) if attention else (empty, empty)
        )
        result = PerplexityResult(
            variant=variant,
            k=k,
            compensation_group=group_size or 0,
            perplexity=perplexity,
            ratio_to_dense=perplexity / (results[0].perplexity if results else perplexity),
            kept_fraction=all_rows.kept_fraction,
            v_row_fraction=all_rows.v_row_fraction,
            long_kept_fraction=long_rows.kept_fraction,
            long_v_row_fraction=long_rows.v_row_fraction,
            achieved_over_target=attention.achieved_over_target if attention else math.nan,
            num_tokens=num_tokens,
        )
        results.append(result)
        if report is not None:
            report(result)

    # Before hours of work: every table must know every k.
    levels = {(label, k): table.at_k(k) for label, table in tables for k in ks}
    measure("dense", 0, None, None)
    config = model.config.get_text_config()
    for k in ks:
        if with_top_k:
            attention = top_k_attention(
                round(k), config.num_hidden_layers, config.num_attention_heads
            )
            measure("top_k", k, None, attention)
        for label, _ in tables:
            for group_size in group_sizes:
                level = levels[label, k]
                measure(
                    label,
                    k,
                    group_size,
                    top_theta_attention(level, group_size=group_size, min_kv_len=min_kv_len),
                )
    return results


def compare_tables(
    model_name: str,
    texts: list[Path],
    ks: Sequence[float],
    table_specs: Sequence[str],
    *,
    length: int = 2048,
    num_documents: int = 4,
    group_sizes: Sequence[int | None] = (16,),
    min_kv_len: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    report: Callable[[PerplexityResult], object] | None = None,
) -> list[PerplexityResult]:
    """Load a model, its tables and the text, and evaluate.

    Args:
        model_name: repository or folder.
        texts: text files.
        ks: target keys per row.
        table_specs: tables to compare, as `ThresholdStore.find` takes them.
        length: tokens per document.
        num_documents: documents.
        group_sizes: compensation groups to try with each table; None for no compensation.
        min_kv_len: rows of at most so many keys are dense under Top-theta.
        dtype: torch dtype's name, or "auto" for the checkpoint's.
        device: torch device.
        report: told every result as soon as it is known.

    Raises:
        OSError: the model, a table or a text cannot be read.
        ValueError: a table belongs to another model, or the text is too short.
    """
    corpus = read_corpus(texts)
    model, tokenizer = load_model(model_name, dtype=dtype, device=device)
    identity = ModelIdentity.from_config(model.config, repo_name(model_name))
    found = [ThresholdStore().find(spec, identity) for spec in table_specs]
    documents = list(corpus.documents(tokenizer, length=length, num_tokens=num_documents * length))
    return evaluate_perplexity(
        model,
        documents,
        ks,
        [(f"toptheta:{path.stem}", table) for table, path in found],
        group_sizes=group_sizes,
        min_kv_len=min_kv_len,
        report=report,
    )
