"""The point that a Gaussian process expects to gain most from, per second of judging it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from foveal.search.archive import Entry
from foveal.search.candidate import Candidate, Proposal
from foveal.search.gaussian import (
    Hyper,
    Posterior,
    expected_improvement,
    sample_hypers,
)
from foveal.search.operators.base import View, faster_first
from foveal.search.space import Space, Value

_FEWEST = 3
_POOL = 1000
_FANTASIES = 16
_MOST = 300


class Bayes:
    """Expected improvement per second, averaged over hyper-parameters and over what is pending.

    The first points are drawn at random.  Points that failed lower the chance of success near them;
    candidates with a text of their own, which the space does not describe, are left out.
    """

    name = "bayes"

    def propose(self, view: View, source: random.Random) -> Proposal | None:
        space = view.task.space
        if not space.params:
            return None
        judged = [e for e in view.judged if e.candidate.text is None]
        timed = [e for e in judged if e.evaluation and e.evaluation.speedup]
        pool = _pool(view, timed, source)
        if not pool:
            return None
        if len(timed) < _FEWEST:
            return Proposal(Candidate(source.choice(pool)), self.name, note="one of the first")
        generator = torch.Generator().manual_seed(source.getrandbits(63))
        kept = timed[-_MOST:]
        x = _encoded(space, [e.candidate.params for e in kept])
        y = torch.tensor([-math.log(_speedup(e)) for e in kept], dtype=torch.float64)
        points = _encoded(space, pool)
        pending = _encoded(
            space, [e.candidate.params for e in view.pending if e.candidate.text is None]
        )
        hypers = sample_hypers(x, y, generator)
        gain = improvement(x, y, points, pending, hypers, generator)
        value = gain * _feasible(space, judged, points) / _seconds(space, judged, points)
        best = int(value.argmax())
        note = f"expects {float(gain[best]):.2%} of time"
        return Proposal(Candidate(pool[best]), self.name, note=note)


def improvement(
    x: Tensor,
    y: Tensor,
    points: Tensor,
    pending: Tensor,
    hypers: Sequence[Hyper],
    source: torch.Generator,
) -> Tensor:
    """EI at points [P], averaged over hyper-parameters and fantasies of pending points [J, D]."""
    total = torch.zeros(len(points), dtype=torch.float64)
    for hyper in hypers:
        posterior = Posterior(x, y, hyper)
        best = float(posterior.at(x)[0].min())
        if not len(pending):
            mean, deviation = posterior.at(points)
            total += expected_improvement(mean[:, 0], deviation, best)
            continue
        drawn = posterior.draw(pending, _FANTASIES, source)  # [J, S]
        known = torch.cat((y[:, None].expand(-1, _FANTASIES), drawn))
        mean, deviation = Posterior(torch.cat((x, pending)), known, hyper).at(points)
        lowest = drawn.amin(0).clamp(max=best)  # [S]
        total += expected_improvement(mean, deviation[:, None], lowest).mean(1)
    return total / len(hypers)


def _pool(view: View, timed: Sequence[Entry], source: random.Random) -> list[dict[str, Value]]:
    """Valid points that nobody proposed: all of a small space, else random ones and neighbours."""
    space = view.task.space
    points: list[dict[str, Value]]
    if space.size <= _POOL:
        points = list(space.points())
    else:
        points = [space.draw(source) for _ in range(_POOL)]
        for entry in faster_first(timed)[:10]:
            for near in space.neighbours(entry.candidate.params):
                points += [near, *space.neighbours(near)]
    unique = {Candidate(point).id: point for point in points}
    return [point for key, point in unique.items() if not view.archive.knows(key)]


def _encoded(space: Space, points: Sequence[object]) -> Tensor:
    width = len(space.encode(space.first))
    rows = [space.encode(point) for point in points]  # type: ignore[arg-type]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), width)


def _speedup(entry: Entry) -> float:
    assert entry.evaluation is not None
    return entry.evaluation.speedup or 1.0


def _smooth(x: Tensor, y: Tensor) -> Posterior:
    """A process with the hyper-parameters in the middle of their priors."""
    spread = float(y.var(unbiased=False)) + 1e-6
    lengths = torch.full((x.shape[1],), 0.5, dtype=torch.float64)
    return Posterior(x, y, Hyper(lengths, spread, 0.1 * spread + 1e-6, float(y.mean())))


def _feasible(space: Space, judged: Sequence[Entry], points: Tensor) -> Tensor:
    """The chance that a point passes: Phi of a regression on what passed (1) and failed (-1)."""
    labels = [1.0 if e.evaluation and e.evaluation.ok else -1.0 for e in judged]
    if min(labels) > 0:
        return torch.ones(len(points), dtype=torch.float64)
    x = _encoded(space, [e.candidate.params for e in judged])
    mean, deviation = _smooth(x, torch.tensor(labels, dtype=torch.float64)).at(points)
    chance: Tensor = torch.special.ndtr(2 * mean[:, 0] / (1 + deviation.square()).sqrt())
    return chance.clamp(min=0.01)


def _seconds(space: Space, judged: Sequence[Entry], points: Tensor) -> Tensor:
    """What judging a point will take."""
    costs = [math.log(max(e.evaluation.seconds, 1e-3)) for e in judged if e.evaluation]
    x = _encoded(space, [e.candidate.params for e in judged if e.evaluation])
    mean, _ = _smooth(x, torch.tensor(costs, dtype=torch.float64)).at(points)
    return mean[:, 0].exp()
