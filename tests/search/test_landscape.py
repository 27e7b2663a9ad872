"""Replays on recorded times, and when a candidate is compared with the champion."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from foveal.search.archive import Archive, Evaluation
from foveal.search.candidate import Candidate, Proposal
from foveal.search.controller import Search
from foveal.search.landscape import (
    Landscape,
    LandscapeEvaluator,
    autotuned,
    bench_seconds,
    read_landscapes,
)
from foveal.search.strategies import strategy
from foveal.search.task import Case, Input, Task

SIZES = (16, 32, 64, 128)


def milliseconds(q: int, k: int) -> float:
    return 1 + 0.2 * (math.log2(q) - 6) ** 2 + 0.1 * (math.log2(k) - 5) ** 2


@pytest.fixture
def landscape(tmp_path: Path) -> Landscape:
    source = random.Random(0)
    start = {"queries": 16, "keys": 16}
    lines = []
    for q in SIZES:
        for k in SIZES:
            times = [
                [milliseconds(*sides) * 1e-3 * math.exp(source.gauss(0, 0.001)) for _ in range(8)]
                for sides in ((q, k), (16, 16))
            ]
            line = {
                "what": "landscape",
                "name": "planted",
                "point": {"queries": q, "keys": k},
                "shipped": start,
                "facts": {"shared": q * k / 2**14, "resident": 2, "copies": 1, "matrix_share": 1},
                "samples": {"point": times[0], "shipped": times[1]},
                "compile_seconds": 2.0,
            }
            lines.append(json.dumps(line))
    path = tmp_path / "landscape.jsonl"
    path.write_text("\n".join([*reversed(lines), json.dumps({"what": "confirm"})]))
    return read_landscapes(path)["planted"]


def task_of(landscape: Landscape) -> Task:
    program = {"kind": "template", "module": "none", "options": {}}
    case = Case("only", (Input("x", (1,), "float32"),))
    return Task("planted", program, (case,), program, landscape.space)


def test_a_landscape_begins_with_what_is_shipped(landscape: Landscape) -> None:
    assert landscape.space.first == {"queries": 16, "keys": 16}
    assert landscape.best.point == {"queries": 64, "keys": 32}
    assert len(list(landscape.space.points())) == 16
    moved = landscape.begun_at(landscape.best)
    assert moved.space.first == {"queries": 64, "keys": 32}
    assert len(moved.places) == 16


@pytest.mark.parametrize("recipe", ["bayes", "random", "evolution"])
def test_a_replayed_search_finds_the_best_and_counts_its_time(
    recipe: str, landscape: Landscape, tmp_path: Path
) -> None:
    evaluator = LandscapeEvaluator(landscape, 1)
    with Archive(tmp_path / "a.db") as archive:
        search = Search(
            task_of(landscape),
            archive,
            [evaluator],
            strategy(recipe),
            1,
            clock=lambda: evaluator.clock,
        )
        search.run(1e6)
        champion = archive.champion()
        assert champion is not None
        assert landscape.at(champion.candidate.params).ratio < landscape.best.ratio * 1.02
        assert archive.spent == pytest.approx(evaluator.clock)
        compared = {c["candidate"] for c in archive.challenges() if c["kind"] == "challenge"}
        assert len(compared) < len(archive.entries(evaluated=True)) / 2


def test_compilers_count_when_they_are_to(landscape: Landscape) -> None:
    device, whole = (LandscapeEvaluator(landscape, 0, compiling) for compiling in (False, True))
    for evaluator in (device, whole):
        evaluator.evaluate(Candidate({"queries": 32, "keys": 32}))
    assert whole.clock == pytest.approx(device.clock + 2.0)


def test_the_autotuner_times_everything(landscape: Landscape) -> None:
    curve = list(autotuned(landscape, 0))
    assert len(curve) == 16
    assert curve[-1][1] == landscape.best.ratio
    assert 0.1 < bench_seconds(0.001) < 0.2


def test_the_best_candidate_waits_for_better_ones(tmp_path: Path) -> None:
    with Archive(tmp_path / "a.db") as archive:
        speedups = [1.0, 1.5, 1.2, 1.4, 0.5]
        for number, speedup in enumerate(speedups):
            archive.add(Proposal(Candidate({"n": number}), "random"))
            entry = archive.take()
            assert entry is not None
            evaluation = Evaluation(True, "timing", "", speedup, 2.0)
            archive.record(entry.id, evaluation, accepted=(None, 0.0) if number == 0 else None)
        found = archive.contender(1.0)
        assert found is not None
        entry, later, seconds = found
        assert entry.candidate.params == {"n": 1}
        assert (later, seconds) == (3, 6.0)
        assert archive.comparing is None
        assert archive.contender(1.6) is None
