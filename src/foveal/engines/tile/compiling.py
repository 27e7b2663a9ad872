"""Compilers that run side by side: they spend most of their time outside Python."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

Call = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""A kernel, its grid, arguments and options."""


_LOADING = threading.Lock()
"""Launchers are modules of one name to Python: of two that load at once, one may get the other's code."""

LONGEST = frozenset(
    {
        "tile_attend_forward",
        "tile_attend_backward_joint",
        "tile_attend_backward_keys",
        "tile_attend_backward_queries",
    }
)
"""Kernels of the Hopper edition that compile longest, and say when they are `traced`."""

_current = threading.local()
_starting = threading.Lock()
_started: list[Future[Any]] = []
_pending: list[Future[Any]] = []


def start_triton() -> None:
    """Starts what Triton does once in a process, beside what comes before the first kernel.

    The host's compiler builds its driver, and all of Triton, hundreds of MB, is hashed: both take a
    quarter of a second outside of Python.
    """
    with _starting:
        if _started:
            return
        pool = ThreadPoolExecutor(2)
        _started.extend((pool.submit(_build_driver), pool.submit(_hash_triton)))
        _pending.extend(_started)
        pool.shutdown(wait=False)


def _build_driver() -> None:
    from triton.runtime import driver

    _ = driver.active


def _hash_triton() -> None:
    from triton.runtime.cache import triton_key

    triton_key()


def await_triton() -> None:
    """Waits for what was started.  Where it failed, Triton does it again for a kernel, and raises there."""
    if _pending:
        wait(_pending)
        _pending.clear()


def traced() -> None:
    """Says that Python has done its part of the kernel that this thread compiles, or nearly."""
    event: threading.Event | None = getattr(_current, "event", None)
    if event is not None:
        event.set()


def compile_side_by_side(calls: Sequence[Call], device: torch.device) -> None:
    """Compiles the kernels of several launches, and what launches them, on a CUDA device.

    A first call then takes little longer than its slowest kernel.  A kernel that was compiled before
    costs what looking it up does.
    """
    if device.type != "cuda" or len(calls) < 2:
        if calls:
            await_triton()
        return
    start_triton()
    for kernel, _, _, options in calls:
        # By what its disk cache knows a kernel; two threads that find it out for functions which both
        # kernels call get other names than one, and the next process would compile once more.
        for value in (kernel, *options.values()):
            getattr(value, "cache_key", None)
    await_triton()
    # Only one thread at a time is in Python: there the longest kernels come first, one by one.
    longest = [call for call in calls if _is_long(call[0])]
    others = [call for call in calls if not _is_long(call[0])]
    events = [threading.Event() for _ in longest]

    def compile_one(index: int, call: Call) -> None:
        kernel, grid, arguments, options = call
        with torch.cuda.device(device):
            try:
                for event in events[:index]:
                    event.wait()
                _current.event = events[index] if index < len(events) else None
                compiled = kernel.warmup(*arguments, grid=grid, **options)
            finally:
                if index < len(events):
                    events[index].set()
            with _LOADING:
                # `run` builds the launcher with the host's compiler and loads it and the kernel.
                _ = compiled.run

    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(compile_one, range(len(calls)), [*longest, *others]))


def _is_long(kernel: Any) -> bool:
    return ".hopper_" in kernel.__module__ and kernel.__name__ in LONGEST
