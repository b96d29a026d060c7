"""The GPU backend, as vLLM's CPU platform takes it."""

from typing import Any

import torch

from vllm_toptheta.backend.gpu import TopThetaGPUBackend

# TRITON_ATTN's cache writer asks for it to choose how many warps a program has.
torch.cuda.get_device_capability = lambda *args: (9, 0)


class Backend(TopThetaGPUBackend):
    """Accepts a CPU."""

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        return []
