"""The Gaussian process and what it expects: identities, and a planted optimum found."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import pytest
import torch

from foveal.search.acceptance import LOST, WON, Decision
from foveal.search.archive import Archive, Evaluation
from foveal.search.candidate import Candidate
from foveal.search.controller import Search
from foveal.search.evaluator import Comparison
from foveal.search.gaussian import Hyper, Posterior, expected_improvement, kernel, sample_hypers
from foveal.search.operators.bayes import Data, improvement
from foveal.search.space import Point, Space, choice, flag, steps
from foveal.search.strategies import strategy
from foveal.search.task import Case, Input, Task

DOUBLE = torch.float64


def process(source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, Hyper]:
    x = torch.rand(12, 3, generator=source, dtype=DOUBLE)
    y = torch.sin(4 * x[:, 0]) + x[:, 1] ** 2
    return x, y, Hyper(torch.tensor([0.4, 0.7, 2.0], dtype=DOUBLE), 1.3, 1e-3, 0.2)


def plainly(x: torch.Tensor) -> Data:
    return Data(x, torch.zeros(len(x), dtype=DOUBLE))


def test_the_posterior_is_the_textbook_formula(source: torch.Generator) -> None:
    x, y, hyper = process(source)
    points = torch.rand(5, 3, generator=source, dtype=DOUBLE)
    mean, deviation = Posterior(x, y, hyper).at(points)
    inverse = torch.linalg.inv(kernel(x, x, hyper) + (1e-3 + 1.3e-10) * torch.eye(12, dtype=DOUBLE))
    cross = kernel(points, x, hyper)
    torch.testing.assert_close(mean[:, 0], 0.2 + cross @ inverse @ (y - 0.2))
    variance = 1.3 - (cross @ inverse * cross).sum(1)
    torch.testing.assert_close(deviation, variance.sqrt())


def test_the_kernel_is_one_formula_of_the_distance() -> None:
    hyper = Hyper(torch.tensor([2.0, 0.5], dtype=DOUBLE), 3.0, 0.0, 0.0)
    x = torch.tensor([[0.0, 0.0]], dtype=DOUBLE)
    z = torch.tensor([[1.0, 0.25]], dtype=DOUBLE)
    r = math.sqrt(0.25 + 0.25)
    expected = 3 * (1 + math.sqrt(5) * r + 5 / 3 * r * r) * math.exp(-math.sqrt(5) * r)
    assert float(kernel(x, z, hyper)) == pytest.approx(expected, rel=1e-12)


def test_expected_improvement_is_a_mean(source: torch.Generator) -> None:
    mean, deviation, best = torch.tensor(0.3, dtype=DOUBLE), torch.tensor(0.7, dtype=DOUBLE), 0.35
    draws = mean + deviation * torch.randn(2_000_000, generator=source, dtype=DOUBLE)
    sampled = float((best - draws).clamp(min=0).mean())
    assert float(expected_improvement(mean, deviation, best)) == pytest.approx(sampled, abs=2e-3)


def test_limits_of_expected_improvement() -> None:
    at = torch.tensor([1.0, 1.0], dtype=DOUBLE)
    tiny = torch.full((2,), 1e-9, dtype=DOUBLE)
    assert expected_improvement(at, tiny, 1.5).tolist() == pytest.approx([0.5, 0.5])
    assert expected_improvement(at, tiny, 0.5).tolist() == pytest.approx([0.0, 0.0])
    s = torch.tensor([0.2, 0.4], dtype=DOUBLE)
    assert expected_improvement(at, s, 1.0).tolist() == pytest.approx(
        [0.2 / math.sqrt(2 * math.pi), 0.4 / math.sqrt(2 * math.pi)]
    )


def test_nothing_pending_is_plain_improvement_and_a_pending_point_is_worth_less(
    source: torch.Generator,
) -> None:
    x, y, hyper = process(source)
    points = torch.rand(30, 3, generator=source, dtype=DOUBLE)
    none = plainly(torch.empty(0, 3, dtype=DOUBLE))
    data, candidates = plainly(x), plainly(points)
    plain = improvement(data, y, candidates, none, [hyper], source)
    posterior = Posterior(x, y, hyper)
    mean, deviation = posterior.at(points)
    best = float(posterior.at(x)[0].min())
    torch.testing.assert_close(plain.gain, expected_improvement(mean[:, 0], deviation, best))
    ahead = torch.special.ndtr((best - 0.005 - mean[:, 0]) / deviation)
    torch.testing.assert_close(plain.chance, ahead)
    first = int(plain.gain.argmax())
    queued = plainly(points[first : first + 1])
    after = improvement(data, y, candidates, queued, [hyper], source)
    assert float(after.gain[first]) < 0.5 * float(plain.gain[first])


def test_a_guess_is_the_mean_that_a_process_is_about(source: torch.Generator) -> None:
    x, y, hyper = process(source)
    points = torch.rand(7, 3, generator=source, dtype=DOUBLE)
    none = plainly(torch.empty(0, 3, dtype=DOUBLE))
    moved = improvement(
        Data(x, torch.full((12,), 0.7, dtype=DOUBLE)),
        y - 0.7,
        Data(points, torch.full((7,), 0.7, dtype=DOUBLE)),
        none,
        [Hyper(hyper.lengths, hyper.amplitude, hyper.noise, hyper.mean - 0.7)],
        source,
    )
    plain = improvement(plainly(x), y, plainly(points), none, [hyper], source)
    torch.testing.assert_close(moved.gain, plain.gain)
    better = Data(points, torch.tensor([-9.0] + [0.0] * 6, dtype=DOUBLE))
    assert int(improvement(plainly(x), y, better, none, [hyper], source).gain.argmax()) == 0


def test_sampled_lengths_tell_what_matters(source: torch.Generator) -> None:
    x = torch.rand(40, 2, generator=source, dtype=DOUBLE)
    y = torch.sin(8 * x[:, 0])
    hypers = sample_hypers(x, y, source)
    assert statistics.median(float(h.lengths[1] / h.lengths[0]) for h in hypers) > 2


SPACE = Space(
    (
        steps("a", *range(8)),
        steps("b", *range(8)),
        steps("c", *range(5)),
        choice("d", "x", "y", "z"),
        flag("e"),
        steps("f", *range(8)),
    ),
    lambda point: (int(point["a"]) * 7 + int(point["f"])) % 31 != 0,
)


def seconds_of(point: Point) -> float:
    a, b, c, f = (float(point[name]) for name in "abcf")
    bowl = (a - 5) ** 2 / 8 + (b - 2) ** 2 / 6 + (c - 3) ** 2 / 4 + (f - 6) ** 2 / 12
    return 1 + bowl + {"x": 1.0, "y": 0.0, "z": 0.4}[str(point["d"])] + 0.5 * (not point["e"])


class Planted:
    """A simulated device with two per cent of noise and points that fail."""

    def __init__(self, seed: int) -> None:
        self.source = random.Random(seed)

    def evaluate(self, candidate: Candidate) -> Evaluation:
        point = candidate.params
        if point["a"] == 7 and point["b"] == 7:
            return Evaluation(False, "compile", "too large", None, 1.0)
        taken = seconds_of(point) * math.exp(self.source.gauss(0, 0.02))
        return Evaluation(True, "timing", "", 5 / taken, 1.0, {}, (0, 0, 0, 0))

    def challenge(self, candidate: Candidate, incumbent: Candidate) -> Comparison:
        gain = 1 - seconds_of(candidate.params) / seconds_of(incumbent.params)
        return Decision(WON if gain > 0.005 else LOST, gain, 20, ""), {}

    confirm = challenge


def evaluations_needed(recipe: str, seed: int, most: int, folder: Path) -> int:
    """Candidates judged until one is within 3 % of the optimum."""
    program = {"kind": "template", "module": "none", "options": {}}
    task = Task("planted", program, (Case("x", (Input("x", (1,), "float32"),)),), program, SPACE)
    with Archive(folder / f"{recipe}{seed}.db") as archive:
        found: list[int] = []

        def watch(state: object) -> None:
            champion = archive.champion()
            if champion is not None and seconds_of(champion.candidate.params) < 1.03:
                found.append(len(archive.entries(evaluated=True)))
                search.stop.set()

        search = Search(task, archive, [Planted(seed)], strategy(recipe), seed)
        search.run(1e9, watch, most)
    return found[0] if found else most


def test_a_planted_optimum_is_found(tmp_path: Path) -> None:
    assert evaluations_needed("full", 1, 120, tmp_path) < 120


@pytest.mark.slow
def test_a_planted_optimum_is_found_far_sooner_than_at_random(tmp_path: Path) -> None:
    ours = [evaluations_needed("full", seed, 120, tmp_path) for seed in range(20)]
    assert sum(count < 120 for count in ours) >= 18
    chance = [evaluations_needed("random", seed, 600, tmp_path) for seed in range(5)]
    assert statistics.median(chance) >= 5 * statistics.median(ours)
