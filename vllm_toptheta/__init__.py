"""Top-theta attention for vLLM: `vllm serve MODEL --attention-backend toptheta`."""

__version__ = "0.1.0"


def register() -> None:
    """Register the attention backend TOPTHETA with vLLM (entry point of `vllm.general_plugins`).

    Idempotent and lazy: no torch, no triton, no kernel is imported before the backend is selected.
    Call it yourself before building an `AttentionConfig(backend="toptheta")` object by hand; vLLM
    loads plug-ins after that line.
    """
    from vllm_toptheta.registration import register_backend

    register_backend()
