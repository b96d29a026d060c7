"""Lets vLLM's V2 model runner start without a GPU, in every process that has this folder on its
path: its Triton kernels then run in Triton's interpreter (`TRITON_INTERPRET=1`).

vLLM asks for exactly one Triton back-end with an active driver; the one it finds here compiles
nothing.
"""

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
