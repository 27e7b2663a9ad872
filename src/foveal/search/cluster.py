"""Candidates judged by workers of a Ray cluster, one per device; the archive stays with the controller.

A worker is an actor with a nursery and a judge of its own.  One that is lost (its process or its machine
ended) is started anew by Ray, elsewhere if it must be, and asked again; a candidate that ends three workers
is rejected for it.  Speed-ups are over the reference on the same device.  Where workers have devices of
different classes, a candidate is judged on one of each: it passes when it passes everywhere, its speed-up is
the geometric mean, and it wins when it wins everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from foveal._errors import MissingDependencyError
from foveal.search.acceptance import LOST, WON, Decision
from foveal.search.archive import Evaluation
from foveal.search.candidate import Candidate
from foveal.search.evaluator import Comparison, Effort, JudgedEvaluator
from foveal.search.isolate.process import Nursery
from foveal.search.task import Task
from foveal.search.verify.judge import Judge

LOCAL = "local"
"""The address of a cluster that is started on this machine and ended with the search."""

_ATTEMPTS = 3
_STARTING = 300.0
_AGAIN = 0.5
Found = TypeVar("Found")


class NodeLock:
    """Held by one process of a machine at a time, and free again when that process ends."""

    def __init__(self, name: str) -> None:
        self.path = Path(tempfile.gettempdir()) / f"foveal-{os.getuid()}-{name}.lock"
        self._file: Any = None

    def __enter__(self) -> NodeLock:
        self._file = self.path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


class Worker:
    """What runs in an actor: an evaluator of one task on the device of its machine."""

    def __init__(self, task: Task, effort: Effort, patience: float) -> None:
        torch.set_num_threads(task.threads)
        self._stack = contextlib.ExitStack()
        nursery = self._stack.enter_context(Nursery())
        judge = self._stack.enter_context(Judge(task, nursery, seconds=patience))
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "0") if task.device != "cpu" else "cpu"
        lock = NodeLock(f"search-{device.replace(',', '-')}")
        self._evaluator = JudgedEvaluator(task, judge, effort, lock)
        self._device = task.device

    def about(self) -> dict[str, object]:
        """The process, and the class of its device."""
        kind = platform.machine()
        if self._device != "cpu":
            kind = torch.cuda.get_device_name(self._device)
        return {"pid": os.getpid(), "device": kind}

    def evaluate(self, candidate: Candidate) -> Evaluation:
        return self._evaluator.evaluate(candidate)

    def challenge(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        return self._evaluator.challenge(candidate, incumbent)

    def confirm(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        return self._evaluator.confirm(candidate, incumbent)


class Remote:
    """A worker, as the controller sees it: an Evaluator that survives the loss of the worker."""

    def __init__(self, ray: Any, actor: Any, note: Callable[[str], None]) -> None:
        self._ray, self._actor, self._note = ray, actor, note

    def about(self) -> dict[str, Any]:
        found: dict[str, Any] = self._ray.get(self._actor.about.remote(), timeout=_STARTING)
        return found

    def evaluate(self, candidate: Candidate) -> Evaluation:
        start = time.perf_counter()

        def ask() -> Evaluation:
            found: Evaluation = self._ray.get(self._actor.evaluate.remote(candidate))
            return found

        def lost() -> Evaluation:
            reason = f"its worker was lost {_ATTEMPTS} times"
            return Evaluation(False, "worker", reason, None, time.perf_counter() - start)

        return self._asked(ask, lost)

    def challenge(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        return self._compared(self._actor.challenge, candidate, incumbent)

    def confirm(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        return self._compared(self._actor.confirm, candidate, incumbent)

    def _compared(self, method: Any, candidate: Candidate, incumbent: Candidate) -> Comparison:
        def ask() -> Comparison:
            found: Comparison = self._ray.get(method.remote(candidate, incumbent))
            return found

        def lost() -> Comparison:
            return Decision(LOST, 0.0, 0, f"its worker was lost {_ATTEMPTS} times"), {}

        return self._asked(ask, lost)

    def _asked(self, ask: Callable[[], Found], lost: Callable[[], Found]) -> Found:
        for _ in range(_ATTEMPTS):
            try:
                return ask()
            except self._ray.exceptions.RayActorError as error:
                self._note(f"a worker was lost: {str(error).splitlines()[0]}")
                if not self._returns():
                    break
        return lost()

    def _returns(self) -> bool:
        """Waits until Ray has started the worker anew; whether it has."""
        end = time.monotonic() + _STARTING
        while time.monotonic() < end:
            time.sleep(_AGAIN)
            with contextlib.suppress(self._ray.exceptions.RayActorError):
                self.about()
                return True
        return False


class Everywhere:
    """Evaluators on devices of different classes as one."""

    def __init__(self, members: Sequence[Remote]) -> None:
        self.members = tuple(members)

    def evaluate(self, candidate: Candidate) -> Evaluation:
        found = self._each(lambda member: member.evaluate(candidate))
        failed = next((each for each in found if not each.ok), None)
        seconds = max(each.seconds for each in found)
        if failed is not None:
            return dataclasses.replace(failed, seconds=seconds)
        speedups = [each.speedup for each in found if each.speedup]
        mean = statistics.geometric_mean(speedups) if len(speedups) == len(found) else None
        samples = {str(n): each.samples for n, each in enumerate(found)}
        return dataclasses.replace(found[0], speedup=mean, seconds=seconds, samples=samples)

    def challenge(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        return self._joined(self._each(lambda member: member.challenge(candidate, incumbent)))

    def confirm(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        return self._joined(self._each(lambda member: member.confirm(candidate, incumbent)))

    def _each(self, ask: Callable[[Remote], Found]) -> list[Found]:
        with ThreadPoolExecutor(len(self.members)) as pool:
            return list(pool.map(ask, self.members))

    @staticmethod
    def _joined(found: Sequence[Comparison]) -> Comparison:
        worst = min((decision for decision, _ in found), key=lambda d: (d.verdict == WON, d.gain))
        seconds = max(decision.seconds for decision, _ in found)
        samples = {str(number): each for number, (_, each) in enumerate(found)}
        return dataclasses.replace(worst, seconds=seconds), samples


@contextlib.contextmanager
def workers(
    task: Task,
    count: int,
    address: str = LOCAL,
    *,
    effort: Effort = Effort(),
    patience: float = 20.0,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[list[Remote | Everywhere]]:
    """Evaluators for a `Search`: one per worker, or one per group with a device of every class.

    address: of a Ray cluster, or LOCAL; note: called with a sentence when a worker is lost.  Workers of a GPU
    task ask for one GPU each, those of one machine time in turn.  Raises MissingDependencyError.
    """
    try:
        import ray
    except ImportError:
        raise MissingDependencyError("ray", "a search on several machines", "cluster") from None
    started = not ray.is_initialized()
    if started:
        wanted = {"num_cpus": max(count, 1)} if address == LOCAL else {"address": address}
        ray.init(include_dashboard=False, log_to_driver=False, **wanted)
    actors: list[Any] = []
    guard = threading.Lock()

    def noted(text: str) -> None:
        with guard:
            note(text)

    try:
        kind = ray.remote(Worker).options(
            num_cpus=1,
            num_gpus=int(task.device != "cpu"),
            max_restarts=-1,
            scheduling_strategy="SPREAD",
        )
        actors += [kind.remote(task, effort, patience) for _ in range(count)]
        yield grouped([Remote(ray, actor, noted) for actor in actors])
    finally:
        for actor in actors:
            ray.kill(actor)
        if started:
            ray.shutdown()


def grouped(found: Sequence[Remote]) -> list[Remote | Everywhere]:
    """Workers of one class of device each by itself; of several classes in groups with one of each."""
    classes: dict[str, list[Remote]] = {}
    for each in found:
        classes.setdefault(str(each.about()["device"]), []).append(each)
    if len(classes) == 1:
        return list(found)
    return [Everywhere(group) for group in zip(*classes.values(), strict=False)]
