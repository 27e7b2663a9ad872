"""What an operator sees, and how it chooses a parent."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from foveal.search.archive import QUEUED, RUNNING, Archive, Entry
from foveal.search.candidate import Candidate, Cell, Proposal
from foveal.search.prior import Known
from foveal.search.task import Task

EXPLORE = 0.2
"""Share of parents that are drawn from all cells alike."""


@dataclass(frozen=True)
class View:
    """A task and everything that is known about it; `known`: of kindred kernels, from before."""

    task: Task
    archive: Archive
    known: tuple[Known, ...] = ()

    @property
    def judged(self) -> list[Entry]:
        return self.archive.entries(evaluated=True)

    @property
    def pending(self) -> list[Entry]:
        return [e for e in self.archive.entries() if e.status in (QUEUED, RUNNING)]

    def new(self, candidate: Candidate) -> bool:
        """Whether nobody proposed it before."""
        return not self.archive.knows(candidate.id)

    def parent(self, source: random.Random) -> Entry | None:
        """A candidate of the archive: from any cell, or the likelier the faster it is."""
        elites = [e for e in self.archive.elites().values() if e.evaluation is not None]
        champion = self.archive.champion()
        if not elites:
            return champion
        if source.random() < EXPLORE:
            return source.choice(elites)
        weights = [
            0.7 * (e.evaluation.speedup or 1e-9)
            + 0.3 * success_rate(self.archive, e.evaluation.cell)
            for e in elites
            if e.evaluation is not None
        ]
        if champion is not None and source.random() < 0.5:
            return champion
        return source.choices(elites, weights)[0]


class Operator(Protocol):
    """Makes candidates; `name` is what the archive remembers it by."""

    name: str

    def propose(self, view: View, source: random.Random) -> Proposal | None:
        """A new candidate, or None when it has no idea."""
        ...


def success_rate(archive: Archive, cell: Cell | None) -> float:
    """Share of children of a cell that were faster than their parent; 0.5 where there are none."""
    steps = [t for t in archive.transitions() if t["parent"] == cell]
    return sum(t["won"] for t in steps) / len(steps) if steps else 0.5


def drift(archive: Archive, cell: Cell, now: float) -> tuple[float, float, float, float]:
    """Per dimension of cells, the direction in which steps out of a cell gained: -1 to 1 about.

    F_d = sum(w sign(step_d) gain) / sum(w |gain|) over departures with a step in d; w = 0.95^(hours ago).
    """
    found = []
    for axis in range(4):
        total = weight = 0.0
        for step in archive.transitions():
            if step["parent"] != cell or step["child"] is None:
                continue
            move = step["child"][axis] - cell[axis]
            if move:
                decay = 0.95 ** ((now - step["at"]) / 3600)
                total += decay * math.copysign(1, move) * step["gain"]
                weight += decay * abs(step["gain"])
        found.append(total / weight if weight else 0.0)
    a, b, c, d = found
    return a, b, c, d


def faster_first(entries: Sequence[Entry]) -> list[Entry]:
    """Those that were timed, fastest first."""
    timed = [e for e in entries if e.evaluation is not None and e.evaluation.speedup is not None]
    return sorted(timed, key=lambda e: -(e.evaluation.speedup or 0.0) if e.evaluation else 0.0)
