"""Judges candidates for a search: stages, a first timing, and timed comparisons of two of them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

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
from foveal.search.isolate.process import ProgramError
from foveal.search.task import TIMED, Task
from foveal.search.verify.judge import Judge, ratios
from foveal.search.verify.race import Rounds

_CANDIDATE, _INCUMBENT = "candidate", "incumbent"
Comparison = tuple[Decision, Mapping[str, Any]]
"""A decision, and the samples behind it: seconds per call by case and program."""


class Evaluator(Protocol):
    """What a controller needs to know about candidates."""

    def evaluate(self, candidate: Candidate) -> Evaluation: ...

    def challenge(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        """Whether a candidate is faster than another one, timed side by side."""
        ...

    def confirm(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        """The same once more in fresh processes, after judging it on fresh inputs and hidden cases."""
        ...


@dataclass(frozen=True)
class Effort:
    """Rounds of the first timing, and of each pair of fresh processes in a comparison."""

    first: Rounds = field(default_factory=lambda: Rounds(8, 2))
    block: Rounds = field(default_factory=lambda: Rounds(3, 1))


class JudgedEvaluator:
    """Candidates judged by a `Judge`; one at a time is timed, whoever else is being judged."""

    def __init__(
        self, task: Task, judge: Judge, effort: Effort = Effort(), exclusive: Any = None
    ) -> None:
        self.task, self.judge, self.effort = task, judge, effort
        self.exclusive = exclusive or threading.Lock()
        self.watch: Callable[[str], None] = lambda text: None
        """Told how far a comparison is."""

    def evaluate(self, candidate: Candidate) -> Evaluation:
        start = time.perf_counter()
        program = self.task.program(candidate)
        with self.exclusive:
            verdict = self.judge.verify(program, self.effort.first if self.task.timed else None)
        speedup = None
        if verdict.ok and self.task.timed:
            each = [statistics.median(ratios(samples)) for samples in verdict.samples.values()]
            speedup = statistics.geometric_mean(each)
        return Evaluation(
            verdict.ok,
            verdict.stage,
            verdict.reason,
            speedup,
            time.perf_counter() - start,
            dict(verdict.facts),
            cell_of(verdict.facts) if verdict.ok else None,
            dict(verdict.samples),
        )

    def challenge(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        return self._compared(candidate, incumbent, CHALLENGE)

    def _compared(self, candidate: Candidate, incumbent: Candidate, looks: Looks) -> Comparison:
        programs = {
            _CANDIDATE: self.task.program(candidate),
            _INCUMBENT: self.task.program(incumbent),
        }
        start = time.perf_counter()
        found: dict[str, dict[str, list[float]]] = {}
        ratios_by_case: dict[str, list[float]] = {}
        decision = Decision(OPEN, 0.0, 0, "")
        cases = self.task.cases_of(TIMED)
        with (
            self.exclusive,
            contextlib.closing(self.judge.races(programs, cases, self.effort.block)) as races,
        ):
            try:
                while decision.verdict == OPEN:
                    for samples in itertools.islice(
                        races, samples_to_next_look(decision.samples, looks)
                    ):
                        for case, each in samples.items():
                            middle = {name: statistics.median(x) for name, x in each.items()}
                            for name, seconds in middle.items():
                                found.setdefault(case, {}).setdefault(name, []).append(seconds)
                            ratio = math.log(middle[_CANDIDATE] / middle[_INCUMBENT])
                            ratios_by_case.setdefault(case, []).append(ratio)
                        done = len(next(iter(ratios_by_case.values())))
                        look = next(count for count, _ in looks if count >= done)
                        self.watch(f"{done} of {look} samples")
                    decision = decide(ratios_by_case, looks=looks)
            except ProgramError as error:
                decision = Decision(LOST, 0.0, decision.samples, str(error))
        return dataclasses.replace(decision, seconds=time.perf_counter() - start), found

    def confirm(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        with self.exclusive:
            verdict = self.judge.confirm(self.task.program(candidate))
        if not verdict.ok:
            reason = f"not confirmed at stage {verdict.stage}: {verdict.reason}"
            return Decision(LOST, 0.0, 0, reason, verdict.seconds), {}
        decision, samples = self._compared(candidate, incumbent, CONFIRMATION)
        return dataclasses.replace(decision, seconds=decision.seconds + verdict.seconds), samples
