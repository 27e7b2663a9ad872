"""What moved between two runs, and whether the move is more than noise.

A pass of a competitor on a case has *moved* when two things hold: the two-sided Mann-Whitney U
test on the raw samples of both runs gives p < 0.01, and the medians differ by more than the
threshold (5 % unless told otherwise).  The test asks only whether samples of one run tend to be
larger, so neither outliers nor the shape of the distribution matter; the threshold keeps
differences quiet that are certain but do not matter.  Fewer than 5 samples on a side cannot reach
p < 0.01 and are reported as too few.  Runs on machines of another name are compared but said so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from foveal.bench.measure import PASSES, summarise
from foveal.bench.record import Record

SIGNIFICANCE = 0.01
LEAST_SAMPLES = 5

SLOWER, FASTER, SAME, TOO_FEW = "slower", "faster", "same", "too few samples"


@dataclass(frozen=True)
class Change:
    """One pass of one competitor on one case in two runs; times are medians in seconds."""

    case: str
    competitor: str
    part: str
    old: float
    new: float
    p_value: float
    verdict: str

    @property
    def factor(self) -> float:
        """New time over old time."""
        return self.new / self.old

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"factor": self.factor}


def compare(old: Sequence[Record], new: Sequence[Record], threshold: float = 0.05) -> list[Change]:
    """Changes of everything that both runs measured, in the order of the new run."""
    before = {(record.key, record.competitor): record for record in old}
    changes = []
    for record in new:
        counterpart = before.get((record.key, record.competitor))
        if counterpart is None:
            continue
        for part in PASSES:
            if part in record.samples and part in counterpart.samples:
                changes.append(_change(record, counterpart, part, threshold))
    return changes


def other_machine(old: Sequence[Record], new: Sequence[Record]) -> str | None:
    """A sentence when the runs come from different machines or library versions."""
    differing = [
        f"{name} ({was} and {now})"
        for name in ("device_name", "torch")
        for was, now in [(_values(old, name), _values(new, name))]
        if was != now
    ]
    return f"the runs differ in {' and '.join(differing)}" if differing else None


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value that a and b come from one distribution.

    Exact by counting arrangements where no two samples are equal, else the normal
    approximation with corrections for ties and continuity.
    """
    n, m = len(a), len(b)
    pooled = sorted([*a, *b])
    u = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
    if len(set(pooled)) == n + m:
        counts = _arrangements(n, m)
        tail = sum(counts[: round(min(u, n * m - u)) + 1])
        return min(1.0, 2 * tail / sum(counts))
    ties = sum(t**3 - t for t in (pooled.count(value) for value in set(pooled)))
    variance = n * m / 12 * (n + m + 1 - ties / ((n + m) * (n + m - 1)))
    if variance <= 0:
        return 1.0
    distance = max(abs(u - n * m / 2) - 0.5, 0.0)
    return math.erfc(distance / math.sqrt(2 * variance))


def _arrangements(n: int, m: int) -> list[int]:
    """How many orders of n and m samples give U = 0, 1, ..., n m: a Gaussian binomial."""
    counts = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for u in range(n * m, m + i - 1, -1):
            counts[u] -= counts[u - m - i]
        for u in range(i, n * m + 1):
            counts[u] += counts[u - i]
    return counts


def _change(new: Record, old: Record, part: str, threshold: float) -> Change:
    was, now = old.samples[part], new.samples[part]
    before, after = summarise(was).median, summarise(now).median
    p_value = mann_whitney(was, now)
    if min(len(was), len(now)) < LEAST_SAMPLES:
        verdict = TOO_FEW
    elif p_value >= SIGNIFICANCE or abs(after / before - 1) <= threshold:
        verdict = SAME
    else:
        verdict = SLOWER if after > before else FASTER
    return Change(new.name, new.competitor, part, before, after, p_value, verdict)


def _values(records: Sequence[Record], name: str) -> str:
    return ", ".join(sorted({str(record.environment.get(name, "")) for record in records}))
