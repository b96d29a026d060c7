"""The platform: our backend where it is asked for, in the class that suits the options."""

from typing import Any

from vllm_toptheta.hooks import attention_backend
from vllm_toptheta.hooks.wrapping import Method


def look_up() -> Method:
    """The wrap that lets this process's platform choose the backend."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    method = Method(platform, "get_attn_backend_cls")

    def get_attn_backend_cls(cls: Any, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        member = next((value for value in given if attention_backend.is_ours(value)), None)
        if member is None:
            return method.original(cls, *args, **kwargs)
        layer = next((value for value in given if hasattr(value, "_asdict")), None)
        if layer is None:
            raise RuntimeError(
                "toptheta: this vLLM has moved the description of layers in "
                f"{platform.__name__}.get_attn_backend_cls; install a tested vLLM or a newer "
                "vllm-toptheta"
            )
        if not current_platform.is_cpu():
            # Raises where our backend cannot run the layer, or takes another one for it.
            chosen = method.original(cls, *args, **kwargs)
            is_ours = chosen == member.get_path()
            return member.get_class().path_for(layer.dtype) if is_ours else chosen
        # The CPU platform validates nothing.
        reasons = member.get_class().validate_configuration(
            device_capability=None, **layer._asdict()
        )
        if reasons:
            raise ValueError(
                f"toptheta cannot run a layer of this model on CPU: {'; '.join(reasons)}. "
                "Use another backend, or keep toptheta for the supported layers only: "
                """--attention-config '{"backend_per_kind": {"full_attention": "toptheta"}}'"""
            )
        return member.get_class().path_for(layer.dtype)

    return method.by(get_attn_backend_cls)
