"""Kills a search again and again and compares what it ends with; run by test_archive."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

from foveal.search.acceptance import LOST, WON, Decision
from foveal.search.archive import Archive, Evaluation
from foveal.search.candidate import Candidate
from foveal.search.controller import Search
from foveal.search.evaluator import Comparison
from foveal.search.space import Point, Space, steps
from foveal.search.strategies import strategy
from foveal.search.task import Case, Input, Task

MOST = {"evolution": 60, "bayes": 25}
SPACE = Space(tuple(steps(name, *range(8)) for name in "abc"))


def task() -> Task:
    program = {"kind": "template", "module": "none", "options": {}}
    case = Case("only", (Input("x", (1,), "float32"),))
    return Task("planted", program, (case,), program, SPACE)


def speedup(point: Point) -> float:
    a, b, c = (float(point[name]) for name in "abc")
    return 2 * math.exp(-((a - 5) ** 2 + (b - 2) ** 2 + (c - 6) ** 2) / 40)


class Planted:
    """Known speed-ups on a simulated clock; every step takes a moment, so that kills come anywhere."""

    def evaluate(self, candidate: Candidate) -> Evaluation:
        time.sleep(0.002)
        point = candidate.params
        cell = (int(point["a"]) // 2, int(point["b"]) // 2, 0, 0)
        return Evaluation(True, "timing", "", speedup(point), 1.0, {"operators": 1.0}, cell)

    def challenge(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        time.sleep(0.001)
        gain = 1 - speedup(incumbent.params) / speedup(candidate.params)
        verdict = WON if gain > 0.01 else LOST
        return Decision(verdict, gain, 20, ""), {}

    confirm = challenge


def run(path: Path, recipe: str) -> None:
    with Archive(path) as archive:
        Search(task(), archive, [Planted()], strategy(recipe), 7).run(1e6, most=MOST[recipe])


def contents(path: Path) -> list[object]:
    with Archive(path, readonly=True) as archive:
        judged = [
            (e.id, e.operator, e.evaluation and e.evaluation.speedup) for e in archive.entries()
        ]
        accepted = [(a["candidate"], a["gain"]) for a in archive.accepted()]
        cells = sorted((str(cell), e.id) for cell, e in archive.elites().items())
        return [judged, accepted, cells, archive.spent]


def accepted_in(path: Path) -> list[str]:
    if not path.exists():
        return []
    with Archive(path) as archive:
        return [str(a["candidate"]) for a in archive.accepted()]


def main() -> None:
    folder, wanted, recipe = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    source = random.Random()
    begun = time.perf_counter()
    run(folder / "whole.db", recipe)
    usual = time.perf_counter() - begun
    killed, kills, lost = folder / "killed.db", 0, 0
    while True:
        before = accepted_in(killed)
        pid = os.fork()
        if pid == 0:
            try:
                run(killed, recipe)
            finally:
                os._exit(0)
        if kills < wanted:
            time.sleep(source.uniform(0, 2 * usual / wanted))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)
        after = accepted_in(killed)
        lost += before != after[: len(before)]
        if kills >= wanted and not os.WIFSIGNALED(status):
            break
    with Archive(killed) as archive:
        check = archive.check()
    found = {"kills": kills, "lost": lost, "check": check}
    print(json.dumps(found | {"killed": contents(killed), "whole": contents(folder / "whole.db")}))


if __name__ == "__main__":
    main()
