"""Independent pieces of CPU work side by side: one thread each, in place of all threads on each.

A tile is a chain of small operations; splitting every one of them over the cores costs more in waiting
than it gains.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")

# Of one thread's buffers between calls; larger ones are given back.
_KEPT_BYTES = 16 << 20
_idle: list[Scratch] = []


class Scratch:
    """Named buffers that the pieces use in turn: fresh memory costs a page fault every 4 KiB."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._last: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Unwritten CPU memory of this shape; it overwrites what was last taken under the name."""
        last = self._last.get((name, dtype))
        if last is None or last.shape != shape:
            last = self._last[name, dtype] = self._view(name, shape, dtype)
        return last

    def _view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())


def in_order(items: Sequence[Item], work: Callable[[Item, Scratch], Result]) -> Iterator[Result]:
    """Yields work(item, scratch) for every item in order, on as many threads as PyTorch uses.

    `work` runs without gradients and must not write to memory that another item writes to; what has
    to be summed in a fixed order is returned, may live in the scratch, and is summed by the caller
    before it asks for the next result.
    """
    threads = torch.get_num_threads()
    spare: list[Scratch] = []
    try:
        if threads == 1 or len(items) < 2 * threads:
            scratch = _borrow(spare)
            for item in items:
                yield work(item, scratch)
            spare.append(scratch)
        else:
            yield from _on_threads(items, work, threads, spare)
    finally:
        for scratch in spare:
            if scratch.nbytes <= _KEPT_BYTES:
                _idle.append(scratch)


def _on_threads(
    items: Sequence[Item],
    work: Callable[[Item, Scratch], Result],
    threads: int,
    spare: list[Scratch],
) -> Iterator[Result]:
    def alone(item: Item, scratch: Scratch) -> Result:
        with torch.no_grad():
            return work(item, scratch)

    # The caller sums results meanwhile; a team of its own would take the workers' cores.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            running: deque[tuple[Scratch, Future[Result]]] = deque()
            for item in items:
                if len(running) > threads:
                    yield from _first(running, spare)
                scratch = _borrow(spare)
                running.append((scratch, pool.submit(alone, item, scratch)))
            while running:
                yield from _first(running, spare)
    finally:
        torch.set_num_threads(threads)


def _first(
    running: deque[tuple[Scratch, Future[Result]]], spare: list[Scratch]
) -> Iterator[Result]:
    scratch, future = running.popleft()
    yield future.result()
    spare.append(scratch)


def _borrow(spare: list[Scratch]) -> Scratch:
    for pool in (spare, _idle):
        try:
            return pool.pop()
        except IndexError:
            continue
    return Scratch()


def release() -> None:
    """Gives back the memory that is kept between calls."""
    _idle.clear()
