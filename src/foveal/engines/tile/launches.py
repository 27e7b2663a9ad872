"""Launches of kernels, and compilers that run side by side before the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    """Compiles the kernels in parallel, unless it was done for this key and these sizes of x.

    Compilers spend most of their time outside Python: a first call takes little longer than its slowest
    kernel.  `key` and the sizes of x tell kernels apart; one that they miss is compiled at its launch.
    """
    if x.device.type != "cuda" or len(launches) < 2:
        return
    key = (x.device, x.dtype, *((n % 16 == 0, n == 1) for n in x.shape), *key)
    if key in _COMPILED:
        return
    _COMPILED.add(key)

    def compile_one(one: Launch) -> None:
        if one.programs:
            with torch.cuda.device(x.device):
                one.kernel.warmup(*one.arguments, grid=(one.programs,), **one.options)

    with ThreadPoolExecutor(len(launches)) as pool:
        list(pool.map(compile_one, launches))
