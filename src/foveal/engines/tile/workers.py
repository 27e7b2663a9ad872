"""Independent pieces of CPU work side by side: one thread each, in place of all threads on each.

A tile is a chain of small operations; splitting every one of them over the cores costs more in waiting
than it gains.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
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
            with torch.inference_mode(False):  # the next call may be one of training
                buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())


def _nothing(item: object, result: object) -> None:
    """The last step of pieces that need none."""


def in_order(
    items: Sequence[Item],
    work: Callable[[Item, Scratch], Result],
    finish: Callable[[Item, Result], None] = _nothing,
    each: int = 2,
) -> None:
    """Runs work(item, scratch) for every item on as many threads as PyTorch uses, then finish(item, result).

    `finish` runs item by item in their order: there goes what has to be summed in a fixed order.
    `work` runs without gradients, must not write to memory that another item writes to, and may
    return what lives in the scratch.  Fewer than `each` items per thread run one after the other.
    """
    threads = torch.get_num_threads()
    spare: list[Scratch] = []
    try:
        if threads == 1 or len(items) < each * threads:
            scratch = _borrow(spare)
            for item in items:
                finish(item, work(item, scratch))
            spare.append(scratch)
        else:
            _on_threads(items, work, finish, threads, spare)
    finally:
        for scratch in spare:
            if scratch.nbytes <= _KEPT_BYTES:
                _idle.append(scratch)


def _on_threads(
    items: Sequence[Item],
    work: Callable[[Item, Scratch], Result],
    finish: Callable[[Item, Result], None],
    threads: int,
    spare: list[Scratch],
) -> None:
    turns = _Turns()
    inference = torch.is_inference_mode_enabled()

    def run(number: int) -> None:
        scratch = _borrow(spare)
        # Modes belong to threads, and what the caller allocated in inference mode is written in it
        # only; where that mode is switched off, gradients are switched on.
        with torch.inference_mode(inference), torch.no_grad(), turns.of(number):
            result = work(items[number], scratch)
            turns.wait(number)
            finish(items[number], result)
        spare.append(scratch)

    # A team of the caller's own would take the workers' cores.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(run, range(len(items))):
                pass
    finally:
        torch.set_num_threads(threads)


class _Turns:
    """Lets numbered pieces, begun in their order, end in it.  What fails ends all behind it."""

    def __init__(self) -> None:
        self._next = 0
        self._failed = False
        self._changed = threading.Condition()

    def wait(self, number: int) -> None:
        """Returns when all pieces before this one have ended; raises CancelledError if one has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._next == number)
            if self._next != number:
                raise CancelledError

    @contextlib.contextmanager
    def of(self, number: int) -> Iterator[None]:
        """The piece, which must `wait` inside."""
        try:
            yield
        except BaseException:
            with self._changed:
                self._failed = True
                self._changed.notify_all()
            raise
        with self._changed:
            self._next = number + 1
            self._changed.notify_all()


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
