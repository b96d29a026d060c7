"""The GPU backend, as vLLM's CPU platform takes it."""

from typing import Any

import torch

from vllm_toptheta.backend.gpu import TopThetaGPUBackend, TopThetaGPUBareBackend

# TRITON_ATTN's cache writer asks for it to choose how many warps a program has.
torch.cuda.get_device_capability = lambda *args: (9, 0)


class Backend(TopThetaGPUBackend):
    """Accepts a CPU."""

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        return []

    @classmethod
    def path_for(cls, dtype: torch.dtype) -> str:
        kind = super().path_for(dtype).rpartition(".")[2].removeprefix("TopThetaGPU")
        return f"gpu_on_cpu.{kind}"


class BareBackend(Backend):
    """The same without room for V means."""

    customize_spec = TopThetaGPUBareBackend.customize_spec


class SketchBackend(Backend):
    """The same with a sketch of K."""

    sketches_keys = True
