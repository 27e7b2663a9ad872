"""When a candidate counts as faster: a test that identical programs do not win by luck.

A sample is one pair of fresh processes, candidate and incumbent, timed in turns in random order: the two
medians of a few rounds.  With

    d_s = ln(t_candidate / t_incumbent),      a success where d_s < ln(1 - margin),

an identical program succeeds with a probability of at most one half in every sample, whatever the noise looks
like, for the two could be exchanged.  (Rounds of one pair would not do: where memory happens to lie
makes a process faster for as long as it lives.)  After n samples the candidate wins if the successes are
too many for a fair coin,

    P(Binomial(n, 1/2) >= successes) <= error(n),

loses if the median is not below ln(1 - margin), and is timed on otherwise; after 8 samples it loses only
where it is far behind.  A win takes two such tests: a challenge, which sifts with n = 8, 20, 40, 80 and
errors that add up to 4.4e-3, and after judging the candidate on fresh inputs a confirmation on new
samples, with n = 13, 20, 40, 80 and 4.3e-4.  An identical program wins both with at most 2e-6.

How often that is wrong, and how often it finds a true gain: `foveal.search.simulate`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WON, LOST, OPEN = "won", "lost", "open"

Looks = tuple[tuple[int, float], ...]
"""Samples after which a test looks, and the error that it spends there."""

CHALLENGE: Looks = ((8, 4e-3), (20, 2e-4), (40, 1e-4), (80, 1e-4))
CONFIRMATION: Looks = ((8, 0.0), (13, 1.3e-4), (20, 1e-4), (40, 1e-4), (80, 1e-4))

MARGIN = 0.005
"""Share of time by which a candidate must be ahead for a sample to count."""

WORST = 0.02
"""Share of time that a candidate may lose at most on any timed case."""

_EARLY = 8
_HOPELESS = 2
"""Successes of _EARLY samples with which a candidate is given up."""


@dataclass(frozen=True)
class Decision:
    """`verdict` is WON, LOST or OPEN (more samples are needed); `gain` is 1 - t_candidate / t_incumbent."""

    verdict: str
    gain: float
    samples: int
    reason: str
    seconds: float = 0.0
    """What it took to decide."""


def decide(
    samples: Mapping[str, Sequence[float]],
    weights: Mapping[str, float] | None = None,
    looks: Looks = CONFIRMATION,
) -> Decision:
    """The decision on log ratios of all timed cases, `samples[case]` with one d_s per sample.

    Cases are joined sample by sample by their weighted mean, the logarithm of the geometric mean of the
    ratios; no case may be more than WORST slower.
    """
    count = min(len(values) for values in samples.values())
    weights = weights or {}
    total = sum(weights.get(case, 1.0) for case in samples)
    joined = [
        sum(weights.get(case, 1.0) * values[s] for case, values in samples.items()) / total
        for s in range(count)
    ]
    gain = 1 - math.exp(statistics.median(joined)) if joined else 0.0
    verdict = _look(joined, looks)
    if verdict == WON:
        for case, values in samples.items():
            lost = math.exp(statistics.median(values)) - 1
            if lost > WORST:
                return Decision(LOST, gain, count, f"{case}: {lost:.1%} slower")
    return Decision(verdict, gain, count, _sentence(verdict, gain, count))


def _look(joined: Sequence[float], looks: Looks) -> str:
    """The verdict after the samples that there are."""
    ahead = math.log1p(-MARGIN)
    for count, error in looks:
        if len(joined) < count:
            return OPEN
        part = joined[:count]
        successes = sum(d < ahead for d in part)
        if error and successes >= least_successes(count, error):
            return WON
        if count <= _EARLY:
            if successes <= _HOPELESS:
                return LOST
        elif statistics.median(part) > ahead or count == looks[-1][0]:
            return LOST
    return OPEN


def least_successes(count: int, error: float) -> int:
    """The fewest successes of `count` that a fair coin shows with probability at most `error`."""
    tail = 0.0
    for successes in range(count, -1, -1):
        tail += math.comb(count, successes) * 0.5**count
        if tail > error:
            return successes + 1
    return 0


def samples_to_next_look(count: int, looks: Looks = CONFIRMATION) -> int:
    """Samples to add before the next look; 0 when there is none."""
    return next((look - count for look, _ in looks if look > count), 0)


def _sentence(verdict: str, gain: float, count: int) -> str:
    if verdict == WON:
        return f"{gain:.1%} faster in {count} samples"
    if verdict == LOST:
        return f"not faster: {gain:+.1%} in {count} samples"
    return f"{gain:+.1%} after {count} samples, undecided"
