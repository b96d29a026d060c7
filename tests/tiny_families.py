"""Tiny random checkpoints of the families that vLLM serves, as their authors publish them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

WINDOW = 160
"""Of the prompts in `families_run.py`, rows see one whole group of tokens inside of it."""
_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SMALL: dict[str, Any] = {
    **_SIZES,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    # Large weights make attention peaked, so that there is something to prune.
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_WIDE = {**_SMALL, "head_dim": 32}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MIXED = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
}
_SHARED = {  # Gemma: the last two layers read the KV of the first two
    **_WIDE,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 16,
}
_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "full_attention"],
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0 + i for i in range(16)],
    "original_max_position_embeddings": 512,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
}
_MROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 6, 6],
    }
}
_IMAGE_TOKENS = {
    "image_token_id": 10,
    "video_token_id": 11,
    "vision_start_token_id": 12,
    "vision_end_token_id": 13,
}
_TEXT_ONLY = {"language_model_only": True}
_NO_CHECKPOINTS = {"enable_prefix_caching": False}


@dataclass(frozen=True)
class Family:
    """One row of docs/models.md.

    Attributes:
        config: makes the configuration of a checkpoint.
        arguments: what `LLM` needs to run it on a CPU, with any backend.
        needs: a package that vLLM imports for it and that is not always there.
        attending: layers that have rows to prune.
        mistral_format: write params.json and consolidated.safetensors.
    """

    config: Callable[[], Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None
    attending: int = 2
    mistral_format: bool = False


SERVED: dict[str, Family] = {
    "llama": Family(lambda: tf.LlamaConfig(**_SMALL)),
    "llama-yarn": Family(
        lambda: tf.LlamaConfig(**_SMALL),
        {
            "hf_overrides": {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "rope_theta": 10000.0,
                }
            }
        },
    ),
    "llama-head-112": Family(
        lambda: tf.LlamaConfig(**{**_SMALL, "hidden_size": 224}), {"dtype": "bfloat16"}
    ),
    "qwen2": Family(lambda: tf.Qwen2Config(**_SMALL)),
    "qwen2-moe": Family(
        lambda: tf.Qwen2MoeConfig(**_SMALL, **_EXPERTS, shared_expert_intermediate_size=32)
    ),
    "qwen3": Family(lambda: tf.Qwen3Config(**_WIDE)),
    "qwen3-moe": Family(lambda: tf.Qwen3MoeConfig(**_WIDE, **_EXPERTS)),
    "mistral": Family(lambda: tf.MistralConfig(**_WIDE, sliding_window=None)),
    "mistral-params-json": Family(
        lambda: tf.MistralConfig(**_WIDE, sliding_window=None),
        {"load_format": "mistral", "config_format": "mistral"},
        mistral_format=True,
    ),
    "mistral-window": Family(lambda: tf.MistralConfig(**_SMALL, sliding_window=WINDOW)),
    "mistral-window-off": Family(
        lambda: tf.MistralConfig(**_SMALL, sliding_window=256), {"disable_sliding_window": True}
    ),
    "gemma2": Family(
        lambda: tf.Gemma2Config(**_WIDE, sliding_window=WINDOW, query_pre_attn_scalar=32)
    ),
    "gemma3-text": Family(lambda: tf.Gemma3TextConfig(**_WIDE, **_MIXED, query_pre_attn_scalar=32)),
    "gemma3n-text": Family(
        lambda: tf.Gemma3nTextConfig(
            **_SHARED,
            altup_num_inputs=2,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        attending=4,
    ),
    "gemma4-text": Family(
        lambda: tf.Gemma4TextConfig(
            **{**_SHARED, "num_key_value_heads": 2},
            global_head_dim=64,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
        ),
        attending=4,
    ),
    "phi3-longrope": Family(
        lambda: tf.Phi3Config(
            **_SMALL,
            original_max_position_embeddings=512,
            sliding_window=None,
            rope_parameters=_LONGROPE,
        )
    ),
    "gpt-oss": Family(
        lambda: tf.GptOssConfig(**_WIDE, **_MIXED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "gpt2": Family(
        lambda: tf.GPT2Config(
            vocab_size=512, n_embd=64, n_layer=2, n_head=2, n_positions=256, initializer_range=0.2
        )
    ),
    "opt": Family(
        lambda: tf.OPTConfig(
            **_SIZES, ffn_dim=64, word_embed_proj_dim=64, init_std=0.2, max_position_embeddings=256
        )
    ),
    "pythia": Family(lambda: tf.GPTNeoXConfig(**_SIZES, initializer_range=0.2)),
    "falcon": Family(lambda: tf.FalconConfig(**_SIZES, initializer_range=0.2, multi_query=True)),
    "cohere2": Family(lambda: tf.Cohere2Config(**_SMALL, **_MIXED)),
    "qwen3-next": Family(
        lambda: tf.Qwen3NextConfig(
            **_WIDE, **_EXPERTS, **_LINEAR, shared_expert_intermediate_size=32
        ),
        {"dtype": "bfloat16"},
        attending=1,
    ),
    "granite4": Family(
        lambda: tf.GraniteMoeHybridConfig(
            **_SMALL,
            **_MAMBA2,
            layer_types=["mamba", "attention"],
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=32,
            position_embedding_type="nope",
        ),
        _NO_CHECKPOINTS,
        attending=1,
    ),
    "falcon-h1": Family(
        lambda: tf.FalconH1Config(**_SMALL, **_MAMBA2, mamba_d_ssm=128), _NO_CHECKPOINTS
    ),
    "lfm2": Family(
        lambda: tf.Lfm2Config(
            **_SMALL, layer_types=["conv", "full_attention"], conv_dim=64, block_dim=64
        ),
        attending=1,
    ),
    "nemotron-h": Family(
        lambda: tf.NemotronHConfig(
            **_WIDE,
            layers_block_type=["mamba", "attention"],
            mamba_num_heads=4,
            mamba_head_dim=32,
            n_groups=1,
            ssm_state_size=16,
            chunk_size=16,
        ),
        _NO_CHECKPOINTS,
        attending=1,
    ),
    "gemma3": Family(
        lambda: tf.Gemma3Config(
            text_config={**_WIDE, **_MIXED, "query_pre_attn_scalar": 32},
            vision_config=_VISION,
            mm_tokens_per_image=4,
            image_token_index=10,
            boi_token_index=11,
            eoi_token_index=12,
        ),
        _TEXT_ONLY,
        "torchvision",
    ),
    "gemma4": Family(
        lambda: tf.Gemma4Config(
            text_config={**_WIDE, **_MIXED, "global_head_dim": 64, "num_kv_shared_layers": 0},
            vision_config={**_VISION, "num_key_value_heads": 2, "head_dim": 16},
            image_token_id=10,
            boi_token_id=11,
            eoi_token_id=12,
        ),
        _TEXT_ONLY,
        "torchvision",
    ),
    "qwen2.5-vl": Family(
        lambda: tf.Qwen2_5_VLConfig(
            text_config={**_SMALL, **_MROPE},
            vision_config={**_QWEN_VISION, "fullatt_block_indexes": [0]},
            **_IMAGE_TOKENS,
        ),
        _TEXT_ONLY,
        "torchvision",
    ),
    "qwen3-vl": Family(
        lambda: tf.Qwen3VLConfig(
            text_config={**_WIDE, **_MROPE},
            vision_config={
                **_QWEN_VISION,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
            **_IMAGE_TOKENS,
        ),
        _TEXT_ONLY,
        "torchvision",
    ),
    "qwen3.5": Family(
        lambda: tf.Qwen3_5TextConfig(**_WIDE, **_LINEAR),
        {"dtype": "bfloat16"},
        "torchvision",
        attending=1,
    ),
    "smolvlm": Family(
        lambda: tf.SmolVLMConfig(
            text_config={**_SMALL, "model_type": "llama"},
            vision_config=_VISION,
            image_token_id=10,
            scale_factor=1,
            pad_token_id=0,
        ),
        _TEXT_ONLY,
    ),
}

_GEMMA3 = SERVED["gemma3"]

REFUSED: dict[str, tuple[Family, str]] = {
    "deepseek-v2": (
        Family(
            lambda: tf.DeepseekV2Config(
                **{**_SMALL, "num_key_value_heads": 2},
                kv_lora_rank=32,
                q_lora_rank=None,
                n_routed_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
            )
        ),
        "multi-head latent attention",
    ),
    "bloom": (
        Family(lambda: tf.BloomConfig(vocab_size=512, hidden_size=64, n_layer=2, n_head=2)),
        "ALiBi",
    ),
    "falcon-alibi": (Family(lambda: tf.FalconConfig(**_SIZES, alibi=True)), "ALiBi"),
    "llama4-text": (
        Family(lambda: tf.Llama4TextConfig(**_WIDE, num_local_experts=2, attention_chunk_size=128)),
        "chunked local attention",
    ),
    "mamba2": (
        Family(
            lambda: tf.Mamba2Config(
                vocab_size=512, hidden_size=64, num_hidden_layers=2, num_heads=4, head_dim=32
            )
        ),
        "models without attention",
    ),
    "bert": (
        Family(lambda: tf.BertConfig(**_SIZES), {"runner": "pooling"}),
        "encoders",
    ),
    "gemma3-images": (
        Family(_GEMMA3.config, {}, _GEMMA3.needs),
        "images that attend to themselves",
    ),
}
"""Families and the words by which they are refused; their configuration is enough."""


def save_checkpoint(family: Family, path: Path) -> Path:
    """Write the family's checkpoint into a folder that is not there yet."""
    torch.manual_seed(0)
    config = family.config()
    auto = next(
        auto
        for auto in (tf.AutoModelForCausalLM, tf.AutoModelForImageTextToText)
        if type(config) in auto._model_mapping
    )
    auto.from_config(config).float().save_pretrained(path)
    if family.mistral_format:
        _to_mistral_format(config, path)
    return path


def _to_mistral_format(config: Any, path: Path) -> None:
    names = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
        "model.": "",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    save_file(tensors, path / "consolidated.safetensors")
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_position_embeddings": config.max_position_embeddings,
    }
    (path / "params.json").write_text(json.dumps(params))
    for name in ("config.json", "model.safetensors"):
        (path / name).unlink()
