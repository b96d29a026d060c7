"""Loads the Triton kernels so that they run on the CPU, where there is no GPU.

Triton decides at import whether functions are interpreted, so this has to happen before anything
else imports it. The variable is taken back, because child processes run the real engine.
"""

import contextlib
import importlib
import os
import pkgutil
from typing import Any

import pytest
import torch

VARIABLE = "TRITON_INTERPRET"


def load() -> bool:
    """Import the kernels; whether they are interpreted."""
    interpreted = not torch.cuda.is_available()
    before = os.environ.get(VARIABLE)
    if interpreted:
        os.environ[VARIABLE] = "1"
    try:
        try:
            import triton.runtime.interpreter
        except ImportError:
            return False
        # Imported by launches, and checks there that it is interpreted.
        with contextlib.suppress(ImportError):
            import triton.experimental.gluon
        from vllm_toptheta.kernels import triton as kernels

        for module in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"{kernels.__name__}.{module.name}")
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before
    if interpreted:
        _teach_bfloat16_dot(triton.runtime.interpreter)
        _skip_repeated_patches(triton.runtime.interpreter)
    return interpreted


def _teach_bfloat16_dot(interpreter: Any) -> None:
    """The interpreter keeps bfloat16 as raw uint16 and multiplies these as numbers; widen them
    first.
    """
    original = interpreter.InterpreterBuilder.create_dot
    bfloat16 = interpreter.tl.bfloat16

    def widen(operand: Any) -> Any:
        if operand.dtype.scalar != bfloat16:
            return operand
        wide = (operand.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(wide, interpreter.tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widen(a), widen(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _skip_repeated_patches(interpreter: Any) -> None:
    """The interpreter patches the language again for every function that a kernel calls, and never
    takes that back. Once for each module of such functions is enough, and takes half of the time.
    """
    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in patched:
            patched.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def _interpreting() -> bool:
    try:
        from vllm_toptheta.kernels.triton.means import _update_v_means_kernel
    except ImportError:
        return False
    return type(_update_v_means_kernel).__name__ == "InterpretedFunction"


needs_interpreter = pytest.mark.skipif(
    "not __import__('triton_interpreter')._interpreting()",
    reason="no triton here, or a GPU, where benchmarks/gpu/check.py covers these kernels",
)
