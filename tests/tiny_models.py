"""Tiny causal language models with random weights, built in-process."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from vllm_toptheta.calibration.attention import AttentionCall, dense_attention
from vllm_toptheta.calibration.collect import AttentionStatistics, Collector
from vllm_toptheta.evaluation.model import replaced_attention

VOCABULARY = 128
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    # Large weights make attention peaked, so that thresholds have something to separate.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS = {
    "llama": LlamaConfig(**_COMMON, num_hidden_layers=2, num_key_value_heads=2),
    "llama-mqa": LlamaConfig(**_COMMON, num_hidden_layers=2, num_key_value_heads=1),
    "qwen2-mha": Qwen2Config(**_COMMON, num_hidden_layers=2, num_key_value_heads=4),
    "mistral-windowed": MistralConfig(
        **_COMMON, num_hidden_layers=2, num_key_value_heads=2, sliding_window=40
    ),
    "gemma2-soft-cap": Gemma2Config(
        **_COMMON,
        num_hidden_layers=2,
        num_key_value_heads=2,
        sliding_window=40,
        query_pre_attn_scalar=16,
    ),
    "gemma3-mixed-windows": Gemma3TextConfig(
        **_COMMON,
        num_hidden_layers=3,
        num_key_value_heads=1,
        sliding_window=40,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
    ),
    "gpt-oss-sinks": GptOssConfig(
        **_COMMON,
        num_hidden_layers=2,
        num_key_value_heads=2,
        sliding_window=40,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
}


def tiny_model(name: str = "llama", attention: str = "eager") -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            parameter.data.fill_(20.0)
    return model.float().eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte-like character; no first token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {
        chr(code): code for code in range(4, VOCABULARY)
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def random_documents(number: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCABULARY, (length,), generator=generator) for _ in range(number)]


def collect(
    model: PreTrainedModel,
    documents: list[torch.Tensor],
    statistics: AttentionStatistics,
    min_prob: float,
) -> Collector:
    """Fill statistics from a transformers model: what an engine's workers collect, without one."""
    collector = Collector(statistics, min_prob)

    def attention(call: AttentionCall) -> torch.Tensor:
        collector.add(call)
        return dense_attention(call)

    for document in documents:
        collector.start_document(len(document))
        with replaced_attention(model, attention), torch.inference_mode():
            model.base_model(document[None], use_cache=False)
    return collector
