"""What a search may choose: named parameters, the points that they span, and steps between points."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveal._errors import TaskError

Value = int | float | str | bool
Point = Mapping[str, Value]

_MOST_LISTED = 50_000
_TRIES = 1000


@dataclass(frozen=True)
class Param:
    """A parameter with written-out values.

    Options: ordered: whether neighbours in the list are alike (sizes are, names are not);
    needs: (name, values) of a parameter that decides whether this one counts at all;
    begins: the value that a search starts with (None: the first one).
    """

    name: str
    values: tuple[Value, ...]
    ordered: bool = False
    needs: tuple[str, tuple[Value, ...]] | None = None
    begins: Value | None = None

    @property
    def start(self) -> Value:
        return self.values[0] if self.begins is None else self.begins

    def active(self, point: Point) -> bool:
        return self.needs is None or point[self.needs[0]] in self.needs[1]


def powers(name: str, low: int, high: int, begins: Value | None = None, needs: Any = None) -> Param:
    """Powers of two, low <= 2^n <= high."""
    first, last = round(math.log2(low)), round(math.log2(high))
    return Param(name, tuple(2**n for n in range(first, last + 1)), True, needs, begins)


def steps(name: str, *values: Value, begins: Value | None = None, needs: Any = None) -> Param:
    """Values in an order in which neighbours are alike."""
    return Param(name, values, True, needs, begins)


def choice(name: str, *values: Value, needs: Any = None) -> Param:
    """One of several values that have no order."""
    return Param(name, values, False, needs)


def flag(name: str, needs: Any = None) -> Param:
    """A switch."""
    return Param(name, (False, True), False, needs)


@dataclass(frozen=True)
class Space:
    """The points of some parameters that satisfy `allows`.

    A parameter that does not count at a point has its starting value there, so that two points never
    describe one candidate.
    """

    params: tuple[Param, ...] = ()
    allows: Callable[[Point], bool] = lambda point: True
    means: Callable[[Point], Sequence[float]] | None = None
    """Traits of a point that its author wrote down: see `traits`."""

    @staticmethod
    def of(entries: Mapping[str, Sequence[Value]]) -> Space:
        """A space from {name: values}; numbers are taken as ordered.  Raises TaskError."""
        params = []
        for name, values in entries.items():
            if not isinstance(values, (list, tuple)) or not values:
                raise TaskError(f"SPACE[{name!r}]: got {values!r}; a list of values is needed")
            if not all(isinstance(value, (int, float, str, bool)) for value in values):
                raise TaskError(f"SPACE[{name!r}]: got {values!r}; numbers or texts are needed")
            numbers = all(type(value) in (int, float) for value in values)
            params.append(Param(name, tuple(values), numbers))
        return Space(tuple(params))

    @property
    def first(self) -> dict[str, Value]:
        """The point that a search starts with."""
        return {param.name: param.start for param in self.params}

    def clean(self, point: Point) -> dict[str, Value]:
        """The same candidate, written in the one way: parameters that do not count as at the start."""
        found = dict(self.first)
        for param in self.params:
            if param.name in point and param.active({**found, **point}):
                found[param.name] = point[param.name]
        return found

    def valid(self, point: Point) -> bool:
        known = all(point.get(param.name) in param.values for param in self.params)
        return known and self.allows(point)

    @property
    def size(self) -> int:
        """Points before `allows` and before inactive parameters are merged."""
        return math.prod(len(param.values) for param in self.params)

    def points(self) -> Iterator[dict[str, Value]]:
        """All valid points, each once; for spaces of at most 50,000."""
        if self.size > _MOST_LISTED:
            raise ValueError(f"size: got {self.size}; at most {_MOST_LISTED} points are listed")
        names = [param.name for param in self.params]
        seen = set()
        for values in itertools.product(*(param.values for param in self.params)):
            point = self.clean(dict(zip(names, values, strict=True)))
            key = tuple(point.values())
            if key not in seen and self.valid(point):
                seen.add(key)
                yield point

    def draw(self, source: random.Random) -> dict[str, Value]:
        """A random valid point."""
        for _ in range(_TRIES):
            point = self.clean({param.name: source.choice(param.values) for param in self.params})
            if self.valid(point):
                return point
        raise TaskError(f"space: {_TRIES} random points were all invalid; a larger share is needed")

    def neighbours(self, point: Point) -> list[dict[str, Value]]:
        """Valid points that differ in one parameter: by one step where it is ordered."""
        found = []
        for param in self.params:
            if not param.active(point):
                continue
            place = param.values.index(point[param.name])
            near: Sequence[int] = (
                (place - 1, place + 1) if param.ordered else range(len(param.values))
            )
            for other in near:
                if other != place and 0 <= other < len(param.values):
                    moved = self.clean({**point, param.name: param.values[other]})
                    if self.valid(moved):
                        found.append(moved)
        return found

    def encode(self, point: Point) -> list[float]:
        """Coordinates in [0, 1]: the place of an ordered value, one per value of others."""
        found: list[float] = []
        for param in self.params:
            active = param.active(point)
            if param.ordered or len(param.values) <= 2:
                last = max(len(param.values) - 1, 1)
                found.append(param.values.index(point[param.name]) / last if active else 0.5)
            else:
                found += [float(point[param.name] == v) if active else 0.5 for v in param.values]
        return found

    def traits(self, point: Point) -> list[float]:
        """What a point means for any kernel with such parameters, by which kindred ones are compared.

        Coordinates in which times are alike within a distance of about 1: a third of the octaves of a
        size, less than half of the steps of other values that are in order.
        """
        if self.means is not None:
            return list(self.means(point))
        found: list[float] = []
        for param in self.params:
            value = point[param.name]
            if param.ordered:
                size = isinstance(value, (int, float)) and value > 0 and len(param.values) > 1
                octaves = size and all(v == 2 ** round(math.log2(v)) for v in _numbers(param))
                place = param.values.index(value)
                found.append(math.log2(float(value)) / 3 if octaves else place / 2.25)
            else:
                found += [0.7 * (value == other) for other in param.values]
        return found


def _numbers(param: Param) -> list[float]:
    """Its values; those that are no positive numbers as 3, which is no power of two."""
    return [
        float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0 else 3.0
        for v in param.values
    ]
