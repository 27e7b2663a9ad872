"""Compiles kernels for GPUs that are not here, with the arguments of real launches."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel and the arguments that it was called with."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def compile(self, target: Any) -> Any:
        """What Triton makes of it for a target; raises where it cannot."""
        import triton
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        parameters = inspect.signature(self.kernel.fn).parameters.values()
        constants = {p.name: p.default for p in parameters if p.default is not p.empty}
        constants |= {n: self.options[n] for n in names if n in self.options}
        values = dict(zip(names, self.arguments, strict=False)) | constants
        signature, constexprs, attributes = {}, {}, {}
        for position, name in enumerate(names):
            constant = name in constants
            signature[name] = _typed(values[name], (position,), constant, constexprs, attributes)
        options = {n: v for n, v in self.options.items() if n not in names}
        source = ASTSource(self.kernel, signature, constexprs, attributes)
        return triton.compile(source, target=target, options=options)


def _typed(
    value: Any,
    path: tuple[int, ...],
    constant: bool,
    constants: dict[Any, Any],
    hints: dict[Any, Any],
) -> Any:
    """The type of an argument as a launch would see it; fills constants and divisibility by path."""
    if isinstance(value, tuple) and not constant:
        return tuple(_typed(v, (*path, i), False, constants, hints) for i, v in enumerate(value))
    if constant or value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor):
        hints[path] = [["tt.divisibility", 16]]
        return _TYPES[value.dtype]
    if isinstance(value, int):
        if value % 16 == 0:
            hints[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


@dataclasses.dataclass
class _Recorder:
    kernel: Any
    launches: list[Launch]

    def __getitem__(self, programs: object) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.launches.append(Launch(self.kernel, arguments, options))

        return launch


@contextmanager
def recorded(kernels: dict[str, ModuleType]) -> Iterator[list[Launch]]:
    """Launches of kernels, by name and the module that launches them, are listed and not run."""
    launches: list[Launch] = []
    kept = {name: getattr(module, name) for name, module in kernels.items()}
    for name, module in kernels.items():
        setattr(module, name, _Recorder(kept[name], launches))
    try:
        yield launches
    finally:
        for name, module in kernels.items():
            setattr(module, name, kept[name])
