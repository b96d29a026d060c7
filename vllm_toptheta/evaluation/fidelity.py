"""What pruning does to a model's predictions: KL divergence from dense and agreement of the most
likely token, under the decode protocol.

A document's prompt is read once, dense, into a cache; its last rows then run under every rule on
top of that same cache, so that each is a decode row over dense KV and rules differ in nothing else.
Perplexity is reported beside: of an instruct model it may fall while attention gets worse.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoConfig, DynamicCache, PreTrainedModel

from vllm_toptheta.calibration.attention import AttentionCall, dense_attention
from vllm_toptheta.calibration.calibrate import read_corpus, repo_name
from vllm_toptheta.evaluation.model import load_model, replaced_attention
from vllm_toptheta.evaluation.rules import Dense, Paper, Rule, SketchedTopTheta, TopTheta, rival
from vllm_toptheta.kernels.layout import UNCALIBRATED_MIN_MASS
from vllm_toptheta.model_identity import ModelIdentity
from vllm_toptheta.threshold_store import ThresholdStore
from vllm_toptheta.thresholds import ThresholdTable

_CHUNK = 1024
_OBSERVED = 256

HEADINGS = (
    f"{'variant':26} {'min_prob':>8} {'k':>5} {'floor':>5} {'KL':>8} {'top-1':>6} {'ppl':>7} "
    f"{'mass':>6} {'kept':>7} {'V rows':>7} {'pruned':>6} {'lifted':>6}"
)


@dataclass(frozen=True)
class FidelityResult:
    """One rule over all documents.

    Attributes:
        variant: the rule.
        min_prob, k, min_mass: its settings; None where it has none.
        kl: mean KL(dense || rule) of the next token's distribution, nats.
        top1: share of rows whose most likely token is dense attention's.
        perplexity_ratio: perplexity divided by dense attention's.
        kept_mass: mean share of a row's attention that its kept keys hold.
        kept_fraction: keys kept / keys seen.
        v_row_fraction: V rows read by any head of a group / V rows seen; of rules that store
            narrower rows, their bytes.
        pruned_row_share: share of (row, head) that kept fewer keys than they saw.
        lifted_row_share: share of (row, head) whose threshold the floor lowered.
        num_rows: predicted tokens.
        log_z_error: mean error of the logarithm of the softmax denominator where rows scan the
            sketch of K; None where they scan K.
    """

    variant: str
    min_prob: float | None
    k: float | None
    min_mass: float | None
    kl: float
    top1: float
    perplexity_ratio: float
    kept_mass: float
    kept_fraction: float
    v_row_fraction: float
    pruned_row_share: float
    lifted_row_share: float
    num_rows: int
    log_z_error: float | None = None

    def to_row(self) -> str:
        """One line under HEADINGS."""

        def setting(value: float | None) -> str:
            return "-" if value is None else f"{value:g}"

        return (
            f"{self.variant:26} {setting(self.min_prob):>8} {setting(self.k):>5} "
            f"{setting(self.min_mass):>5} {self.kl:8.5f} {self.top1:6.4f} "
            f"{self.perplexity_ratio - 1:+7.2%} {self.kept_mass:6.4f} {self.kept_fraction:7.4f} "
            f"{self.v_row_fraction:7.4f} {self.pruned_row_share:6.3f} {self.lifted_row_share:6.3f}"
            + ("" if self.log_z_error is None else f"  log Z off by {self.log_z_error:.1e}")
        )


@dataclass
class _Sums:
    kl: float = 0.0
    agreed: int = 0
    nll: float = 0.0


def read_prompt(model: PreTrainedModel, ids: Tensor, rules: Sequence[Rule]) -> DynamicCache:
    """Read a prompt with dense attention.

    Args:
        model: a causal language model in eval mode.
        ids: [n] int64.
        rules: those that calibrate themselves on earlier rows see the prompt's last ones.
    """
    observers = [rule for rule in rules if isinstance(rule, Paper)]

    def watched(call: AttentionCall) -> Tensor:
        for rule in observers:
            rule.observe(call)
        return dense_attention(call)

    cache = DynamicCache()
    tail = max(len(ids) - _OBSERVED, 0)
    with torch.inference_mode():
        for part, attention in ((ids[:tail], dense_attention), (ids[tail:], watched)):
            with replaced_attention(model, attention):
                for chunk in part.split(_CHUNK) if len(part) else ():
                    model.base_model(chunk[None], past_key_values=cache, use_cache=True)
    return cache


def predictions(model: PreTrainedModel, ids: Tensor, cache: DynamicCache, rule: Rule) -> Tensor:
    """Log-probabilities [len(ids) - 1, vocabulary] of the tokens after the first under a rule, on
    top of a cache that is left as it was."""
    with replaced_attention(model, rule), torch.inference_mode():
        logits = model(ids[None], past_key_values=cache, use_cache=True).logits[0, :-1]
    cache.crop(-len(ids))
    log_probs: Tensor = logits.float().log_softmax(-1)
    return log_probs


def evaluate_fidelity(
    model: PreTrainedModel,
    documents: Sequence[Tensor],
    num_rows: int,
    rules: Sequence[Rule],
    report: Callable[[FidelityResult], object] | None = None,
) -> list[FidelityResult]:
    """Compare rules with dense attention on the same rows.

    Args:
        model: a causal language model in eval mode.
        documents: token ids, [length] int64 each.
        num_rows: last tokens of a document that run under the rules.
        rules: what to compare; their tallies are filled.
        report: told every result of the last document as soon as it is known.

    Returns:
        One result for each rule.
    """
    sums = [_Sums() for _ in rules]
    dense_nll, predicted = 0.0, 0
    results: list[FidelityResult] = []
    for number, document in enumerate(documents):
        cache = read_prompt(model, document[:-num_rows], rules)
        rows, targets = document[-num_rows:], document[-num_rows + 1 :]
        dense = predictions(model, rows, cache, Dense())
        dense_nll += float(cross_entropy(dense, targets, reduction="sum"))
        predicted += len(targets)
        for rule, total in zip(rules, sums, strict=True):
            ours = predictions(model, rows, cache, rule)
            total.kl += float(kl_div(ours, dense, log_target=True, reduction="sum"))
            total.agreed += int((ours.argmax(-1) == dense.argmax(-1)).sum())
            total.nll += float(cross_entropy(ours, targets, reduction="sum"))
            if number == len(documents) - 1:
                results.append(_result(rule, total, dense_nll, predicted))
                if report is not None:
                    report(results[-1])
    return results


def _result(rule: Rule, total: _Sums, dense_nll: float, predicted: int) -> FidelityResult:
    tally = rule.tally
    ours = rule if isinstance(rule, TopTheta) else None
    return FidelityResult(
        variant=rule.name,
        min_prob=ours.min_prob if ours else None,
        k=ours.k if ours else None,
        min_mass=ours.min_mass if ours else None,
        kl=total.kl / predicted,
        top1=total.agreed / predicted,
        perplexity_ratio=math.exp((total.nll - dense_nll) / predicted),
        kept_mass=tally.mass / tally.rows,
        kept_fraction=tally.kept / tally.keys,
        v_row_fraction=rule.v_row_bytes * tally.v_read / tally.v_seen,
        pruned_row_share=tally.pruned / tally.rows,
        lifted_row_share=tally.lifted / tally.rows,
        num_rows=predicted,
        log_z_error=rule.log_z_error / tally.rows if isinstance(rule, SketchedTopTheta) else None,
    )


def find_table(model_name: str, spec: str) -> ThresholdTable | None:
    """The table of a model, from its configuration alone: before weights are loaded.

    Args:
        model_name: repository or folder.
        spec: as the server's option `thresholds`.

    Raises:
        OSError: the model, or a table that was named, cannot be read.
        ValueError: the table belongs to another model.
    """
    if spec == "none":
        return None
    identity = ModelIdentity.from_config(
        AutoConfig.from_pretrained(model_name), repo_name(model_name)
    )
    try:
        return ThresholdStore().find(spec, identity).table
    except FileNotFoundError:
        if spec != "auto":
            raise
        return None


def compare_rules(
    model_name: str,
    texts: list[Path],
    *,
    length: int,
    rows: int,
    num_documents: int,
    min_probs: Sequence[float],
    ks: Sequence[float],
    min_mass: float | None,
    table: str,
    without_table: bool,
    k_sketch: bool,
    rivals: Sequence[str],
    min_kv_len: int,
    dtype: str,
    device: str,
    report: Callable[[FidelityResult], object],
) -> list[FidelityResult]:
    """Load a model, its table and text, and evaluate.

    Args:
        model_name: repository or folder.
        texts: text files.
        length: tokens per document.
        rows: last tokens of a document that run under the rules.
        num_documents: documents.
        min_probs, ks: settings of Top-theta to try.
        min_mass: floor; None for the server's default.
        table: as the server's option `thresholds`.
        without_table: try every min_prob without a table as well.
        k_sketch: try every min_prob over the sketch of K as well.
        rivals: as `rules.rival` takes them.
        min_kv_len: rows of at most so many keys are dense.
        dtype: torch dtype's name, or "auto" for the checkpoint's.
        device: torch device.
        report: told every result as soon as it is known.

    Raises:
        OSError: the model, its table or a text cannot be read.
        ValueError: a number makes no sense, or a k needs a table.
    """
    if not 2 <= rows < length:
        raise ValueError(f"--rows is {rows}, expected 2 to {length - 1}: rows of --length {length}")
    found = find_table(model_name, table)
    if ks and found is None:
        raise ValueError(
            f"--k needs a table of {model_name}: toptheta calibrate {model_name}, or use --min-prob"
        )

    def top_theta(
        p: float | None,
        k: float | None,
        table: ThresholdTable | None,
        kind: type[TopTheta] = TopTheta,
    ) -> TopTheta:
        floor = min_mass
        if floor is None:
            floor = 0.0 if table else UNCALIBRATED_MIN_MASS
        return kind(p, k, floor, table, min_kv_len)

    rules: list[Rule] = [top_theta(p, None, found) for p in min_probs]
    if k_sketch:
        rules += [top_theta(p, None, found, SketchedTopTheta) for p in min_probs]
    rules += [top_theta(None, k, found) for k in ks]
    if without_table and found is not None:
        rules += [top_theta(p, None, None) for p in min_probs]
    rules += [rival(spec) for spec in rivals]
    corpus = read_corpus(texts)
    model, tokenizer = load_model(model_name, dtype=dtype, device=device)
    documents = list(corpus.documents(tokenizer, length=length, num_tokens=num_documents * length))
    return evaluate_fidelity(model, documents, rows, rules, report)
