"""`VllmConfig`: our options are no part of the compiled graph."""

import copy
from typing import Any

from vllm_toptheta.config import CONFIG_KEY
from vllm_toptheta.hooks.wrapping import Method, check_fields


def look_up() -> Method:
    """The wrap that keeps our options out of the compile hash.

    Raises:
        AttributeError: a configuration has no longer what this package reads of it.
    """
    from vllm.config import AttentionConfig, VllmConfig

    fields = ("attention_config", "additional_config", "instance_id")
    check_fields("VllmConfig", VllmConfig.__dataclass_fields__, *fields)
    check_fields("AttentionConfig", AttentionConfig.__dataclass_fields__, "backend")
    method = Method(VllmConfig, "compute_hash")

    def compute_hash(self: Any, *args: Any, **kwargs: Any) -> Any:
        options = self.additional_config
        if isinstance(options, dict) and CONFIG_KEY in options:
            self = copy.copy(self)
            self.additional_config = {k: v for k, v in options.items() if k != CONFIG_KEY}
        return method.original(self, *args, **kwargs)

    return method.by(compute_hash)
