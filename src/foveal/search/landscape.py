"""Times that were recorded once for every point of a space, and searches that are replayed on them.

A landscape is a file of JSON lines {what: "landscape", name, point, shipped, samples: {point: [...], shipped:
[...]}, facts, ...}: seconds per call of a point and of the start, taken by turns.  What a replay measures are
draws from these samples, so that strategies can be compared over many seeds without a device; its clock
counts what the measurements would have taken on the device, with or without the recorded time of compilers.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveal.search.acceptance import (
    CHALLENGE,
    CONFIRMATION,
    OPEN,
    Decision,
    Looks,
    decide,
    samples_to_next_look,
)
from foveal.search.archive import Evaluation
from foveal.search.candidate import Candidate, cell_of
from foveal.search.evaluator import Comparison
from foveal.search.space import Param, Point, Space, Value

FLUSH = 0.0002
"""Seconds that emptying the cache takes before each call."""

_FIRST = 5
_KEY = tuple[Value, ...]


@dataclass(frozen=True)
class Place:
    """One point: seconds per call of it and of the start, facts about its kernel, seconds to compile it."""

    point: Mapping[str, Value]
    seconds: tuple[float, ...]
    beside: tuple[float, ...]
    facts: Mapping[str, float]
    compile_seconds: float = 0.0

    @property
    def ratio(self) -> float:
        """Time over that of the start: the median over its samples."""
        return statistics.median(self.seconds) / statistics.median(self.beside)


@dataclass(frozen=True)
class Landscape:
    """All points of one kernel that were timed; the first one is the start."""

    name: str
    places: tuple[Place, ...]

    def begun_at(self, place: Place) -> Landscape:
        """The same with another start."""
        others = (each for each in self.places if each is not place)
        return dataclasses.replace(self, places=(place, *others))

    @property
    def space(self) -> Space:
        """The recorded points as a space."""
        names = tuple(self.places[0].point)
        known = frozenset(self._key(place.point) for place in self.places)
        params = tuple(
            Param(
                name,
                tuple(sorted({place.point[name] for place in self.places})),
                True,
                begins=self.places[0].point[name],
            )
            for name in names
        )
        return Space(params, lambda point: self._key(point) in known)

    @property
    def best(self) -> Place:
        return min(self.places, key=lambda place: place.ratio)

    def at(self, point: Point) -> Place:
        key = self._key(point)
        return next(place for place in self.places if self._key(place.point) == key)

    def _key(self, point: Point) -> _KEY:
        return tuple(point[name] for name in self.places[0].point)


def read_landscapes(path: str | Path) -> dict[str, Landscape]:
    """Landscapes of a file by the name of their kernel; a point that was timed twice counts once."""
    found: dict[str, dict[_KEY, Place]] = {}
    starts: dict[str, Mapping[str, Value]] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        entry: dict[str, Any] = json.loads(line)
        if entry.get("what") != "landscape":
            continue
        starts[entry["name"]] = entry["shipped"]
        place = Place(
            entry["point"],
            tuple(entry["samples"]["point"]),
            tuple(entry["samples"]["shipped"]),
            entry["facts"],
            float(entry.get("compile_seconds", 0.0)),
        )
        found.setdefault(entry["name"], {})[tuple(entry["point"].values())] = place
    landscapes = {}
    for name, places in found.items():
        start = starts[name]
        ordered = sorted(places.values(), key=lambda place: place.point != start)
        landscapes[name] = Landscape(name, tuple(ordered))
    return landscapes


class LandscapeEvaluator:
    """Judges points by draws from a landscape; `clock` is the device's time that this took.

    compiling: the clock counts the compilation of each point too, one after the other.
    """

    def __init__(self, landscape: Landscape, seed: int, compiling: bool = False) -> None:
        self.landscape = landscape
        self.compiling = compiling
        self.source = random.Random(f"{landscape.name} {seed}")
        self.clock = 0.0

    def evaluate(self, candidate: Candidate) -> Evaluation:
        place = self.landscape.at(candidate.params)
        own = self._drawn(place, _FIRST)
        speedup = statistics.median(b for _, b in own) / statistics.median(a for a, _ in own)
        seconds = self._spend(own)
        if self.compiling:
            seconds += place.compile_seconds
            self.clock += place.compile_seconds
        facts = dict(place.facts)
        return Evaluation(True, "timing", "", speedup, seconds, facts, cell_of(facts), {})

    def challenge(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        return self._compared(candidate, incumbent, CHALLENGE)

    def confirm(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        return self._compared(candidate, incumbent, CONFIRMATION)

    def _compared(self, candidate: Candidate, incumbent: Candidate, looks: Looks) -> Comparison:
        """Two points that were both timed beside the start: the ratio of their ratios, draw by draw."""
        places = [self.landscape.at(each.params) for each in (candidate, incumbent)]
        logs: list[float] = []
        decision = Decision(OPEN, 0.0, 0, "")
        seconds = 0.0
        while decision.verdict == OPEN:
            more = samples_to_next_look(decision.samples, looks)
            ours, theirs = (self._drawn(place, more) for place in places)
            logs += [
                math.log(a / b) - math.log(c / d)
                for (a, b), (c, d) in zip(ours, theirs, strict=True)
            ]
            seconds += self._spend(
                [(a, c * b / d) for (a, b), (c, d) in zip(ours, theirs, strict=True)]
            )
            decision = decide({"": logs}, looks=looks)
        return dataclasses.replace(decision, seconds=seconds), {}

    def _drawn(self, place: Place, count: int) -> list[tuple[float, float]]:
        pairs = list(zip(place.seconds, place.beside, strict=True))
        return [self.source.choice(pairs) for _ in range(count)]

    def _spend(self, pairs: Sequence[tuple[float, float]]) -> float:
        seconds = sum(a + b + 2 * FLUSH for a, b in pairs)
        self.clock += seconds
        return seconds


def bench_seconds(once: float, warm_up: float = 0.025, repeat: float = 0.1) -> float:
    """What `triton.testing.do_bench`, by which Triton's autotuner times, takes on the device for a call of
    `once` seconds: five calls for an estimate, then warm-up and repetitions that fill 25 and 100 ms by it,
    the cache emptied before each."""
    calls = max(1, int(warm_up / (once + FLUSH))) + max(1, int(repeat / (once + FLUSH)))
    return (6 + calls) * (once + FLUSH)


def autotuned(
    landscape: Landscape, seed: int, compiling: bool = False
) -> Iterator[tuple[float, float]]:
    """Triton's autotuner on a list of all points in random order: (device seconds, ratio of the best so far).

    It returns something only after its last point; that it could be stopped before is in its favour.
    """
    source = random.Random(f"{landscape.name} {seed}")
    places = list(landscape.places)
    source.shuffle(places)
    clock, best = 0.0, math.inf
    for place in places:
        clock += bench_seconds(statistics.median(place.seconds))
        clock += place.compile_seconds if compiling else 0.0
        best = min(best, place.ratio)
        yield clock, best
