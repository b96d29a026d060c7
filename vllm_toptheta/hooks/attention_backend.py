"""`AttentionBackendEnum`: the name TOPTHETA, as a member that pickles."""

from collections.abc import Callable
from typing import Any

NAME = "TOPTHETA"

_failed: list[str] = []


def register(path: str, reduce: Callable[[], tuple[Any, ...]]) -> None:
    """Add the member.

    Args:
        path: of the backend class.
        reduce: what the member pickles as: a function of a module, and its arguments.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    try:
        if hasattr(AttentionBackendEnum, "register"):
            register_backend(NAME, path)
        else:
            _add_member(AttentionBackendEnum, path)
        # An enum member pickles as a look-up of its value, and spawned processes unpickle the
        # configuration before they load plug-ins. This way unpickling itself loads the plug-in.
        AttentionBackendEnum[NAME].__reduce_ex__ = lambda protocol: reduce()
    except BaseException as error:
        _failed.append(f"{type(error).__name__}: {error}")
        raise


def _add_member(enum: Any, path: str) -> None:
    """What `AttentionBackendEnum.register` of vLLM 0.32 does, which older ones do not have."""
    new = object.__new__(enum)
    new._name_, new._value_ = NAME, path
    setattr(enum, NAME, new)
    enum._member_map_[NAME] = enum._value2member_map_[path] = new
    enum._member_names_.append(NAME)


def is_registered() -> bool:
    """Whether the name is there."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return NAME in AttentionBackendEnum.__members__


def member() -> Any:
    """The member; KeyError where there is none."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[NAME]


def is_ours(backend: Any) -> bool:
    """Whether a value that vLLM passes around is the member.

    Raises:
        RuntimeError: it is, and what must stand with it does not.
    """
    if getattr(backend, "name", None) != NAME:
        return False
    if _failed:
        raise RuntimeError(
            f"toptheta: the backend is registered by half ({_failed[0]}); install a tested vLLM or "
            "a newer vllm-toptheta, or serve with another --attention-backend"
        )
    return True


def is_requested(vllm_config: Any) -> bool:
    """Whether a configuration selects this backend, for all layers or for one kind of them."""
    attention = vllm_config.attention_config
    per_kind = getattr(attention, "backend_per_kind", None) or {}
    return any(is_ours(backend) for backend in (attention.backend, *per_kind.values()))
