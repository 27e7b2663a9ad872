"""Judges parameters of our own GPU kernels: compiled and checked in other processes, timed in this one.

Only for templates whose candidates are numbers: no text of a candidate is ever run here.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from foveal.search.acceptance import (
    CHALLENGE,
    CONFIRMATION,
    LOST,
    OPEN,
    Decision,
    Looks,
    decide,
    samples_to_next_look,
)
from foveal.search.archive import Evaluation
from foveal.search.candidate import Candidate, cell_of
from foveal.search.evaluator import Comparison
from foveal.search.space import Point

_CYCLES_PER_SECOND = 2e9
_MARGIN = 1.5
# The device waits for longer than the host needs for a launch, so that only the device is timed.
_FIRST = 5


class Kernels(Protocol):
    """What is tuned: `call` launches on a shape, `check` says what is wrong with small results."""

    shapes: Sequence[Any]

    def call(self, point: Point, shape: Any) -> Callable[[], object]: ...


class DeviceEvaluator:
    """Times parameters with events, candidate and incumbent by turns, each sample with a cold cache.

    check(point) -> (what is wrong or "", facts, seconds) compiles and compares with float64; it is to do so
    in another process.
    """

    def __init__(
        self,
        kernels: Kernels,
        reference: Point,
        check: Callable[[Point], tuple[str, Mapping[str, float], float]],
        device: torch.device,
        exclusive: threading.Lock | None = None,
        seed: int = 0,
    ) -> None:
        self.kernels, self.reference, self.check = kernels, reference, check
        self.device = device
        self.exclusive = exclusive or threading.Lock()
        self.source = random.Random(seed)
        self.flush = torch.empty(64 << 20, dtype=torch.int32, device=device)

    def evaluate(self, candidate: Candidate) -> Evaluation:
        start = time.perf_counter()
        wrong, facts, _ = self.check(candidate.params)
        if wrong:
            return Evaluation(False, "numerics", wrong, None, time.perf_counter() - start)
        with self.exclusive:
            begun = time.perf_counter()
            try:
                points = {"candidate": candidate.params, "reference": self.reference}
                samples = {str(s): self.samples(points, s, _FIRST) for s in self.kernels.shapes}
            except Exception as error:  # compilers and drivers raise what they like
                reason = f"{type(error).__name__}: {error}"[:300]
                return Evaluation(False, "timing", reason, None, time.perf_counter() - start)
            seconds = time.perf_counter() - begun
        each = [
            statistics.median(s["reference"]) / statistics.median(s["candidate"])
            for s in samples.values()
        ]
        return Evaluation(
            True,
            "timing",
            "",
            statistics.geometric_mean(each),
            seconds,
            dict(facts),
            cell_of(facts),
            samples,
        )

    def challenge(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        return self._compared(candidate, incumbent, CHALLENGE)

    def _compared(self, candidate: Candidate, incumbent: Candidate, looks: Looks) -> Comparison:
        points = {"candidate": candidate.params, "incumbent": incumbent.params}
        found: dict[str, dict[str, list[float]]] = {}
        decision = Decision(OPEN, 0.0, 0, "")
        start = time.perf_counter()
        with self.exclusive:
            while decision.verdict == OPEN:
                more = samples_to_next_look(decision.samples, looks)
                for shape in self.kernels.shapes:
                    for name, seconds in self.samples(points, shape, more).items():
                        found.setdefault(str(shape), {}).setdefault(name, []).extend(seconds)
                decision = decide(
                    {
                        shape: [
                            math.log(a / b)
                            for a, b in zip(s["candidate"], s["incumbent"], strict=True)
                        ]
                        for shape, s in found.items()
                    },
                    looks=looks,
                )
        return dataclasses.replace(decision, seconds=time.perf_counter() - start), found

    def confirm(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        wrong, _, _ = self.check(candidate.params)
        if wrong:
            return Decision(LOST, 0.0, 0, f"not confirmed: {wrong}"), {}
        return self._compared(candidate, incumbent, CONFIRMATION)

    def samples(
        self, points: Mapping[str, Point], shape: Any, count: int
    ) -> dict[str, list[float]]:
        """Seconds of `count` calls of each point, in turns in random order, each with a cold cache."""
        calls = {name: self.kernels.call(point, shape) for name, point in points.items()}
        for call in calls.values():
            call()
        torch.cuda.synchronize(self.device)
        wait = 0.0
        for call in calls.values():
            start = time.perf_counter()
            call()
            wait = max(wait, time.perf_counter() - start)
        torch.cuda.synchronize(self.device)
        cycles = int(_MARGIN * wait * _CYCLES_PER_SECOND)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in calls}
        for _ in range(count):
            order = list(calls)
            self.source.shuffle(order)
            for name in order:
                pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flush.zero_()
                torch.cuda._sleep(cycles)
                pair[0].record()
                calls[name]()
                pair[1].record()
                events[name].append((pair[0], pair[1]))
            torch.cuda.synchronize(self.device)
        return {
            name: [start.elapsed_time(stop) / 1e3 for start, stop in pairs]
            for name, pairs in events.items()
        }
