"""The loop of a search: propose, judge, compare, remember.  Its only state is the archive."""

from __future__ import annotations

import dataclasses
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from foveal._errors import TaskError
from foveal.search.acceptance import WON, Decision
from foveal.search.archive import QUEUED, Archive, Entry, Evaluation
from foveal.search.candidate import Candidate, Cell, Proposal
from foveal.search.evaluator import Evaluator
from foveal.search.knowledge import state_of
from foveal.search.operators.base import Operator, View
from foveal.search.prior import Known
from foveal.search.strategies import Strategy
from foveal.search.task import Task

START = "start"
_IDLE_ROUNDS = 20
_PATIENCE = 4
"""The first candidate is compared with the start when so many after it were no better."""
_LONGEST_WAIT = 2
"""Times what a comparison takes, for which a candidate waits while better ones are likely."""
_REAL = 0.01
_NEW_CELL = 0.01


@dataclass(frozen=True)
class State:
    """What there is to see of a running search."""

    judged: int
    accepted: int
    cells: int
    speedup: float
    spent: float
    doing: str


@dataclass
class _Outcome:
    """Everything about one candidate that is written in one transaction."""

    evaluation: Evaluation
    place: Cell | None = None
    accepted: tuple[str | None, float] | None = None
    challenges: tuple[tuple[str, str, Decision, Mapping[str, Any]], ...] = ()


class Search:
    """A search of one task.

    Options: evaluators: one per candidate that is judged at the same time (timing is always alone); seed: of
    the random streams, which depend on it, the operator and the number of the candidate only, so that a
    resumed search draws what the uninterrupted one would have drawn.
    """

    def __init__(
        self,
        task: Task,
        archive: Archive,
        evaluators: Sequence[Evaluator],
        strategy: Strategy,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        known: Sequence[Known] = (),
    ) -> None:
        archive.claim(task.key)
        self.task, self.archive, self.strategy = task, archive, strategy
        self.evaluators = list(evaluators)
        self.view = View(task, archive, tuple(known))
        self.clock = clock
        self.seed = archive.setting("seed")
        if self.seed is None:
            archive.keep("seed", seed)
            self.seed = seed
        self.stop = threading.Event()
        """Set it to end the search after what is in flight."""
        self.exhausted = False
        """Whether it ended because no operator had another idea."""

    def run(
        self,
        seconds: float,
        progress: Callable[[State], None] = lambda state: None,
        most: int | None = None,
    ) -> None:
        """Searches for `seconds`, or until `most` candidates were judged.

        Raises TaskError when the start fails.
        """
        self.archive.requeue()
        if not self.archive.count():
            self.archive.add(Proposal(Candidate(self.task.space.first), START))
        end = self.clock() + seconds
        if not self.archive.entries(evaluated=True):
            self._begin(progress)
        if len(self.evaluators) == 1:
            self._alone(end, progress, most)
        else:
            self._together(end, progress, most)

    def state(self, doing: str = "") -> State:
        champion = self.archive.champion()
        speedup = champion.evaluation.speedup if champion and champion.evaluation else None
        return State(
            len(self.archive.entries(evaluated=True)),
            len(self.archive.accepted()),
            len(self.archive.elites()),
            speedup or 0.0,
            self.archive.spent,
            doing,
        )

    def _begin(self, progress: Callable[[State], None]) -> None:
        """The start is the first champion, if it passes."""
        entry = self.archive.take()
        if entry is None or entry.operator != START:
            raise TaskError(
                f"{self.archive.path}: its first candidate was cut off too often; begin anew"
            )
        progress(self.state("judging the start"))
        evaluation = self.evaluators[0].evaluate(entry.candidate)
        if not evaluation.ok:
            self.archive.record(entry.id, evaluation)
            raise TaskError(
                f"the start of the search fails at stage {evaluation.stage}: {evaluation.reason}"
            )
        accepted = None if evaluation.speedup is None else (None, 0.0)
        self.archive.record(entry.id, evaluation, place=evaluation.cell, accepted=accepted)

    def _alone(self, end: float, progress: Callable[[State], None], most: int | None) -> None:
        idle = 0
        evaluator = self.evaluators[0]
        while self._goes_on(end, most) and idle < _IDLE_ROUNDS:
            queued = self.archive.count(QUEUED) or self._proposed()
            due = self._due(ended=not queued)
            if due is not None:
                progress(self.state(f"comparing {due.id[:6]} with the champion"))
                self._settle(due, self._comparison(due)(evaluator))
                continue
            entry = self.archive.take()
            if entry is None:
                idle += 1
                continue
            idle = 0
            progress(self.state(f"{entry.operator} {entry.id[:6]} {entry.note}".strip()))
            self._record(entry, self._placed(entry, evaluator.evaluate(entry.candidate), evaluator))
        self.exhausted = idle >= _IDLE_ROUNDS
        self._last(progress)

    def _together(self, end: float, progress: Callable[[State], None], most: int | None) -> None:
        """Candidates are judged side by side; everything is written by this thread."""
        flying: dict[Future[Evaluation | _Outcome], tuple[Entry, Evaluator]] = {}
        free = list(self.evaluators)
        idle = 0
        with ThreadPoolExecutor(len(self.evaluators)) as pool:
            while True:
                while free and self._goes_on(end, most) and idle < _IDLE_ROUNDS:
                    due = self._due()
                    if due is not None and due.id not in {e.id for e, _ in flying.values()}:
                        evaluator = free.pop()
                        flying[pool.submit(self._comparison(due), evaluator)] = due, evaluator
                        continue
                    entry = self.archive.take() or (
                        self.archive.take() if self._proposed() else None
                    )
                    if entry is None:
                        idle += 1
                        break
                    idle = 0
                    evaluator = free.pop()
                    flying[pool.submit(evaluator.evaluate, entry.candidate)] = entry, evaluator
                if not flying:
                    if not self._goes_on(end, most) or idle >= _IDLE_ROUNDS:
                        break
                    continue
                progress(self.state(f"{len(flying)} candidates in flight"))
                done = wait(flying, return_when=FIRST_COMPLETED).done
                for future in done:
                    entry, evaluator = flying.pop(future)
                    found = future.result()
                    if isinstance(found, _Outcome):
                        self._settle(entry, found)
                    else:
                        self._record(entry, self._placed(entry, found, evaluator))
                    free.append(evaluator)
        self.exhausted = idle >= _IDLE_ROUNDS
        self._last(progress)

    def _last(self, progress: Callable[[State], None]) -> None:
        """The best candidate that was not compared yet, unless the search is asked to stop."""
        due = None if self.stop.is_set() else self._due(ended=True)
        if due is not None:
            progress(self.state(f"comparing {due.id[:6]} with the champion"))
            self._settle(due, self._comparison(due)(self.evaluators[0]))
        progress(self.state("done"))

    def _due(self, ended: bool = False) -> Entry | None:
        """The candidate to compare with the champion now.

        A better one may follow, which makes the comparison of this one a waste of C seconds; judging
        another one first delays it by e.  Where the next one is better with a chance p, it is compared
        when p < e / (e + C), or when it waited for 2 C; else when judging others took C seconds.
        """
        champion = self.archive.champion()
        found = None if champion is None else self.archive.contender(_speedup(champion))
        if found is None:
            return None
        entry, later, seconds = found
        known = self.archive.comparing
        chance = self.archive.chance
        if ended:
            due = True
        elif chance is None:
            due = later >= _PATIENCE if known is None else seconds >= known
        else:
            own = entry.evaluation.seconds if entry.evaluation else 0.0
            each = (own + seconds) / (later + 1)
            cost = _PATIENCE * each if known is None else known
            due = chance < each / max(each + cost, 1e-9) or seconds >= _LONGEST_WAIT * cost
        return entry if due else None

    def _champion(self) -> Entry:
        champion = self.archive.champion()
        assert champion is not None
        return champion

    def _goes_on(self, end: float, most: int | None) -> bool:
        if self.stop.is_set() or self.clock() >= end:
            return False
        return most is None or len(self.archive.entries(evaluated=True)) < most

    def _proposed(self) -> bool:
        """Lets operators propose, the chosen one first; whether any had an idea."""
        number = self.archive.count()
        chosen = self._operator(random.Random(f"{self.seed} choice {number}"))
        others = [each for each in self.strategy.operators if each is not chosen]
        for operator in (chosen, *others):
            source = random.Random(f"{self.seed} {operator.name} {number}")
            proposal = operator.propose(self.view, source)
            if proposal is not None and self.archive.add(proposal) is not None:
                return True
        return False

    def _operator(self, source: random.Random) -> Operator:
        """The operator with the best gain per second so far, those that were hardly tried before it.

        Value = mean log gain per second, scaled to [0, 1], + sqrt(2 ln N / n).
        """
        operators = self.strategy.operators
        if source.random() < self.strategy.random_share or len(operators) == 1:
            return source.choice(operators)
        entries = self.archive.entries(evaluated=True)
        gains = {a["candidate"]: math.log1p(a["gain"]) for a in self.archive.accepted()}
        per_second, tries = {}, {}
        for operator in operators:
            own = [e for e in entries if e.operator == operator.name]
            seconds = sum(e.evaluation.seconds for e in own if e.evaluation) or 1.0
            per_second[operator.name] = sum(gains.get(e.id, 0.0) for e in own) / seconds
            tries[operator.name] = len(own)
        most = max(per_second.values()) or 1.0
        total = max(sum(tries.values()), 1)

        def value(operator: Operator) -> float:
            n = tries[operator.name]
            if n == 0:
                return math.inf
            return per_second[operator.name] / most + math.sqrt(2 * math.log(total) / n)

        return max(operators, key=value)

    def _placed(self, entry: Entry, evaluation: Evaluation, evaluator: Evaluator) -> _Outcome:
        """Whether a judged candidate takes its cell; one that looks faster than the champion waits."""
        outcome = _Outcome(evaluation)
        champion = self.archive.champion()
        if not evaluation.ok:
            return outcome
        elite = None if evaluation.cell is None else self.archive.elite(evaluation.cell)
        if elite is None:
            outcome.place = evaluation.cell
        elif (
            evaluation.speedup is not None
            and champion is not None
            and evaluation.speedup < _speedup(champion)
            and elite.id != champion.id
        ):
            _against_elite(entry.candidate, elite, outcome, evaluator)
        return outcome

    def _comparison(self, entry: Entry) -> Callable[[Evaluator], _Outcome]:
        """Compares a candidate with the champion, twice if it wins, else with the elite of its cell."""
        assert entry.evaluation is not None
        evaluation, champion = entry.evaluation, self._champion()
        elite = None if evaluation.cell is None else self.archive.elite(evaluation.cell)

        def compare(evaluator: Evaluator) -> _Outcome:
            outcome = _Outcome(evaluation)
            first, samples = evaluator.challenge(entry.candidate, champion.candidate)
            outcome.challenges += ((champion.id, "challenge", first, samples),)
            if first.verdict == WON:
                second, samples = evaluator.confirm(entry.candidate, champion.candidate)
                outcome.challenges += ((champion.id, "confirmation", second, samples),)
                if second.verdict == WON:
                    gain = min(first.gain, second.gain)
                    outcome.accepted = champion.id, gain
                    # This follows from the comparison, which is more exact than the first timing.
                    known = _speedup(champion) / (1 - gain)
                    outcome.evaluation = dataclasses.replace(evaluation, speedup=known)
                    outcome.place = evaluation.cell
            if outcome.accepted is None and elite and elite.id not in (entry.id, champion.id):
                _against_elite(entry.candidate, elite, outcome, evaluator)
            return outcome

        return compare

    def _settle(self, entry: Entry, outcome: _Outcome) -> None:
        """Writes what a comparison with the champion came to, unless another one won meanwhile."""
        if outcome.accepted is None or outcome.accepted[0] == self._champion().id:
            self.archive.settle(
                entry.id,
                outcome.evaluation.speedup,
                place=outcome.place,
                challenges=outcome.challenges,
                accepted=outcome.accepted,
            )

    def _record(self, entry: Entry, outcome: _Outcome) -> None:
        parent = self.archive.entry(entry.parents[0]) if entry.parents else None
        transition = None
        gain = None
        if parent is not None and parent.evaluation is not None and parent.evaluation.speedup:
            speedup = outcome.evaluation.speedup
            gain = math.log(speedup / parent.evaluation.speedup) if speedup else None
            if parent.evaluation.cell is not None:
                real = gain if gain is not None and gain > _REAL else min(gain or 0.0, 0.0)
                transition = parent.evaluation.cell, real
        self.archive.record(
            entry.id,
            outcome.evaluation,
            place=outcome.place,
            challenges=outcome.challenges,
            accepted=outcome.accepted,
            transition=transition,
        )
        if gain is not None and parent is not None:
            action = entry.note if entry.operator == "rewrite" else entry.operator
            self.archive.learn(state_of(parent), action, gain, self.task.device)
        if entry.note.startswith("prompt "):
            self._credit(entry.note.split(";")[0].removeprefix("prompt "), gain or 0.0)

    def _credit(self, prompt: str, gain: float) -> None:
        """Adds an outcome to the prompt that it came from."""
        for known in self.archive.prompts():
            if known["id"] == prompt:
                uses = max(known["uses"], 1)
                step = gain - known["mean"]
                mean = known["mean"] + step / uses
                m2 = known["m2"] + step * (gain - mean)
                self.archive.keep_prompt({**known, "mean": mean, "m2": m2})


def _speedup(entry: Entry) -> float:
    """That over the reference; 0 where it was not timed."""
    return (entry.evaluation.speedup if entry.evaluation else None) or 0.0


def _against_elite(
    candidate: Candidate, elite: Entry, outcome: _Outcome, evaluator: Evaluator
) -> None:
    """A candidate that looks faster than the elite of its cell takes the cell when a comparison agrees."""
    if (outcome.evaluation.speedup or 0.0) > _speedup(elite) * (1 + _REAL):
        decision, samples = evaluator.challenge(candidate, elite.candidate)
        outcome.challenges += ((elite.id, "elite", decision, samples),)
        if decision.verdict == WON:
            outcome.place = outcome.evaluation.cell
