"""Which implementation runs a scan, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from foveal._errors import RefusedError, UnknownNameError
from foveal.engines.state import chunk, reference, triton
from foveal.engines.state.problem import ScanProblem
from foveal.rules.base import Rule

# Asked in this order; the first that does not refuse runs.
STATE_IMPLEMENTATIONS: dict[str, ModuleType] = {
    "triton": triton,
    "chunk": chunk,
    "reference": reference,
}


@dataclass(frozen=True)
class ScanPlan:
    """What will run, and a sentence per implementation that refused before it."""

    implementation: str
    refusals: tuple[tuple[str, str], ...]


def choose_scan(problem: ScanProblem, rule: Rule, implementation: str | None = None) -> ScanPlan:
    """The first implementation that does not refuse; a named one runs or raises RefusedError."""
    if implementation is not None:
        if implementation not in STATE_IMPLEMENTATIONS:
            raise UnknownNameError("implementation", implementation, tuple(STATE_IMPLEMENTATIONS))
        reason = STATE_IMPLEMENTATIONS[implementation].refuses(problem, rule)
        if reason is not None:
            raise RefusedError(implementation, reason)
        return ScanPlan(implementation, ())
    refusals: list[tuple[str, str]] = []
    for name, module in STATE_IMPLEMENTATIONS.items():
        reason = module.refuses(problem, rule)
        if reason is None and module is triton:
            reason = triton.caveat(problem)
        if reason is None:
            return ScanPlan(name, tuple(refusals))
        refusals.append((name, reason))
    raise AssertionError("the reference never refuses")
