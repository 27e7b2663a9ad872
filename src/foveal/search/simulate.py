"""How often the acceptance test is wrong, and how often it finds a true gain, by simulation.

A noise is drawn from recorded pairs of identical programs, in blocks of neighbours so that its dependence in
time stays; or from a model: jitter of every sample, a bias of every process, and bursts of other work.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveal.search.acceptance import CHALLENGE, CONFIRMATION, OPEN, WON, Looks, decide

Noise = Callable[[int, random.Random], list[float]]
"""noise(samples, source): log ratios of two identical programs, sample by sample."""

_BLOCK = 8


@dataclass(frozen=True)
class Rates:
    """Share of simulated candidates that won, and samples that were needed on average."""

    wins: float
    samples: float
    trials: int


def recorded(pairs: Sequence[float]) -> Noise:
    """Noise from recorded log ratios: blocks of neighbours, which program came first at random."""

    def noise(samples: int, source: random.Random) -> list[float]:
        found: list[float] = []
        while len(found) < samples:
            start = source.randrange(max(len(pairs) - _BLOCK, 1))
            block = pairs[start : start + _BLOCK]
            found += [source.choice((-1, 1)) * d for d in block]
        return found[:samples]

    return noise


def modelled(
    jitter: float = 0.01, bias: float = 0.01, bursts: float = 0.05, height: float = 0.5
) -> Noise:
    """Normal jitter and bias of both processes of a pair; bursts that hit one of the two."""

    def noise(samples: int, source: random.Random) -> list[float]:
        found = []
        for _ in range(samples):
            d = source.gauss(0, math.hypot(jitter, bias) * math.sqrt(2))
            if source.random() < bursts:
                d += source.choice((-1, 1)) * source.expovariate(1 / height)
            found.append(d)
        return found

    return noise


def rates(noise: Noise, gain: float, trials: int, seed: int = 0, confirmed: bool = True) -> Rates:
    """Wins of candidates whose true time is (1 - gain) of the incumbent's.

    confirmed: by both tests, as a search accepts them; else by the confirmation alone.
    """
    source = random.Random(seed)
    wins = samples = 0
    for _ in range(trials):
        won = True
        for looks in (CHALLENGE, CONFIRMATION) if confirmed else (CONFIRMATION,):
            won, used = _trial(noise, gain, source, looks)
            samples += used
            if not won:
                break
        wins += won
    return Rates(wins / trials, samples / trials, trials)


def _trial(noise: Noise, gain: float, source: random.Random, looks: Looks) -> tuple[bool, int]:
    whole = [d + math.log1p(-gain) for d in noise(looks[-1][0], source)]
    for look, _ in looks:
        decision = decide({"": whole[:look]}, looks=looks)
        if decision.verdict != OPEN:
            return decision.verdict == WON, look
    return False, looks[-1][0]
