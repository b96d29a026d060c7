"""Lets vLLM's V2 model runner start without a GPU, in every process that has this folder on its
path: its Triton kernels then run in Triton's interpreter (`TRITON_INTERPRET=1`).

vLLM asks for exactly one Triton back-end with an active driver; the one it finds here compiles
nothing. With `TOPTHETA_TEST_GPU_BACKEND` set, its CPU platform gets the GPU backend, whose kernels
and those of TRITON_ATTN are interpreted, too (`gpu_on_cpu.py`).
"""

import os

import triton.backends


class Driver:
    """Says that it is there."""

    @staticmethod
    def is_active() -> bool:
        return True


class Backend:
    """A Triton back-end without a compiler."""

    driver = Driver
    compiler = None


triton.backends.backends.clear()
triton.backends.backends["cpu"] = Backend

if os.environ.get("TOPTHETA_TEST_GPU_BACKEND"):
    from vllm_toptheta import registration

    registration.CPU_BACKEND_PATH = "gpu_on_cpu.Backend"
