"""What the solves of local linear attention reached on given tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from foveal._errors import ScoreError
from foveal._plan import prepare
from foveal.patterns.base import Pattern
from foveal.patterns.dense import Dense
from foveal.scores.local_linear import LocalForm, LocalLinear


@dataclass(frozen=True)
class SolveReport:
    """How the tiles of a forward were solved.

    iterations: per tile of queries, or per query those of its tile; ratio: the largest residual, or
    estimate of rounding noise, over what the tolerance allows, at most 1 where all is solved;
    unfinished: how many rows (tiles, on the CPU) stay above it, because max_iterations ended them or
    because the precision ends before the tolerance.
    """

    implementation: str
    iterations: tuple[int, ...]
    ratio: float
    unfinished: int

    @property
    def mean_iterations(self) -> float:
        return sum(self.iterations) / len(self.iterations) if self.iterations else 0.0

    @property
    def most_iterations(self) -> int:
        return max(self.iterations, default=0)

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.implementation}: {self.mean_iterations:.1f} iterations per tile, at most "
            f"{self.most_iterations}; residual {self.ratio:.2g} of what the tolerance allows, "
            f"{self.unfinished} above it"
        )


def solve_report(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = Dense(),
    score: LocalLinear | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    implementation: str | None = None,
) -> SolveReport:
    """Runs the forward of `attend` with a LocalLinear score and says how its solves went.

    Shapes: as `attend`.
    Limits: "reference" solves directly and has nothing to report: ScoreError, as for another score.
    """
    score = LocalLinear() if score is None else score
    if not isinstance(score, LocalLinear):
        raise ScoreError("score", type(score), "a LocalLinear is needed: only it solves")
    prepared = prepare(q, k, v, pattern, score, cu_seqlens, False, implementation)
    name = prepared.plan.implementation
    if not hasattr(prepared.module, "solved"):
        raise ScoreError("implementation", name, "one that iterates is needed")
    form = prepared.form(score)
    assert isinstance(form, LocalForm)
    flat = (x.detach().flatten(1, -3) for x in (q, k, v))
    _, _, solution = prepared.module.solved(
        prepared.problem, prepared.plan.pattern, form, prepared.geometry, *flat
    )
    ratios = solution.ratios
    unfinished = sum(ratio > 1 for ratio in ratios)
    return SolveReport(name, tuple(solution.iterations), max(ratios, default=0.0), unfinished)
