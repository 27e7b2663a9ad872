"""Times programs against each other on the judge's clock, in turns, on inputs that nobody saw before.

Every call of every round gets fresh numbers, and every output is compared: with that of the reference of the
same round within three times what is allowed, or else with float64; a random one of the last round always
with float64.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.search.isolate.channel import dtype_of
from foveal.search.isolate.process import ProgramError
from foveal.search.task import Case
from foveal.search.verify import styles
from foveal.search.verify.runner import Call, Runner
from foveal.search.verify.truth import Truth

REFERENCE = "reference"
_AT_ONCE = 64
_MOST_BYTES = 64 << 20
_LEAST_SECONDS = 0.005
_SLACK = 3.0
_DRAWS = 4


@dataclass(frozen=True)
class Rounds:
    """How long to time: rounds, of which the first `warm_up` do not count."""

    count: int = 12
    warm_up: int = 2


Samples = dict[str, list[float]]
"""Seconds per call by program; sample r of all belongs to round r."""


class Race:
    """Programs on one case; `run` may be called again, with the same processes or with others."""

    def __init__(self, truth: Truth, case: Case, source: random.Random) -> None:
        self.truth = truth
        self.case = case
        self.source = source
        self.runners: dict[str, Runner] = {}
        self.call = truth.call(case, source.getrandbits(31))
        seen = [truth.allowed(truth.call(case, source.getrandbits(31))) for _ in range(_DRAWS)]
        self.allowed = [_SLACK * max(each) for each in zip(*seen, strict=True)]
        self.outline = truth.outline(self.call)
        truth.runner.arrange(self.call, self.outline, 1)
        once = min(truth.runner.timed(self._sets(1))[0] for _ in range(3))
        each = sum(x.numel() * x.element_size() for x in self.call.inputs)
        most = max(min(_AT_ONCE, _MOST_BYTES // max(each, 1)), 1)
        self.calls = max(min(math.ceil(_LEAST_SECONDS / once), most), 1)

    def run(self, runners: Mapping[str, Runner], rounds: Rounds) -> Samples:
        """Samples of every program and of the reference.

        Raises ProgramError for a wrong output, naming the program.
        """
        self.runners = {**runners, REFERENCE: self.truth.runner}
        where = sorted(os.sched_getaffinity(0))[-max(self.truth.task.threads, 1) :]
        for runner in self.runners.values():
            runner.arrange(self.call, self.outline, self.calls)
            runner.process.pin(where)
        samples: Samples = {name: [] for name in self.runners}
        for number in range(rounds.warm_up + rounds.count):
            sets = self._sets(self.calls)
            order = list(self.runners)
            self.source.shuffle(order)
            found = {}
            for name in order:
                seconds, found[name] = self.runners[name].timed(sets)
                if number >= rounds.warm_up:
                    samples[name].append(seconds / self.calls)
            self._compare(sets, found)
        place = self.source.randrange(self.calls)
        for name in self.runners:
            if name != REFERENCE:
                self._check(name, sets[place], found[name][place])
        return samples

    def _compare(
        self, sets: Sequence[Sequence[Tensor]], found: Mapping[str, list[list[Tensor]]]
    ) -> None:
        right = found[REFERENCE]
        for name, outputs in found.items():
            for place, (got, about) in enumerate(zip(outputs, right, strict=True)):
                near = zip(got, about, self.allowed, strict=True)
                if name != REFERENCE and not all(_distance(x, y) <= a for x, y, a in near):
                    self._check(name, sets[place], got)

    def _check(self, name: str, inputs: Sequence[Tensor], got: Sequence[Tensor]) -> None:
        """Against float64; the reference is laid out anew after it."""
        mistake = self.truth.judge(Call(self.case, tuple(inputs), self.call.state), got)
        self.truth.runner.arrange(self.call, self.outline, self.calls)
        if not mistake.ok:
            raise ProgramError(f"{name}: an output of a timed run is wrong: {mistake.sentence}")

    def _sets(self, count: int) -> list[list[Tensor]]:
        seeds = [self.source.getrandbits(31) for _ in range(count)]
        if self.truth.task.own_inputs or any(not each.floating for each in self.case.inputs):
            return [list(self.truth.call(self.case, seed).inputs) for seed in seeds]
        shapes = [each.shape for each in self.case.inputs]
        dtype = dtype_of(self.case.inputs[0].dtype) if self.case.inputs else torch.float32
        return [styles.draw_many(shapes, seed, dtype) for seed in seeds]


def _distance(x: Tensor, y: Tensor) -> float:
    same = (x == y) | (x.isnan() & y.isnan())
    apart = torch.where(same, 0.0, (x.double() - y.double()).abs())
    return float(torch.where(apart.isnan(), torch.inf, apart).max()) if apart.numel() else 0.0
