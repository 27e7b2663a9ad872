"""Random points, mutation and crossover of parameters."""

from __future__ import annotations

import random
from collections.abc import Mapping

from foveal.search.candidate import Candidate, Proposal
from foveal.search.operators.base import View
from foveal.search.space import Space, Value

_TRIES = 40


class Draw:
    """A random point of the space."""

    name = "random"

    def propose(self, view: View, source: random.Random) -> Proposal | None:
        if not view.task.space.params:
            return None
        for _ in range(_TRIES):
            candidate = Candidate(view.task.space.draw(source))
            if view.new(candidate):
                return Proposal(candidate, self.name)
        return None


class Mutate:
    """Some parameters of a parent, one step or two: m of them with a probability of 2^-m."""

    name = "mutation"

    def propose(self, view: View, source: random.Random) -> Proposal | None:
        parent = view.parent(source)
        space = view.task.space
        if parent is None or not space.params:
            return None
        for _ in range(_TRIES):
            params = space.clean(_mutated(space, parent.candidate.params, source))
            candidate = Candidate(params, parent.candidate.text)
            if space.valid(params) and view.new(candidate):
                return Proposal(
                    candidate, self.name, (parent.id,), _changes(parent.candidate, params)
                )
        return None


class Crossover:
    """Each parameter from one of two elites of different cells."""

    name = "crossover"

    def propose(self, view: View, source: random.Random) -> Proposal | None:
        elites = list(view.archive.elites().values())
        space = view.task.space
        if len(elites) < 2 or not space.params:
            return None
        for _ in range(_TRIES):
            first, second = source.sample(elites, 2)
            mixed = {
                param.name: source.choice((first, second)).candidate.params[param.name]
                for param in space.params
            }
            params = space.clean(mixed)
            candidate = Candidate(params, first.candidate.text)
            if space.valid(params) and view.new(candidate):
                return Proposal(candidate, self.name, (first.id, second.id))
        return None


def _mutated(space: Space, params: Mapping[str, Value], source: random.Random) -> dict[str, Value]:
    count = 1
    while count < len(space.params) and source.random() < 0.5:
        count += 1
    found = dict(params)
    for param in source.sample(space.params, count):
        place = param.values.index(found[param.name])
        if param.ordered:
            step = source.choice((-1, 1)) * (1 if source.random() < 0.8 else 2)
            place = min(max(place + step, 0), len(param.values) - 1)
        else:
            place = source.randrange(len(param.values))
        found[param.name] = param.values[place]
    return found


def _changes(parent: Candidate, params: Mapping[str, Value]) -> str:
    return ", ".join(
        f"{name}: {parent.params[name]} to {value}"
        for name, value in params.items()
        if parent.params[name] != value
    )
