"""Everything a search knows, in one SQLite file: it may be killed at any moment and goes on from there.

The controller is the only writer, and holds a lock as long as it lives.  What belongs together is written
in one transaction: an accepted candidate is there with its evaluation, its samples and its place, or not
at all.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from foveal._errors import TaskError
from foveal.search.acceptance import Decision
from foveal.search.candidate import Candidate, Cell, Proposal

VERSION = 1
QUEUED, RUNNING, DONE, POISON = "queued", "running", "done", "poison"
_ATTEMPTS = 5

_SCHEMA = """
CREATE TABLE run (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE candidate (
  id TEXT PRIMARY KEY, number INTEGER NOT NULL UNIQUE, params TEXT NOT NULL, text TEXT,
  operator TEXT NOT NULL, parents TEXT NOT NULL, note TEXT NOT NULL,
  status TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL);
CREATE TABLE evaluation (
  candidate TEXT PRIMARY KEY REFERENCES candidate(id), ok INTEGER NOT NULL, stage TEXT NOT NULL,
  reason TEXT NOT NULL, speedup REAL, seconds REAL NOT NULL, facts TEXT NOT NULL, cell TEXT,
  samples TEXT NOT NULL, finished REAL NOT NULL);
CREATE TABLE challenge (
  number INTEGER PRIMARY KEY AUTOINCREMENT, candidate TEXT NOT NULL REFERENCES candidate(id),
  incumbent TEXT NOT NULL REFERENCES candidate(id), kind TEXT NOT NULL, verdict TEXT NOT NULL,
  gain REAL NOT NULL, count INTEGER NOT NULL, reason TEXT NOT NULL, samples TEXT NOT NULL,
  seconds REAL NOT NULL);
CREATE TABLE accepted (
  number INTEGER PRIMARY KEY AUTOINCREMENT, candidate TEXT NOT NULL UNIQUE REFERENCES candidate(id),
  before TEXT REFERENCES candidate(id), gain REAL NOT NULL, speedup REAL NOT NULL, spent REAL NOT NULL,
  at REAL NOT NULL);
CREATE TABLE cell (key TEXT PRIMARY KEY, candidate TEXT NOT NULL REFERENCES candidate(id),
  speedup REAL NOT NULL);
CREATE TABLE transition (
  number INTEGER PRIMARY KEY AUTOINCREMENT, parent TEXT NOT NULL, child TEXT, gain REAL NOT NULL,
  won INTEGER NOT NULL, at REAL NOT NULL);
CREATE TABLE lesson (
  state TEXT NOT NULL, action TEXT NOT NULL, device TEXT NOT NULL, n INTEGER NOT NULL,
  mean REAL NOT NULL, m2 REAL NOT NULL, PRIMARY KEY (state, action, device));
CREATE TABLE prompt (id TEXT PRIMARY KEY, parent TEXT, regions TEXT NOT NULL, uses INTEGER NOT NULL,
  mean REAL NOT NULL, m2 REAL NOT NULL);
CREATE TABLE call (
  number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, request TEXT NOT NULL,
  reply TEXT NOT NULL, tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, cost REAL NOT NULL,
  seconds REAL NOT NULL, prompt TEXT);
CREATE TABLE event (number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, kind TEXT NOT NULL,
  text TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Evaluation:
    """What came out of judging one candidate.

    `speedup` is that over the reference, the geometric mean over the timed cases, None where it was not
    timed; `seconds` is what the judging took; `samples` hold seconds per call by case and program.
    """

    ok: bool
    stage: str
    reason: str = ""
    speedup: float | None = None
    seconds: float = 0.0
    facts: Mapping[str, float] = field(default_factory=dict)
    cell: Cell | None = None
    samples: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A candidate with all that is known of it."""

    id: str
    number: int
    candidate: Candidate
    operator: str
    parents: tuple[str, ...]
    note: str
    status: str
    evaluation: Evaluation | None


@dataclass(frozen=True)
class Lesson:
    """How much an action gained in a state, on average: logarithms of speed-ups, by Welford."""

    state: str
    action: str
    n: int
    mean: float
    deviation: float


class Archive:
    """An archive on disk.  `readonly` for reports while a search runs.

    Raises TaskError when another process writes to it, or it is of another task or version.
    """

    def __init__(self, path: str | Path, *, readonly: bool = False) -> None:
        self.path = Path(path)
        self._lock: Any = None
        if readonly:
            if not self.path.exists():
                raise TaskError(f"{self.path}: there is no archive")
            self._db = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            self._db = sqlite3.connect(self.path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA foreign_keys=ON")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and not readonly:
            self._db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version={VERSION};COMMIT;")
        elif version != VERSION:
            self.close()
            raise TaskError(
                f"{self.path}: got an archive of version {version}; {VERSION} is needed"
            )

    def _locked(self) -> Any:
        lock = self.path.with_name(self.path.name + ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise TaskError(f"{self.path}: another search writes to it") from None
        return lock

    def close(self) -> None:
        self._db.close()
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def setting(self, key: str) -> Any:
        """A value that `keep` stored; None where there is none."""
        row = self._db.execute("SELECT value FROM run WHERE key=?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, key: str, value: Any) -> None:
        """Stores a value for as long as the archive lives."""
        self._db.execute("INSERT OR REPLACE INTO run VALUES (?,?)", (key, json.dumps(value)))

    def claim(self, task: str) -> None:
        """Ties the archive to a task.  Raises TaskError when it is of another one."""
        known = self.setting("task")
        if known is not None and known != task:
            raise TaskError(f"{self.path}: it belongs to another task ({known}); this is {task}")
        self.keep("task", task)

    @property
    def spent(self) -> float:
        """Seconds of search, over all runs, killed ones included."""
        return float(self.setting("spent") or 0.0)

    def add(self, proposal: Proposal) -> str | None:
        """Queues a candidate; its id, or None when it is known already."""
        candidate = proposal.candidate
        if self.knows(candidate.id):
            return None

        def write() -> None:
            self._db.execute(
                "INSERT INTO candidate VALUES (?,?,?,?,?,?,?,?,0,?)",
                (
                    candidate.id,
                    self.count(),
                    json.dumps(dict(candidate.params)),
                    candidate.text,
                    proposal.operator,
                    json.dumps(proposal.parents),
                    proposal.note,
                    QUEUED,
                    time.time(),
                ),
            )
            self.keep("chance", proposal.chance)

        self._transaction(write)
        return candidate.id

    @property
    def chance(self) -> float | None:
        """That the last proposal is the fastest so far, as far as its operator could tell."""
        found = self.setting("chance")
        return None if found is None else float(found)

    def knows(self, candidate: str) -> bool:
        found = self._db.execute("SELECT 1 FROM candidate WHERE id=?", (candidate,)).fetchone()
        return found is not None

    def count(self, status: str | None = None) -> int:
        """Candidates, or those of one status."""
        if status is None:
            row = self._db.execute("SELECT COUNT(*) FROM candidate").fetchone()
        else:
            row = self._db.execute(
                "SELECT COUNT(*) FROM candidate WHERE status=?", (status,)
            ).fetchone()
        return int(row[0])

    def requeue(self) -> int:
        """Returns candidates whose judging was cut off to the queue; how many there were.

        One that was cut off five times is set aside: it may be what ended the process.
        """
        found = self._db.execute(
            "SELECT id, attempts FROM candidate WHERE status=?", (RUNNING,)
        ).fetchall()
        for candidate, attempts in found:
            status = POISON if attempts >= _ATTEMPTS else QUEUED
            self._db.execute("UPDATE candidate SET status=? WHERE id=?", (status, candidate))
        return len(found)

    def take(self) -> Entry | None:
        """The next candidate of the queue, marked as running."""
        row = self._db.execute(
            "SELECT id FROM candidate WHERE status=? ORDER BY number LIMIT 1", (QUEUED,)
        ).fetchone()
        if row is None:
            return None
        self._db.execute(
            "UPDATE candidate SET status=?, attempts=attempts+1 WHERE id=?",
            (RUNNING, row[0]),
        )
        return self.entry(row[0])

    def entry(self, candidate: str) -> Entry:
        return self._entries("WHERE c.id=?", candidate)[0]

    def entries(self, evaluated: bool = False) -> list[Entry]:
        """All candidates in the order they came, or those that were judged."""
        return self._entries("WHERE e.candidate IS NOT NULL" if evaluated else "")

    def _entries(self, where: str, *values: object) -> list[Entry]:
        rows = self._db.execute(
            "SELECT c.id, c.number, c.params, c.text, c.operator, c.parents, c.note, c.status, "
            "e.ok, e.stage, e.reason, e.speedup, e.seconds, e.facts, e.cell, e.samples "
            f"FROM candidate c LEFT JOIN evaluation e ON e.candidate=c.id {where} ORDER BY c.number",
            values,
        )
        return [_entry(row) for row in rows]

    def record(
        self,
        candidate: str,
        evaluation: Evaluation,
        *,
        place: Cell | None = None,
        challenges: Sequence[tuple[str, str, Decision, Mapping[str, Any]]] = (),
        accepted: tuple[str | None, float] | None = None,
        transition: tuple[Cell, float] | None = None,
    ) -> None:
        """Stores an evaluation with all that follows from it, in one transaction.

        place: the cell that it takes; challenges: (incumbent, kind, decision, samples); accepted: (the
        champion before, gain) when it is the new champion; transition: (cell of its parent, log of its gain).
        """

        def write() -> None:
            self._db.execute(
                "INSERT OR REPLACE INTO evaluation VALUES (?,?,?,?,?,?,?,?,?,?)",
                (
                    candidate,
                    int(evaluation.ok),
                    evaluation.stage,
                    evaluation.reason,
                    evaluation.speedup,
                    evaluation.seconds,
                    json.dumps(dict(evaluation.facts)),
                    _cell_text(evaluation.cell),
                    json.dumps(evaluation.samples),
                    time.time(),
                ),
            )
            self._compare(candidate, challenges, evaluation.seconds)
            self._promote(candidate, evaluation.speedup, place, accepted)
            if transition is not None:
                self._db.execute(
                    "INSERT INTO transition (parent, child, gain, won, at) VALUES (?,?,?,?,?)",
                    (
                        _cell_text(transition[0]),
                        _cell_text(evaluation.cell),
                        transition[1],
                        int(transition[1] > 0),
                        time.time(),
                    ),
                )
            self._db.execute("UPDATE candidate SET status=? WHERE id=?", (DONE, candidate))

        self._transaction(write)

    def settle(
        self,
        candidate: str,
        speedup: float | None,
        *,
        place: Cell | None = None,
        challenges: Sequence[tuple[str, str, Decision, Mapping[str, Any]]] = (),
        accepted: tuple[str | None, float] | None = None,
    ) -> None:
        """Stores what comparisons said of a candidate that was judged before; arguments as of `record`."""

        def write() -> None:
            self._db.execute(
                "UPDATE evaluation SET speedup=? WHERE candidate=?", (speedup, candidate)
            )
            self._compare(candidate, challenges, 0.0)
            self._promote(candidate, speedup, place, accepted)

        self._transaction(write)

    def contender(self, above: float) -> tuple[Entry, int, float] | None:
        """The fastest candidate by its first timing that was never compared with a champion, if it is at
        least `above` times as fast as the reference; how many were judged after it, and in how many seconds.
        """
        row = self._db.execute(
            "SELECT candidate, rowid FROM evaluation WHERE ok AND speedup >= ? "
            "AND candidate NOT IN (SELECT candidate FROM accepted) AND candidate NOT IN "
            "(SELECT candidate FROM challenge WHERE kind='challenge') "
            "ORDER BY speedup DESC, rowid LIMIT 1",
            (above,),
        ).fetchone()
        if row is None:
            return None
        later, seconds = self._db.execute(
            "SELECT COUNT(*), TOTAL(seconds) FROM evaluation WHERE rowid > ?", (row[1],)
        ).fetchone()
        return self.entry(row[0]), int(later), float(seconds)

    @property
    def comparing(self) -> float | None:
        """Seconds that comparing a candidate with the champion took on average; None: none was."""
        (seconds,) = self._db.execute(
            "SELECT SUM(seconds) / COUNT(DISTINCT candidate) FROM challenge WHERE kind != 'elite'"
        ).fetchone()
        return None if seconds is None else float(seconds)

    def _compare(
        self,
        candidate: str,
        challenges: Sequence[tuple[str, str, Decision, Mapping[str, Any]]],
        seconds: float,
    ) -> None:
        for incumbent, kind, decision, samples in challenges:
            self._db.execute(
                "INSERT INTO challenge (candidate, incumbent, kind, verdict, gain, count, reason, "
                "samples, seconds) VALUES (?,?,?,?,?,?,?,?,?)",
                (
                    candidate,
                    incumbent,
                    kind,
                    decision.verdict,
                    decision.gain,
                    decision.samples,
                    decision.reason,
                    json.dumps(samples),
                    decision.seconds,
                ),
            )
        compared = sum(decision.seconds for _, _, decision, _ in challenges)
        self.keep("spent", self.spent + seconds + compared)

    def _promote(
        self,
        candidate: str,
        speedup: float | None,
        place: Cell | None,
        accepted: tuple[str | None, float] | None,
    ) -> None:
        if place is not None:
            self._db.execute(
                "INSERT OR REPLACE INTO cell VALUES (?,?,?)",
                (_cell_text(place), candidate, speedup or 0.0),
            )
        if accepted is not None:
            self._db.execute(
                "INSERT INTO accepted (candidate, before, gain, speedup, spent, at) "
                "VALUES (?,?,?,?,?,?)",
                (candidate, *accepted, speedup, self.spent, time.time()),
            )

    def champion(self) -> Entry | None:
        """The last accepted candidate."""
        row = self._db.execute(
            "SELECT candidate FROM accepted ORDER BY number DESC LIMIT 1"
        ).fetchone()
        return None if row is None else self.entry(row[0])

    def accepted(self) -> list[dict[str, Any]]:
        """Accepted candidates in order: candidate, before, gain, speedup, spent, at."""
        return self._dicts("SELECT * FROM accepted ORDER BY number")

    def challenges(self, candidate: str | None = None) -> list[dict[str, Any]]:
        """Timed comparisons, of one candidate or all."""
        if candidate is None:
            found = self._dicts("SELECT * FROM challenge ORDER BY number")
        else:
            found = self._dicts(
                "SELECT * FROM challenge WHERE candidate=? ORDER BY number", candidate
            )
        return [{**each, "samples": json.loads(each["samples"])} for each in found]

    def elites(self) -> dict[Cell, Entry]:
        """The best of every cell."""
        rows = self._db.execute("SELECT key, candidate FROM cell ORDER BY key").fetchall()
        return {_cell(key): self.entry(candidate) for key, candidate in rows}

    def elite(self, cell: Cell) -> Entry | None:
        row = self._db.execute(
            "SELECT candidate FROM cell WHERE key=?", (_cell_text(cell),)
        ).fetchone()
        return None if row is None else self.entry(row[0])

    def transitions(self) -> list[dict[str, Any]]:
        """Steps from cell to cell: parent, child, gain (logarithm), won, at."""
        found = self._dicts("SELECT * FROM transition ORDER BY number")
        return [
            {**t, "parent": _cell(t["parent"]), "child": _cell(t["child"]) if t["child"] else None}
            for t in found
        ]

    def learn(self, state: str, action: str, gain: float, device: str) -> None:
        """Adds one outcome of an action in a state."""

        def write() -> None:
            row = self._db.execute(
                "SELECT n, mean, m2 FROM lesson WHERE state=? AND action=? AND device=?",
                (state, action, device),
            ).fetchone()
            n, mean, m2 = row or (0, 0.0, 0.0)
            n += 1
            step = gain - mean
            mean += step / n
            self._db.execute(
                "INSERT OR REPLACE INTO lesson VALUES (?,?,?,?,?,?)",
                (state, action, device, n, mean, m2 + step * (gain - mean)),
            )

        self._transaction(write)

    def lessons(self, state: str | None = None) -> list[Lesson]:
        """What helped, best first: in a state, or anywhere."""
        where, values = ("", ()) if state is None else (" WHERE state=?", (state,))
        rows = self._db.execute(
            f"SELECT state, action, n, mean, m2 FROM lesson{where} ORDER BY mean DESC", values
        )
        return [
            Lesson(row[0], row[1], row[2], row[3], (row[4] / max(row[2] - 1, 1)) ** 0.5)
            for row in rows
        ]

    def log_call(self, entry: Mapping[str, Any]) -> None:
        """A call of a language model, with what it cost."""
        self._db.execute(
            "INSERT INTO call (key, request, reply, tokens_in, tokens_out, cost, seconds, prompt) "
            "VALUES (:key,:request,:reply,:tokens_in,:tokens_out,:cost,:seconds,:prompt)",
            dict(entry),
        )

    def calls(self) -> list[dict[str, Any]]:
        return self._dicts("SELECT * FROM call ORDER BY number")

    def prompts(self) -> list[dict[str, Any]]:
        """Prompts by id: regions, uses, mean gain and its m2."""
        found = self._dicts("SELECT * FROM prompt ORDER BY rowid")
        return [{**each, "regions": json.loads(each["regions"])} for each in found]

    def keep_prompt(self, prompt: Mapping[str, Any]) -> None:
        self._db.execute(
            "INSERT INTO prompt VALUES (:id,:parent,:regions,:uses,:mean,:m2) ON CONFLICT(id) "
            "DO UPDATE SET uses=excluded.uses, mean=excluded.mean, m2=excluded.m2",
            {**prompt, "regions": json.dumps(prompt["regions"])},
        )

    def note(self, kind: str, text: str) -> None:
        """A line for the report."""
        self._db.execute(
            "INSERT INTO event (at, kind, text) VALUES (?,?,?)", (time.time(), kind, text)
        )

    def events(self) -> list[dict[str, Any]]:
        return self._dicts("SELECT * FROM event ORDER BY number")

    def check(self) -> str:
        """ "ok", or what SQLite finds wrong with the file."""
        return str(self._db.execute("PRAGMA integrity_check").fetchone()[0])

    def _transaction(self, write: Callable[[], None]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            write()
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _dicts(self, query: str, *values: object) -> list[dict[str, Any]]:
        cursor = self._db.execute(query, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]


def _entry(row: Sequence[Any]) -> Entry:
    evaluation = None
    if row[8] is not None:
        evaluation = Evaluation(
            bool(row[8]),
            row[9],
            row[10],
            row[11],
            row[12],
            json.loads(row[13]),
            None if row[14] is None else _cell(row[14]),
            json.loads(row[15]),
        )
    candidate = Candidate(json.loads(row[2]), row[3])
    return Entry(
        row[0], row[1], candidate, row[4], tuple(json.loads(row[5])), row[6], row[7], evaluation
    )


def _cell_text(cell: Cell | None) -> str | None:
    return None if cell is None else "".join(map(str, cell))


def _cell(text: str) -> Cell:
    a, b, c, d = map(int, text)
    return a, b, c, d
