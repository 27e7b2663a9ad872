"""The point that a Gaussian process expects to gain most from, per second of judging it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.search.acceptance import MARGIN
from foveal.search.archive import Entry
from foveal.search.candidate import Candidate, Proposal
from foveal.search.gaussian import (
    Hyper,
    Posterior,
    expected_improvement,
    sample_hypers,
)
from foveal.search.operators.base import View, faster_first
from foveal.search.prior import guess
from foveal.search.space import Space, Value

_FEWEST = 3
_POOL = 1000
_FANTASIES = 16
_MOST = 300
_UNKNOWN = 0.25
"""Share of the variance of a guess that a kernel is taken to differ by before enough of it was timed."""


class Bayes:
    """Expected improvement per second, averaged over hyper-parameters and over what is pending.

    Where nothing is known of kindred kernels the first points are drawn at random, else the process is
    one of the difference to what those let expect.  Points that failed lower the chance of success near
    them; candidates with a text of their own, which the space does not describe, are left out.
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
        if len(timed) < (1 if view.known else _FEWEST):
            return Proposal(Candidate(source.choice(pool)), self.name, note="one of the first")
        generator = torch.Generator().manual_seed(source.getrandbits(63))
        kept = timed[-_MOST:]
        data = _data(view, [e.candidate.params for e in kept])
        pending = _data(view, [e.candidate.params for e in view.pending if not e.candidate.text])
        points = _data(view, pool)
        y = torch.tensor([-math.log(_speedup(e)) for e in kept], dtype=torch.float64) - data.guess
        if len(timed) < _FEWEST:
            spread = _UNKNOWN * float(points.guess.var(unbiased=False)) + 1e-6
            hypers = [_middle(data.x, spread, 0.02 * spread, float(y.mean()))]
        else:
            hypers = sample_hypers(data.x, y, generator)
        hope = improvement(data, y, points, pending, hypers, generator)
        passes = _feasible(space, judged, points.x)
        value = hope.gain * passes / _seconds(space, judged, points.x)
        best = int(value.argmax())
        return Proposal(
            Candidate(pool[best]),
            self.name,
            note=f"expects {float(hope.gain[best]):.2%} of time",
            chance=float(hope.chance[best] * passes[best]),
        )


@dataclass(frozen=True)
class Data:
    """Encoded points x [N, D], and what is expected of them before anything is timed [N]."""

    x: Tensor
    guess: Tensor

    def and_(self, other: Data) -> Data:
        """These points and others."""
        return Data(torch.cat((self.x, other.x)), torch.cat((self.guess, other.guess)))


@dataclass(frozen=True)
class Hope:
    """Expected improvement of points [P], and their chance to be ahead by more than the margin [P]."""

    gain: Tensor
    chance: Tensor


def improvement(
    data: Data,
    y: Tensor,
    points: Data,
    pending: Data,
    hypers: Sequence[Hyper],
    source: torch.Generator,
) -> Hope:
    """What to hope for at P points, averaged over hyper-parameters and fantasies of J pending points.

    y [N]: observations less the guess at their points.
    """
    gain = torch.zeros(len(points.x), dtype=torch.float64)
    chance = torch.zeros_like(gain)
    for hyper in hypers:
        posterior = Posterior(data.x, y, hyper)
        best = (posterior.at(data.x)[0][:, 0] + data.guess).min().reshape(1)  # [S]
        known = y[:, None]
        seen = data
        if len(pending.x):
            drawn = posterior.draw(pending.x, _FANTASIES, source)  # [J, S]
            seen, known = data.and_(pending), torch.cat((known.expand(-1, _FANTASIES), drawn))
            posterior = Posterior(seen.x, known, hyper)
            best = torch.minimum((drawn + pending.guess[:, None]).amin(0), best)
        mean, deviation = posterior.at(points.x)
        mean, deviation = mean + points.guess[:, None], deviation[:, None]
        gain += expected_improvement(mean, deviation, best).mean(1)
        chance += torch.special.ndtr((best - MARGIN - mean) / deviation).mean(1)
    return Hope(gain / len(hypers), chance / len(hypers))


def _data(view: View, points: Sequence[Mapping[str, Value]]) -> Data:
    space = view.task.space
    x = _encoded(space, points)
    if not view.known or not points:
        return Data(x, torch.zeros(len(x), dtype=torch.float64))
    return Data(x, guess(view.known, [space.traits(point) for point in points]))


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
    return Posterior(x, y, _middle(x, spread, 0.1 * spread + 1e-6, float(y.mean())))


def _middle(x: Tensor, spread: float, noise: float, mean: float) -> Hyper:
    """Lengths as in the middle of their priors."""
    return Hyper(torch.full((x.shape[1],), 0.5, dtype=torch.float64), spread, noise, mean)


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
