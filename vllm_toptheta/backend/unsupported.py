"""What an engine cannot do together with this backend, and what to type instead.

vLLM would start with most of these, and answers or counts would be wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import vllm.envs as envs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform

from vllm_toptheta.backend.sidecar import sketches_keys
from vllm_toptheta.config import TopThetaConfig
from vllm_toptheta.hooks.attention_backend import NAME
from vllm_toptheta.kernels.sketch import GPU_GROUP

_NGRAM = """--speculative-config '{"method": "ngram", "num_speculative_tokens": 3}'"""


@dataclass(frozen=True)
class _Refusal:
    """A combination that does not work.

    Attributes:
        applies: whether a vLLM configuration asks for it.
        what: its name.
        why: what would go wrong.
        instead: what to type.
        on_cpu: whether it does not work on a CPU either.
    """

    applies: Callable[[Any], bool]
    what: str
    why: str
    instead: str
    on_cpu: bool = True


def _per_kind(config: Any) -> bool:
    kinds = config.attention_config.backend_per_kind or {}
    return any(getattr(backend, "name", None) == NAME for backend in kinds.values())


def _drafts_unmarked(config: Any) -> bool:
    """Whether layers of a draft look like those of the served model (before vLLM 0.31)."""
    spec = config.speculative_config
    marked = hasattr(AttentionLayerBase, "is_draft_layer")
    return not marked and spec is not None and spec.uses_draft_kv_cache()


def _drafts_always_as_target(config: Any) -> bool:
    """Whether a draft's attention runs on this backend whatever its own options say."""
    spec = config.speculative_config
    if spec is None or not spec.uses_draft_kv_cache():
        return False
    always = config.use_v2_model_runner and (spec.uses_draft_model() or spec.use_gemma4_mtp())
    return bool(always or _per_kind(config))


def _drafts_as_target(config: Any) -> bool:
    """Whether a draft's attention runs on this backend unless its own options say otherwise."""
    spec = config.speculative_config
    if spec is None:
        return False
    if (chosen := spec.attention_backend) is not None:
        return bool(getattr(chosen, "name", None) == NAME)
    # The V1 runner, and the other methods, choose a backend for the draft.
    return config.use_v2_model_runner and spec.method in ("eagle", "eagle3", "mtp")


def _context_parallel(config: Any) -> bool:
    parallel = config.parallel_config
    return bool(
        parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
    )


def _moves_blocks(config: Any) -> bool:
    transfer = config.kv_transfer_config
    return transfer is not None and transfer.is_kv_transfer_instance


def _has_sketch(config: Any) -> bool:
    return sketches_keys(TopThetaConfig.from_additional_config(config.additional_config))


def _sketch_in_small_blocks(config: Any) -> bool:
    cache = config.cache_config
    chosen = cache.user_specified_block_size and cache.block_size % GPU_GROUP != 0
    return bool(chosen and _has_sketch(config))


def _attention_is(*kinds: str) -> Callable[[Any], bool]:
    return lambda config: config.model_config.attn_type in kinds


def _head_size_on_cpu(config: Any) -> bool:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    head_size = config.model_config.get_head_size()
    return current_platform.is_cpu() and not CPUAttentionBackend.supports_head_size(head_size)


_ANOTHER_BACKEND = "Serve this model with another --attention-backend"
_OPTIONS_OF_A_DRAFT = "its layers would run with the served model's options and weights"

_REFUSALS = (
    _Refusal(
        lambda config: config.model_config.use_mla,
        "multi-head latent attention (MLA)",
        "its cache has latent vectors in place of K and V",
        _ANOTHER_BACKEND,
    ),
    _Refusal(
        lambda config: config.model_config.uses_alibi,
        "ALiBi",
        "the kernels know scores without a position bias only",
        _ANOTHER_BACKEND,
    ),
    _Refusal(
        _head_size_on_cpu,
        "this head size on a CPU",
        "vLLM's CPU_ATTN, whose cache it shares, has no such heads",
        _ANOTHER_BACKEND,
    ),
    _Refusal(
        lambda config: current_platform.is_cpu() and config.cache_config.cache_dtype[:3] == "fp8",
        "an fp8 KV cache on a CPU",
        "the kernels read bf16, fp16 and fp32",
        "Drop --kv-cache-dtype",
    ),
    _Refusal(
        _attention_is("encoder_only", "encoder_decoder"),
        "encoders",
        "only causal self-attention of a decoder is pruned",
        _ANOTHER_BACKEND,
    ),
    _Refusal(
        lambda config: config.model_config.is_mm_prefix_lm,
        "images that attend to themselves",
        "only causal attention is pruned",
        "Pass --language-model-only to serve text alone",
    ),
    _Refusal(
        _attention_is("attention_free"),
        "models without attention",
        "there is nothing to prune",
        "Drop --attention-backend",
    ),
    _Refusal(
        _drafts_unmarked,
        "draft models on vLLM 0.30",
        _OPTIONS_OF_A_DRAFT,
        f"Install vLLM 0.31 or newer, or draft without a model ({_NGRAM})",
    ),
    _Refusal(
        _drafts_always_as_target,
        "this kind of draft model",
        _OPTIONS_OF_A_DRAFT,
        f"Draft without a model instead ({_NGRAM}), or serve without --speculative-config",
    ),
    _Refusal(
        _drafts_as_target,
        "a draft model on its own backend",
        _OPTIONS_OF_A_DRAFT,
        'Add "attention_backend": "TRITON_ATTN" (on a CPU "CPU_ATTN") to --speculative-config',
    ),
    _Refusal(
        lambda config: config.model_config.attention_chunk_size is not None,
        "chunked local attention",
        "the kernels know whole rows and sliding windows only",
        _ANOTHER_BACKEND,
    ),
    _Refusal(
        lambda config: config.cache_config.kv_sharing_fast_prefill,
        "fast prefill of layers that share KV",
        "these layers see other rows than the rest of the step, which counts and options follow",
        "Drop --kv-sharing-fast-prefill",
    ),
    _Refusal(
        _context_parallel,
        "context parallelism",
        "a rank sees a part of each row, so neither its best key nor its denominator",
        "Drop --decode-context-parallel-size and --prefill-context-parallel-size",
    ),
    _Refusal(
        lambda config: bool(envs.VLLM_BATCH_INVARIANT),
        "batch invariance",
        "a row is cut into parts by the size of the batch",
        "Unset VLLM_BATCH_INVARIANT",
    ),
    _Refusal(
        lambda config: config.parallel_config.use_ubatching,
        "dual batch overlap",
        "the parts of a batch are counted as one, and requests would get each other's options",
        "Drop --enable-dbo and --ubatch-size",
        on_cpu=False,
    ),
    _Refusal(
        lambda config: _has_sketch(config) and config.cache_config.cache_dtype[:3] == "fp8",
        "a sketch of K beside an fp8 KV cache",
        "8 bits would take the place of 8",
        """Set "k_sketch" to false, or drop --kv-cache-dtype""",
        on_cpu=False,
    ),
    _Refusal(
        _sketch_in_small_blocks,
        "a sketch of K in blocks of this size",
        f"its groups have {GPU_GROUP} tokens, and do not cross blocks",
        """Set "k_sketch" to false, or pass --block-size 64""",
        on_cpu=False,
    ),
    # On a GPU V means lie behind K and V in a page, outside of the tensors that these copy.
    _Refusal(
        lambda config: config.cache_config.mamba_cache_mode == "align",
        "prefix caching of Mamba states",
        "it copies blocks without their V means, and was not run on pages that have none",
        "Pass --no-enable-prefix-caching",
        on_cpu=False,
    ),
    _Refusal(
        _moves_blocks,
        "KV connectors and KV offloading",
        "they move blocks without their V means, and were not run on pages that have none",
        "Drop --kv-transfer-config and --kv-offloading-size",
        on_cpu=False,
    ),
)


def check_engine(config: Any) -> None:
    """Refuse what does not work.

    Args:
        config: vLLM's `VllmConfig`.

    Raises:
        ValueError: one message saying what does not work, why, and what to type.
    """
    on_cpu = current_platform.is_cpu()
    for refusal in _REFUSALS:
        if (refusal.on_cpu or not on_cpu) and refusal.applies(config):
            raise ValueError(
                f"toptheta does not work with {refusal.what}: {refusal.why}. {refusal.instead}"
            )
