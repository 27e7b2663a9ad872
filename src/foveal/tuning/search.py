"""Refines the sizes of the portable tile kernels on one device, within a time budget.

The order is fixed and every measurement is stored at once: a search that is interrupted, by its budget
or by hand, goes on where it stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from foveal.tuning import tile
from foveal.tuning.config import Config
from foveal.tuning.store import Measured, Store
from foveal.tuning.tile import BACKWARD_KV, BACKWARD_Q, FORWARD

_GAIN = 0.02
"""Share by which sizes must beat the shipped ones, in a measurement of both in turns, to go before them."""
_ROUNDS = 3


@dataclass(frozen=True)
class Kernel:
    """A kernel that is tuned by itself: its stage, the largest head_dim and the data type."""

    stage: str
    dim: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return tile.kernel_name(self.stage, self.dim, self.dtype)


@dataclass(frozen=True)
class Outcome:
    """What is known of a kernel: sizes shipped and chosen, and their seconds; chosen None: not yet."""

    kernel: str
    shipped: Config
    chosen: Config | None
    seconds: float
    shipped_seconds: float
    tried: int
    candidates: int


Measure = Callable[[Kernel, Config], float]
"""Seconds that a kernel takes with these sizes; inf where it does not run or is wrong."""
Report = Callable[[str, float], None]


def kernels() -> Iterator[Kernel]:
    """All that can be tuned, most used first."""
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (128, 64, 256):
            for stage in (FORWARD, BACKWARD_KV, BACKWARD_Q):
                yield Kernel(stage, dim, dtype)


def candidates(kernel: Kernel, shipped: Config) -> list[Config]:
    """Sizes worth a try, the shipped ones first, the likely ones early."""
    sides: tuple[tuple[int, int], ...]
    sides = ((128, 64), (64, 128), (64, 64), (128, 128), (128, 32), (32, 128), (64, 32), (32, 64))
    if kernel.dim > 128 or kernel.dtype == torch.float32:
        sides = ((64, 32), (32, 32), (32, 64), (64, 64), (16, 64), (128, 32), (16, 32))
    made = [
        Config(queries, keys, warps, stages)
        for queries, keys in sides
        for warps, stages in ((8, 2), (8, 3), (4, 2), (4, 3), (8, 1), (4, 1))
        if 2048 <= queries * keys * 8 // warps <= 32768
    ]
    return [shipped, *(config for config in made if config != shipped)]


def refine(
    store: Store,
    architecture: str,
    measure: Measure,
    budget: float,
    report: Report,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Measures candidates of one kernel after another for `budget` seconds; returns all that is known.

    Candidates that are in the store already are not measured again.
    """
    start = clock()
    outcomes = []
    for kernel in kernels():
        shipped = tile.shipped(kernel.stage, architecture, kernel.dim, kernel.dtype)
        tries = candidates(kernel, shipped)
        found = store.read().get(kernel.name, Measured(None, {}))
        seconds = dict(found.seconds)
        chosen = found.config
        for config in tries:
            if chosen is not None or clock() - start > budget:
                break
            if config in seconds:
                continue
            report(f"{kernel.name}: {config}", (clock() - start) / budget)
            seconds[config] = measure(kernel, config)
            store.add(kernel.name, {config: seconds[config]}, None)
        if chosen is None and all(config in seconds for config in tries):
            chosen = _choose(kernel, shipped, seconds, measure)
            store.add(kernel.name, {}, chosen)
        if seconds:
            best = min(seconds.values()) if chosen is None else seconds[chosen]
            kept = seconds.get(shipped, math.inf)
            outcomes.append(
                Outcome(kernel.name, shipped, chosen, best, kept, len(seconds), len(tries))
            )
    return outcomes


def _choose(
    kernel: Kernel, shipped: Config, seconds: dict[Config, float], measure: Measure
) -> Config:
    """The fastest, if it also beats the shipped sizes when both run in turns; else the shipped."""
    best = min(seconds, key=lambda config: seconds[config])
    if best == shipped:
        return shipped
    pairs = [(measure(kernel, best), measure(kernel, shipped)) for _ in range(_ROUNDS)]
    gains = sorted(1 - ours / theirs if math.isfinite(theirs) else 1.0 for ours, theirs in pairs)
    return best if gains[_ROUNDS // 2] > _GAIN else shipped
