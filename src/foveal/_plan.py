"""Which implementation runs a problem, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from foveal._errors import RefusedError, UnknownNameError
from foveal._problem import Problem
from foveal.engines.tile import cpu, hopper, reference, sdpa, triton
from foveal.patterns.base import Pattern
from foveal.scores.normal import NormalForm

# Asked in this order; the first that does not refuse runs.
TILE_IMPLEMENTATIONS: dict[str, ModuleType] = {
    "hopper": hopper,
    "triton": triton,
    "sdpa": sdpa,
    "cpu": cpu,
    "reference": reference,
}


@dataclass(frozen=True)
class Plan:
    """What will run: `implementation`, the simplified `pattern`, and a sentence per refusal."""

    implementation: str
    pattern: Pattern
    refusals: tuple[tuple[str, str], ...]


def choose(
    problem: Problem, pattern: Pattern, score: NormalForm, implementation: str | None = None
) -> Plan:
    """The first implementation that does not refuse; a named one runs or raises RefusedError."""
    pattern = pattern.simplify(problem.extent)
    if implementation is not None:
        if implementation not in TILE_IMPLEMENTATIONS:
            raise UnknownNameError("implementation", implementation, tuple(TILE_IMPLEMENTATIONS))
        reason = TILE_IMPLEMENTATIONS[implementation].refuses(problem, pattern, score)
        if reason is not None:
            raise RefusedError(implementation, reason)
        return Plan(implementation, pattern, ())
    refusals: list[tuple[str, str]] = []
    for name, module in TILE_IMPLEMENTATIONS.items():
        reason = module.refuses(problem, pattern, score)
        if reason is None and module is hopper:
            reason = hopper.caveat(pattern)
        if reason is None:
            return Plan(name, pattern, tuple(refusals))
        refusals.append((name, reason))
    raise AssertionError("the reference never refuses")
