"""Independent pieces of CPU work side by side: one thread each, in place of all threads on each.

A tile is a chain of small operations; splitting every one of them over the cores costs more in waiting
than it gains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(items: Sequence[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """Yields work(item) for every item in order, computed on as many threads as PyTorch uses.

    `work` runs without gradients and must not write to memory that another item writes to; what has
    to be summed in a fixed order is returned and summed by the caller.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2 * threads:
        yield from map(work, items)
        return

    def alone(item: Item) -> Result:
        with torch.no_grad():
            return work(item)

    # The caller sums results meanwhile; a team of its own would take the workers' cores.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(alone, items)
    finally:
        torch.set_num_threads(threads)
