"""The stages of a verdict, in order; the first that fails ends it."""

from __future__ import annotations

import dataclasses
import random
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import torch

from foveal._errors import ConfinementError
from foveal.search.isolate.channel import Message
from foveal.search.isolate.process import Nursery, ProgramError
from foveal.search.task import HIDDEN, TIMED, VERIFIED, Case, Task
from foveal.search.verify import null, static, styles
from foveal.search.verify.race import REFERENCE, Race, Rounds, Samples
from foveal.search.verify.runner import Call, Runner
from foveal.search.verify.truth import Truth, limits_of, memory_of

COMPILE, SMOKE, SHAPES, NUMERICS = "compile", "smoke", "shapes", "numerics"
REPEAT, EDGES, GRADIENTS, MEMORY = "determinism", "edge values", "gradients", "memory"
TIMING, FRESH = "timing", "fresh inputs"
STAGES = (
    COMPILE, SMOKE, SHAPES, NUMERICS, REPEAT, EDGES, GRADIENTS, MEMORY, TIMING, FRESH,
)  # fmt: skip

CANDIDATE = "candidate"
_REPEATS = 3
_COMPILING = 120.0


@dataclass(frozen=True)
class Finding:
    """What a stage found, in a sentence when it failed."""

    stage: str
    ok: bool
    reason: str
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What is known of a candidate.  `samples` by case, `facts` from a profile, `layers` of confinement."""

    findings: tuple[Finding, ...]
    samples: Mapping[str, Samples] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return bool(self.findings) and all(each.ok for each in self.findings)

    @property
    def stage(self) -> str:
        """The stage that failed, else the last one."""
        return self.findings[-1].stage if self.findings else COMPILE

    @property
    def reason(self) -> str:
        return self.findings[-1].reason if self.findings else ""

    @property
    def seconds(self) -> float:
        return sum(each.seconds for each in self.findings)


class _FailedError(Exception):
    """A stage is not passed: the sentence."""


class Judge:
    """Judges candidates of one task; it never runs a line of theirs in its own process.

    Options: seed: repeats the random inputs of a run (None: fresh ones); seconds: patience for one
    answer of a candidate.
    """

    def __init__(
        self, task: Task, nursery: Nursery, seed: int | None = None, seconds: float = 20.0
    ) -> None:
        self.task = task
        self.nursery = nursery
        self.seconds = seconds
        self.source = random.Random(secrets.randbits(64) if seed is None else seed)
        self.truth = Truth(task, nursery)

    def admit(self) -> list[str]:
        """Raises TaskError where a do-nothing kernel would pass; else says what was tried."""
        return null.admit(self.truth, self.task.cases, self.source.getrandbits(31))

    def start(self, program: Message) -> Runner:
        """A candidate in a fresh process.  Raises ProgramError, and ConfinementError where it may not run."""
        process = self.nursery.start(limits_of(self.task), memory_of(self.task))
        if program["kind"] != "template" and not process.strong:
            process.close()
            raise ConfinementError(
                f"only {', '.join(process.layers)} of this system confine a process; a program that "
                f"nobody has read needs landlock, with namespaces or seccomp"
            )
        return Runner(
            process,
            program,
            threads=self.task.threads,
            device=self.task.device,
            seconds=self.seconds,
        )

    def verify(
        self,
        program: Message,
        rounds: Rounds | None = Rounds(),
        progress: Callable[[str], None] = lambda stage: None,
        roles: tuple[str, ...] = (VERIFIED, TIMED),
    ) -> Verdict:
        """A verdict with all stages; `rounds` None leaves the timing out."""
        findings: list[Finding] = []
        samples: dict[str, Samples] = {}
        facts: dict[str, float] = {}
        runner: Runner | None = None
        cases = self.task.cases_of(*roles)
        layers: tuple[str, ...] = ()
        start = time.perf_counter()

        def closed(stage: str, reason: str = "") -> None:
            nonlocal start
            now = time.perf_counter()
            findings.append(Finding(stage, not reason, reason, now - start))
            start = now

        stage = COMPILE
        try:
            progress(stage)
            static.check(program)
            for target in self.task.targets:
                facts = self._compiled(program, target) | facts
            runner = self.start(program)
            layers = runner.process.layers
            closed(COMPILE)
            for stage, run in self._stages(runner, cases, facts):
                progress(stage)
                run()
                closed(stage)
            if rounds is not None:
                stage = TIMING
                progress(stage)
                for case in self.task.cases_of(TIMED):
                    race = Race(self.truth, case, self.source)
                    samples[case.name] = race.run({CANDIDATE: runner}, rounds)
                closed(TIMING)
                stage = FRESH
                progress(stage)
                for case in cases:
                    self._once(runner, case, styles.NORMAL)
                closed(FRESH)
        except (ProgramError, static.StaticError, _FailedError) as error:
            closed(stage, str(error))
        finally:
            if runner is not None:
                runner.close()
        return Verdict(tuple(findings), samples, facts, layers)

    def races(
        self, programs: Mapping[str, Message], cases: Sequence[Case], rounds: Rounds
    ) -> Generator[dict[str, Samples], None, None]:
        """Samples by case, of programs and of the reference: at every step from fresh processes.

        Where the memory of a process happens to lie makes it some percent faster or slower for as long as it
        lives; so processes are what samples are taken of, not calls.  They start in random order.
        """
        prepared = [Race(self.truth, case, self.source) for case in cases]
        while True:
            runners: dict[str, Runner] = {}
            try:
                for name in self.source.sample(list(programs), len(programs)):
                    runners[name] = self.start(programs[name])
                yield {race.case.name: race.run(runners, rounds) for race in prepared}
            finally:
                for runner in runners.values():
                    runner.close()

    def confirm(self, program: Message) -> Verdict:
        """All stages but timing in a fresh process, with fresh inputs, on hidden cases too."""
        return self.verify(program, None, roles=(VERIFIED, TIMED, HIDDEN))

    def close(self) -> None:
        self.truth.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _compiled(self, program: Message, target: str) -> dict[str, float]:
        """Facts about the kernels of a template on a class of devices, compiled in a process of its own."""
        limits = dataclasses.replace(limits_of(self.task), programs=True, files=1024)
        limits = dataclasses.replace(
            limits, file_size=256 << 20, memory=max(limits.memory, 4 << 30)
        )
        inputs = [
            {"shape": list(each.shape), "dtype": each.dtype}
            for each in self.task.cases_of(TIMED)[-1].inputs
        ]
        request = {"do": "compile", "program": program, "inputs": inputs, "target": target}
        with self.nursery.start(limits, 1 << 20) as process:
            found = process.ask(request, max(self.seconds, _COMPILING))["facts"]
        if not all(isinstance(value, float) for value in found.values()):
            raise _FailedError("what it says about its kernels are no numbers")
        return dict(found)

    def _stages(
        self, runner: Runner, cases: Sequence[Case], facts: dict[str, float]
    ) -> Iterator[tuple[str, Callable[[], None]]]:
        smallest, largest = cases[0], cases[-1]

        def numerics() -> None:
            for style in styles.STYLES if not self.task.own_inputs else (styles.NORMAL,):
                self._once(runner, smallest, style)
                self._once(runner, largest, style)

        def shapes() -> None:
            for case in cases:
                self._once(runner, case, styles.NORMAL)

        def edges() -> None:
            for style in styles.EDGES:
                self._once(runner, smallest, style)

        def profile() -> None:
            self._once(runner, smallest, styles.NORMAL)
            call = self.truth.call(largest, self.source.getrandbits(31))
            facts.update(runner.profile(call))
            facts["compulsory"] = self.truth.compulsory(call)

        yield SMOKE, profile
        yield SHAPES, shapes
        yield NUMERICS, numerics
        yield REPEAT, lambda: self._repeat(runner, largest)
        if not self.task.own_inputs:
            yield EDGES, edges
        if self.task.gradients:
            yield GRADIENTS, lambda: self._gradients(runner, cases)
        yield MEMORY, lambda: self._memory(runner, smallest)

    def _once(self, runner: Runner, case: Case, style: str) -> None:
        call = self.truth.call(case, self.source.getrandbits(31), style)
        self._judged(runner, call, f"{case.name}, {style}")

    def _judged(self, runner: Runner, call: Call, what: str, *, poison: bool = False) -> None:
        found = runner.run(call, self.truth.outline(call), poison=poison)
        mistake = self.truth.judge(call, found)
        if not mistake.ok:
            raise _FailedError(f"{what}: {mistake.sentence}")

    def _repeat(self, runner: Runner, case: Case) -> None:
        call = self.truth.call(case, self.source.getrandbits(31))
        outline = self.truth.outline(call)
        first = runner.run(call, outline)
        for _ in range(_REPEATS - 1):
            again = runner.run(call, outline)
            if self.task.deterministic:
                pairs = zip(first, again, strict=True)
                if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs):
                    raise _FailedError(f"{case.name}: two runs on the same inputs differ")
            mistake = self.truth.judge(call, again)
            if not mistake.ok:
                raise _FailedError(f"{case.name}: a later run is wrong: {mistake.sentence}")

    def _gradients(self, runner: Runner, cases: Sequence[Case]) -> None:
        for case in (cases[0], cases[-1]):
            seed = self.source.getrandbits(31)
            call = self.truth.with_gradients(self.truth.call(case, seed), seed)
            self._judged(runner, call, f"{case.name}, gradients")

    def _memory(self, runner: Runner, case: Case) -> None:
        call = self.truth.call(case, self.source.getrandbits(31))
        self._judged(runner, call, f"{case.name}, memory filled with NaN", poison=True)


def ratios(samples: Samples, name: str = CANDIDATE, other: str = REFERENCE) -> list[float]:
    """How many times longer `other` took, round by round."""
    return [b / a for a, b in zip(samples[name], samples[other], strict=True)]
