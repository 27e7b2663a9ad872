"""Compiles the Triton kernels of a template for devices that are not here, with arguments of real launches.

What a search asks before anything is timed: whether a candidate compiles for a class of devices at all, fits
into its shared memory, and which niche it belongs to.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal._errors import TaskError
from foveal.search.artefact import MOST_SHARED, facts_of

TARGETS: Mapping[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
"""Device classes by name: Triton's backend, architecture and lanes of a warp."""

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class CompileError(Exception):
    """A candidate does not compile, or does not fit: the sentence."""


@dataclass(frozen=True)
class Launch:
    """A kernel, and what it would be launched with."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    def compile(self, target: str) -> Any:
        """What Triton makes of it for a class of TARGETS."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        constants = {n: self.options[n] for n in names if n in self.options}
        values = dict(zip(names, self.arguments, strict=False)) | constants
        signature: dict[str, Any] = {}
        fixed: dict[Any, Any] = {}
        hints: dict[Any, Any] = {}
        for position, name in enumerate(names):
            constant = name in constants
            signature[name] = _typed(values[name], (position,), constant, fixed, hints)
        options = {n: v for n, v in self.options.items() if n not in names}
        source = ASTSource(self.kernel, signature, fixed, hints)
        return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)


def _typed(
    value: Any,
    path: tuple[int, ...],
    constant: bool,
    fixed: dict[Any, Any],
    hints: dict[Any, Any],
) -> Any:
    """The type of an argument as a launch sees it; fills in what is fixed, and divisibility, by path."""
    if isinstance(value, tuple) and not constant:
        return tuple(_typed(v, (*path, i), False, fixed, hints) for i, v in enumerate(value))
    if constant or value is None or (isinstance(value, int) and value == 1):
        fixed[path] = value
        return "constexpr"
    if isinstance(value, Tensor):
        hints[path] = [["tt.divisibility", 16]]
        return _TYPES[value.dtype]
    if isinstance(value, int):
        if value % 16 == 0:
            hints[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def check_target(target: str) -> None:
    """Raises TaskError for a class of devices that is not known, or that this Triton has no backend for."""
    if target not in TARGETS:
        raise TaskError(f"compile-for: got {target!r}; one of {', '.join(TARGETS)} is needed")
    from triton.backends import backends

    kind = "amd" if TARGETS[target][0] == "hip" else "nvidia"
    if kind not in backends:
        raise TaskError(f"compile-for: this Triton has no backend for {target}")


def compiled_facts(
    program: Mapping[str, Any], shapes: Sequence[tuple[Sequence[int], str]], target: str
) -> dict[str, float]:
    """Compiles every kernel that a template launches on inputs of these shapes and element types.

    Returns the facts of the kernel that takes most shared memory.  Raises CompileError.
    """
    module = importlib.import_module(program["module"])
    inputs = [torch.empty(*shape, dtype=getattr(torch, dtype)) for shape, dtype in shapes]
    body = {"text": program["text"]} if "text" in program else {}
    found = module.launches(inputs, architecture=target, **program["options"], **body)
    facts = []
    for launch in found:
        name = launch.kernel.__name__
        try:
            made = launch.compile(target)
        except Exception as error:  # compilers raise what they like
            raise CompileError(f"{name} for {target}: {type(error).__name__}: {error}") from None
        own = facts_of(made, target)
        if own["shared"] > 1:
            needed, most = int(own["shared"] * MOST_SHARED[target]), MOST_SHARED[target]
            raise CompileError(
                f"{name} for {target}: {needed} bytes of shared memory; it has {most}"
            )
        facts.append(own)
    return max(facts, key=lambda own: own["shared"])
