"""Which of several computations to work on next: the one that makes the whole faster soonest.

A part that takes the share p_i of the time of a model and becomes s_i times as fast makes the whole

    S = 1 / (1 - sum_i p_i (1 - 1 / s_i))

times as fast (Amdahl's law).  Paper: AutoKernel: Autonomous GPU Kernel Optimization via Iterative
Agent-Driven Search, 2026, arXiv 2603.21331.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.autograd import profiler

REJECTED_IN_A_ROW = 5
"""Candidates that were not accepted, one after the other, after which a part is left alone."""

ENOUGH = 0.9
"""Share of what the device allows at which a part is left alone."""


@dataclass(frozen=True)
class Part:
    """A part of a model.

    share: of the time of the whole; speedup: what was reached; hoped: what a search may still make of it,
    in all; hours: what that may take; rejected: candidates in a row; of_roofline: share of what the device
    allows.
    """

    name: str
    share: float
    speedup: float = 1.0
    hoped: float = 2.0
    hours: float = 1.0
    rejected: int = 0
    of_roofline: float = 0.0

    @property
    def worth_it(self) -> bool:
        return (
            self.rejected < REJECTED_IN_A_ROW
            and self.of_roofline < ENOUGH
            and self.hoped > self.speedup
        )


def whole(parts: Sequence[Part]) -> float:
    """How many times as fast the whole is; what is in no part stays as it was."""
    return 1 / (1 - sum(part.share * (1 - 1 / part.speedup) for part in parts))


def ranked(parts: Sequence[Part]) -> list[Part]:
    """Parts that are worth more work, the one with the largest gain of the whole per hour first."""
    now = whole(parts)

    def gain(part: Part) -> float:
        then = 1 / (1 / now - part.share * (1 / part.speedup - 1 / part.hoped))
        return (then - now) / part.hours

    return sorted((part for part in parts if part.worth_it), key=gain, reverse=True)


def profiled(run: Callable[[], object], warm_up: int = 1) -> list[Part]:
    """The operators of a computation by their share of its time on the CPU, largest first."""
    for _ in range(warm_up):
        run()
    with profiler.profile() as record:
        run()
    own = {
        event.key.removeprefix("aten::"): event.self_cpu_time_total
        for event in record.key_averages()
        if event.key.startswith("aten::")
    }
    total = sum(own.values()) or 1.0
    parts = [Part(name, seconds / total) for name, seconds in own.items()]
    return sorted(parts, key=lambda part: part.share, reverse=True)


def work_down(
    parts: Sequence[Part],
    improve: Callable[[Part, float], Part],
    seconds: float,
    slice_seconds: float = 300.0,
    clock: Callable[[], float] = time.monotonic,
) -> list[Part]:
    """Works on the part that is worth most, for a slice of time, again and again; returns all parts.

    improve(part, seconds) searches one part and returns it as it is then (speedup, rejected, of_roofline);
    ends after `seconds`, or when no part is worth more work.
    """
    end = clock() + seconds
    known = {part.name: part for part in parts}
    while True:
        left = end - clock()
        order = ranked(list(known.values()))
        if left <= 0 or not order:
            return list(known.values())
        known[order[0].name] = improve(order[0], min(slice_seconds, left))
