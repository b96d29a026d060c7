"""What the launchers launch, recorded instead of executed, and what Triton would compile for it.

Only where functions are not interpreted: programs beside this file use it, not the tests' process.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass
class Recorder:
    """Stands in for a jit function and notes how it would have been launched."""

    function: Any
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.calls.append((args, kwargs))


@dataclass
class Variant:
    """One binary that Triton would compile.

    Attributes:
        kernel: name of the jit function.
        key: what tells it from the kernel's other variants: types, values and alignments that are
            specialised, constants and options.
        source, options: what to hand to triton.compile.
    """

    kernel: str
    key: str
    source: ASTSource
    options: dict[str, Any]


@contextlib.contextmanager
def recorded(*functions: tuple[Any, str]) -> Iterator[list[Recorder]]:
    """Record the launches of jit functions, given as (module of the launcher, name)."""
    recorders = [Recorder(getattr(module, name)) for module, name in functions]
    for (module, name), recorder in zip(functions, recorders, strict=True):
        setattr(module, name, recorder)
    try:
        yield recorders
    finally:
        for (module, name), recorder in zip(functions, recorders, strict=True):
            setattr(module, name, recorder.function)


def variants(recorders: list[Recorder], target: GPUTarget) -> Iterator[Variant]:
    """What Triton would compile for recorded launches, by its own rules of specialisation."""
    backend = make_backend(target)
    for recorder in recorders:
        function = recorder.function
        bind = create_function_from_signature(function.signature, function.params, backend)
        for args, kwargs in recorder.calls:
            bound, specialization, options = bind(*args, **kwargs)
            key = f"{specialization} {options}"
            options, signature, constants, attributes = function._pack_args(
                backend, kwargs, bound, specialization, options
            )
            source = ASTSource(function, signature, constants, attributes)
            yield Variant(function.__name__, key, source, vars(options))
