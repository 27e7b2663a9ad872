"""Compilers that run side by side: they spend most of their time outside Python."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

Call = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""A kernel, its grid, arguments and options."""


_LOADING = threading.Lock()
"""Launchers are modules of one name to Python: of two that load at once, one may get the other's code."""


def compile_side_by_side(calls: Sequence[Call], device: torch.device) -> None:
    """Compiles the kernels of several launches, and what launches them, on a CUDA device.

    A first call then takes little longer than its slowest kernel.  A kernel that was compiled before
    costs what looking it up does.
    """
    if device.type != "cuda" or len(calls) < 2:
        return
    for kernel, _, _, options in calls:
        # By what its disk cache knows a kernel; two threads that find it out for functions which both
        # kernels call get other names than one, and the next process would compile once more.
        for value in (kernel, *options.values()):
            getattr(value, "cache_key", None)

    def compile_one(call: Call) -> None:
        kernel, grid, arguments, options = call
        with torch.cuda.device(device):
            compiled = kernel.warmup(*arguments, grid=grid, **options)
            with _LOADING:
                # `run` builds the launcher with the host's compiler and loads it and the kernel.
                _ = compiled.run

    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(compile_one, calls))
