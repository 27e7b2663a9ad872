"""Workers of a Ray cluster: the same archive, devices of several classes, and the loss of a worker."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from foveal._errors import MissingDependencyError
from foveal.search import cluster
from foveal.search.acceptance import LOST, WON, Decision
from foveal.search.archive import Archive, Evaluation
from foveal.search.candidate import Candidate
from foveal.search.controller import Search
from foveal.search.evaluator import Comparison, Effort
from foveal.search.isolate.process import Nursery
from foveal.search.strategies import strategy
from foveal.search.task import read_task
from foveal.search.verify.race import Rounds
from tests.search.test_search import SLOW_START

QUICK = Effort(Rounds(2, 0), Rounds(1, 0))


class _LostError(Exception):
    pass


class _Ray:
    """As much of Ray as `Remote` uses; calls are made at once."""

    class exceptions:  # noqa: N801
        RayActorError = _LostError

    @staticmethod
    def get(found: Any, timeout: float | None = None) -> Any:
        return found()


class _Method:
    def __init__(self, *results: Any) -> None:
        self.results = list(results)

    def remote(self, *arguments: Any) -> Any:
        result = self.results.pop(0) if len(self.results) > 1 else self.results[0]

        def get() -> Any:
            if isinstance(result, Exception):
                raise result
            return result

        return get


class _Actor:
    def __init__(self, device: str, evaluation: Any, comparison: Any) -> None:
        self.about = _Method({"device": device})
        self.evaluate = _Method(*evaluation)
        self.challenge = self.confirm = _Method(comparison)


def _comparison(verdict: str, gain: float) -> Comparison:
    return Decision(verdict, gain, 20, ""), {}


def _remotes(*actors: _Actor) -> list[Any]:
    notes: list[str] = []
    return [cluster.Remote(_Ray, actor, notes.append) for actor in actors]


def test_a_candidate_that_ends_its_workers_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_AGAIN", 0.0)
    good = Evaluation(True, "timing", "", 1.5)
    once = _Actor("a", [_LostError("gone"), good], _comparison(WON, 0.1))
    always = _Actor("a", [_LostError("gone")], _LostError("gone"))
    first, second = _remotes(once, always)
    assert first.evaluate(Candidate()) == good
    found = second.evaluate(Candidate())
    assert (found.ok, found.stage) == (False, "worker")
    assert second.challenge(Candidate(), Candidate())[0].verdict == LOST


def test_devices_of_several_classes_agree_on_a_winner() -> None:
    def actor(device: str, speedup: float, verdict: str = WON, ok: bool = True) -> _Actor:
        return _Actor(device, [Evaluation(ok, "timing", "", speedup)], _comparison(verdict, 0.1))

    alike = cluster.grouped(_remotes(actor("a", 1.0), actor("a", 1.0)))
    assert len(alike) == 2
    (mixed,) = cluster.grouped(_remotes(actor("a", 2.0), actor("b", 8.0)))
    assert mixed.evaluate(Candidate()).speedup == pytest.approx(4.0)
    assert mixed.challenge(Candidate(), Candidate())[0].verdict == WON
    (apart,) = cluster.grouped(_remotes(actor("a", 2.0), actor("b", 0.5, LOST)))
    assert apart.confirm(Candidate(), Candidate())[0].verdict == LOST
    (wrong,) = cluster.grouped(_remotes(actor("a", 2.0), actor("b", 3.0, ok=False)))
    assert not wrong.evaluate(Candidate()).ok


def test_the_package_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, nursery: Nursery, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    path = tmp_path / "task.py"
    path.write_text(SLOW_START)
    with (
        pytest.raises(MissingDependencyError, match=r"foveal\[cluster\]"),
        cluster.workers(read_task(path, nursery), 1),
    ):
        pass


def test_a_lock_of_a_machine_is_held_once() -> None:
    order = []
    name = f"test-{os.getpid()}"

    def hold(number: int) -> None:
        with cluster.NodeLock(name):
            order.append(number)
            time.sleep(0.02)
            order.append(number)

    threads = [threading.Thread(target=hold, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cluster.NodeLock(name).path.unlink()
    assert all(order[i] == order[i + 1] for i in (0, 2, 4))


@pytest.mark.slow
def test_a_search_survives_the_loss_of_a_worker(nursery: Nursery, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    path = tmp_path / "slow_start.py"
    path.write_text(SLOW_START.replace("[40, 1]", "[40, 1, 2, 3, 4, 5, 6, 8]"))
    task = read_task(path, nursery)
    lost: list[str] = []
    with (
        cluster.workers(task, 2, effort=QUICK, patience=60.0, note=lost.append) as found,
        Archive(tmp_path / "a.db") as archive,
    ):
        pids = [each.about()["pid"] for each in found if isinstance(each, cluster.Remote)]
        search = Search(task, archive, found, strategy("random"), 3)
        killed = threading.Event()

        def kill() -> None:
            while archive_size(tmp_path / "a.db") < 3:
                time.sleep(0.2)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[0], signal.SIGKILL)
            killed.set()

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        search.run(150.0, most=8)
        assert killed.wait(10)
        entries = archive.entries(evaluated=True)
        assert archive.check() == "ok"
        assert len(entries) == 8
        assert [e.evaluation.reason for e in entries if e.evaluation] == [""] * 8
        champion = archive.champion()
        assert champion is not None
        assert champion.candidate.params["turns"] != 40
    assert lost


def archive_size(path: Path) -> int:
    """Candidates that were judged."""
    with Archive(path, readonly=True) as archive:
        return len(archive.entries(evaluated=True))
