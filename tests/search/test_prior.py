"""What kindred kernels let expect, where it comes from, and that a search uses it."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from foveal.errors import FovealError
from foveal.search.acceptance import LOST, WON, Decision
from foveal.search.archive import Archive, Evaluation
from foveal.search.candidate import Candidate, Proposal
from foveal.search.controller import Search
from foveal.search.evaluator import Comparison
from foveal.search.library import TEMPLATES, template_task
from foveal.search.prior import Known, guess, of_archive, read_known, write_known
from foveal.search.space import Point, Space, choice, powers, steps
from foveal.search.strategies import strategy
from foveal.search.task import Case, Input, Task
from foveal.search.templates.tile_traits import known, traits

SPACE = Space(
    (powers("queries", 16, 128, 16), powers("keys", 16, 128, 16), steps("stages", 1, 2, 3))
)


def log_of(point: Point, shift: float = 0.0) -> float:
    q, k = (math.log2(float(point[name])) for name in ("queries", "keys"))
    return 0.4 * abs(q - 6 - shift) + 0.2 * abs(k - 5) + 0.1 * (3 - float(point["stages"]))


def test_the_guess_follows_what_is_known_and_is_nothing_without() -> None:
    points = list(SPACE.points())
    rows = tuple(tuple(SPACE.traits(point)) for point in points)
    one = Known("one", rows, tuple(log_of(point) for point in points))
    two = Known("two", rows, tuple(3 + log_of(point) for point in points))
    found = guess([one, two], rows)
    exact = torch.tensor(one.logs, dtype=torch.float64)
    assert float(torch.corrcoef(torch.stack((found, exact)))[0, 1]) > 0.98
    torch.testing.assert_close(guess([two], rows), guess([one], rows))
    assert guess([], rows).tolist() == [0.0] * len(points)


def test_traits_are_octaves_of_sizes_and_places_of_others() -> None:
    space = Space((powers("a", 16, 128), steps("b", 0, 3, 9), choice("c", "x", "y")))
    first, last = (
        space.traits({"a": a, "b": b, "c": c}) for a, b, c in ((16, 0, "x"), (128, 9, "y"))
    )
    assert first == pytest.approx([4 / 3, 0.0, 0.7, 0.0])
    assert last == pytest.approx([7 / 3, 2 / 2.25, 0.0, 0.7])


def test_tiles_are_alike_by_what_a_program_owns() -> None:
    point = {"queries": 64, "keys": 128, "warps": 4, "stages": 2}
    turned = {**point, "queries": 128, "keys": 64}
    assert traits("forward", point) == traits("backward_kv", turned)
    assert traits("forward", point) == traits("backward_q", point) != traits("forward", turned)


def test_the_shipped_knowledge_ranks_what_was_recorded() -> None:
    kernels = known()
    assert {each.name for each in kernels} >= {"forward/64", "backward_q/64", "backward_kv/64"}
    for own in kernels:
        if len(own.logs) > 20:
            others = [each for each in kernels if each.name != own.name]
            expected = guess(others, own.traits)
            exact = torch.tensor(own.logs, dtype=torch.float64)
            assert float(torch.corrcoef(torch.stack((expected, exact)))[0, 1]) > 0.6
    assert TEMPLATES["tile/causal"].known() == kernels
    assert len(TEMPLATES["tile/causal"].space.traits(TEMPLATES["tile/causal"].space.first)) == 5


def test_tiles_are_timed_at_sizes_of_a_gpu_where_there_is_one() -> None:
    large, small = (template_task("tile/causal", device) for device in ("cuda", "cpu"))
    assert {i.dtype for case in large.cases for i in case.inputs} == {"bfloat16"}
    assert min(case.numbers for case in large.cases_of("timed")) > 2**20
    assert max(case.numbers for case in small.cases) < 2**10
    assert large.key != small.key


def test_knowledge_is_written_and_read(tmp_path: Path) -> None:
    one = Known("one", ((0.5, 1.25), (1.0, 2.0)), (0.1, -0.2))
    write_known([one, one], tmp_path / "known.jsonl")
    assert read_known(tmp_path / "known.jsonl") == [one, one]


class Device:
    """A simulated device."""

    def __init__(self, seed: int, shift: float) -> None:
        self.source, self.shift = random.Random(seed), shift

    def evaluate(self, candidate: Candidate) -> Evaluation:
        noise = self.source.gauss(0, 0.01)
        speedup = math.exp(noise - log_of(candidate.params, self.shift))
        return Evaluation(True, "timing", "", speedup, 1.0, {}, (0, 0, 0, 0))

    def challenge(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        logs = [log_of(each.params, self.shift) for each in (candidate, incumbent)]
        gain = 1 - math.exp(logs[0] - logs[1])
        return Decision(WON if gain > 0.005 else LOST, gain, 20, "", 4.0), {}

    confirm = challenge


def searched(path: Path, shift: float, kernels: list[Known], most: int = 48) -> int:
    """Candidates judged until the best is the champion."""
    program = {"kind": "template", "module": "none", "options": {}}
    case = Case("x", (Input("x", (1,), "float32"),))
    task = Task(f"planted {shift}", program, (case,), program, SPACE)
    best = min(SPACE.points(), key=lambda point: log_of(point, shift))
    with Archive(path) as archive:
        found: list[int] = []

        def watch(state: object) -> None:
            champion = archive.champion()
            if champion is not None and champion.candidate.params == best:
                found.append(len(archive.entries(evaluated=True)))
                run.stop.set()

        run = Search(task, archive, [Device(0, shift)], strategy("bayes"), 0, known=kernels)
        run.run(1e9, watch, most)
        assert archive.champion() is not None
        return found[0] if found else most


def test_a_search_goes_first_where_others_found_something(tmp_path: Path) -> None:
    searched(tmp_path / "a.db", 0.0, [])
    kernels = [of_archive(tmp_path / "a.db", SPACE)]
    assert searched(tmp_path / "b.db", 0.0, kernels) <= 6
    assert searched(tmp_path / "c.db", 1.0, kernels) < 40  # what it knows is wrong by an octave


def test_archives_of_other_parameters_are_refused(tmp_path: Path) -> None:
    searched(tmp_path / "a.db", 0.0, [])
    with pytest.raises(FovealError, match="warps are needed"):
        of_archive(tmp_path / "a.db", Space((powers("warps", 1, 8),)))
    with Archive(tmp_path / "none.db") as archive:
        archive.add(Proposal(Candidate({"queries": 16}), "start"))
    with pytest.raises(FovealError, match="got 0 timed points"):
        of_archive(tmp_path / "none.db", SPACE)


def test_a_likely_better_one_is_judged_before_a_comparison(tmp_path: Path) -> None:
    case = Case("x", (Input("x", (1,), "float32"),))
    program = {"kind": "template", "module": "none", "options": {}}
    task = Task("waiting", program, (case,), program, SPACE)
    with Archive(tmp_path / "a.db") as archive:
        search = Search(task, archive, [Device(0, 0.0)], strategy("bayes"))
        for number, (size, speedup) in enumerate(((16, 1.0), (32, 1.5))):
            archive.add(Proposal(Candidate({**SPACE.first, "queries": size}), "bayes"))
            entry = archive.take()
            assert entry is not None
            evaluation = Evaluation(True, "timing", "", speedup, 1.0)
            archive.record(entry.id, evaluation, accepted=None if number else (None, 0.0))
        due = {}
        for keys, chance in ((32, 0.6), (64, 0.05), (128, None)):
            params = {**SPACE.first, "keys": keys}
            archive.add(Proposal(Candidate(params), "bayes", chance=chance))
            due[chance] = search._due() is not None
        assert due == {0.6: False, 0.05: True, None: False}
        assert search._due(ended=True) is not None
