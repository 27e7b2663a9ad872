"""Launches of kernels, and compilers that run side by side before the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foveal.engines.tile.compiling import compile_side_by_side
from foveal.engines.tile.replay import launch


@dataclass(frozen=True)
class Launch:
    """A kernel with everything that it is called with."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> None:
        if self.programs:
            launch(self.kernel, (self.programs,), *self.arguments, **self.options)


_COMPILED: set[tuple[Any, ...]] = set()


def compile_together(launches: Sequence[Launch], key: tuple[Any, ...], x: Tensor) -> None:
    """Compiles the kernels side by side, unless it was done for this key and these sizes of x.

    `key` and the sizes of x tell kernels apart; one that they miss is compiled at its launch.
    """
    key = (x.device, x.dtype, *((n % 16 == 0, n == 1) for n in x.shape), *key)
    if key in _COMPILED:
        return
    _COMPILED.add(key)
    calls = [(one.kernel, (one.programs,), one.arguments, one.options) for one in launches]
    compile_side_by_side([call for call in calls if call[1][0]], x.device)
