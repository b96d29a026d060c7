"""How vLLM plans the KV cache; 0.33 moved it to a module of its own."""

try:
    from vllm.v1.core.kv_cache_planning import (
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
        unify_hybrid_kv_cache_specs,
        unify_kv_cache_spec_page_size,
    )
except ImportError:
    from vllm.v1.core.kv_cache_utils import (
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
        unify_hybrid_kv_cache_specs,
        unify_kv_cache_spec_page_size,
    )

__all__ = [
    "get_kv_cache_config_from_groups",
    "get_kv_cache_groups",
    "unify_hybrid_kv_cache_specs",
    "unify_kv_cache_spec_page_size",
]
