"""The archive: places, transactions, one writer, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import foveal
from foveal.errors import FovealError
from foveal.search.acceptance import Decision
from foveal.search.archive import DONE, POISON, QUEUED, RUNNING, Archive, Evaluation
from foveal.search.candidate import Candidate, Proposal, cell_of


def proposal(number: int, operator: str = "random", parents: tuple[str, ...] = ()) -> Proposal:
    return Proposal(Candidate({"n": number}), operator, parents)


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    with Archive(tmp_path / "search.db") as found:
        yield found


def test_candidates_are_taken_in_the_order_they_came(archive: Archive) -> None:
    ids = [archive.add(proposal(n)) for n in range(3)]
    taken = [archive.take() for _ in range(3)]
    assert [entry.id for entry in taken if entry is not None] == ids
    assert archive.take() is None
    assert archive.count(RUNNING) == 3


def test_a_candidate_is_known_by_what_it_is(archive: Archive) -> None:
    assert archive.add(proposal(1)) is not None
    assert archive.add(proposal(1, "mutation")) is None
    assert archive.add(Proposal(Candidate({"n": 1}, "text"), "rewrite")) is not None


def test_what_was_cut_off_comes_back_and_is_set_aside_after_five_kills(archive: Archive) -> None:
    archive.add(proposal(1))
    for expected in (QUEUED, QUEUED, QUEUED, QUEUED, POISON):
        archive.take()
        assert archive.requeue() == 1
        assert archive.count(expected) == 1


def test_a_record_is_whole_or_not_there(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    first = archive.add(proposal(1))
    assert first is not None
    archive.take()
    evaluation = Evaluation(True, "timing", "", 1.5, 2.0, {}, (0, 1, 2, 3))
    broken = Decision("won", 0.1, 20, object())  # type: ignore[arg-type]
    with pytest.raises(Exception):  # noqa: B017, PT011
        archive.record(
            first, evaluation, accepted=(None, 0.0), challenges=((first, "challenge", broken, {}),)
        )
    assert archive.entry(first).evaluation is None
    assert archive.champion() is None
    archive.record(first, evaluation, place=(0, 1, 2, 3), accepted=(None, 0.0))
    champion = archive.champion()
    assert champion is not None
    assert champion.status == DONE
    assert champion.evaluation == evaluation
    assert set(archive.elites()) == {(0, 1, 2, 3)}
    assert archive.spent == 2.0
    assert archive.check() == "ok"


def test_an_elite_is_replaced_only_when_told_so(archive: Archive) -> None:
    for number, speedup in ((1, 1.0), (2, 2.0), (3, 3.0)):
        known = archive.add(proposal(number))
        assert known is not None
        archive.take()
        place = (0, 0, 0, 0) if number != 2 else None
        archive.record(known, Evaluation(True, "timing", "", speedup), place=place)
    elite = archive.elite((0, 0, 0, 0))
    assert elite is not None
    assert elite.candidate.params == {"n": 3}


def test_lessons_are_means_of_their_outcomes(archive: Archive) -> None:
    for gain in (0.1, 0.2, 0.6):
        archive.learn("state", "in place", gain, "cpu")
    (lesson,) = archive.lessons("state")
    assert (lesson.n, round(lesson.mean, 6)) == (3, 0.3)
    assert round(lesson.deviation, 6) == 0.264575


def test_a_second_writer_is_refused(archive: Archive) -> None:
    with pytest.raises(FovealError, match="another search writes"):
        Archive(archive.path)
    with Archive(archive.path, readonly=True) as reader:
        assert reader.count() == 0


def test_an_archive_belongs_to_one_task(archive: Archive) -> None:
    archive.claim("one")
    archive.claim("one")
    with pytest.raises(FovealError, match="another task"):
        archive.claim("two")


def test_cells_come_from_what_was_measured() -> None:
    facts = {"bytes": 1000.0, "compulsory": 100.0, "operators": 5.0, "product_share": 0.6}
    assert cell_of(facts) == (2, 1, 2, 0)
    gpu = {"shared": 0.8, "resident": 2.0, "copies": 1.0, "matrix_share": 0.1}
    assert cell_of(gpu) == (3, 1, 1, 0)


@pytest.mark.parametrize("recipe", ["evolution", pytest.param("bayes", marks=pytest.mark.slow)])
def test_twenty_kills_lose_no_accepted_candidate(recipe: str, tmp_path: Path) -> None:
    """A search that is killed at random moments ends with what an uninterrupted one has."""
    script = Path(__file__).parent / "killed.py"
    root = str(Path(foveal.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "20", recipe],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["kills"] == 20
    assert found["lost"] == 0
    assert found["check"] == "ok"
    assert found["killed"] == found["whole"]
