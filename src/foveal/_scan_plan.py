"""Which implementation runs a scan, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from foveal._errors import RefusedError, UnknownNameError
from foveal.engines.state import chunk, reference, triton, two_state
from foveal.engines.state.problem import ScanProblem
from foveal.rules.base import Rule
from foveal.rules.two_state import TwoState

# Asked in this order; the first that does not refuse runs.
STATE_IMPLEMENTATIONS: dict[str, ModuleType] = {
    "triton": triton,
    "chunk": chunk,
    "reference": reference,
}


_TWO_MEMORIES = "it has no kernel for a rule with two memories; the chunk form runs in PyTorch"


@dataclass(frozen=True)
class ScanPlan:
    """What will run, and a sentence per implementation that refused before it."""

    implementation: str
    refusals: tuple[tuple[str, str], ...]
    module: ModuleType


def choose_scan(problem: ScanProblem, rule: Rule, implementation: str | None = None) -> ScanPlan:
    """The first implementation that does not refuse; a named one runs or raises RefusedError."""
    if implementation is not None:
        if implementation not in STATE_IMPLEMENTATIONS:
            raise UnknownNameError("implementation", implementation, tuple(STATE_IMPLEMENTATIONS))
        module = _module(implementation, rule)
        reason = _refusal(module, problem, rule)
        if reason is not None:
            raise RefusedError(implementation, reason)
        return ScanPlan(implementation, (), module)
    refusals: list[tuple[str, str]] = []
    for name in STATE_IMPLEMENTATIONS:
        module = _module(name, rule)
        reason = _refusal(module, problem, rule)
        if reason is None:
            return ScanPlan(name, tuple(refusals), module)
        refusals.append((name, reason))
    raise AssertionError("the reference never refuses")


def _module(name: str, rule: Rule) -> ModuleType:
    """The code behind a name."""
    if name == "chunk" and isinstance(rule, TwoState):
        return two_state
    return STATE_IMPLEMENTATIONS[name]


def _refusal(module: ModuleType, problem: ScanProblem, rule: Rule) -> str | None:
    if module is triton and isinstance(rule, TwoState):
        return _TWO_MEMORIES
    reason: str | None = module.refuses(problem, rule)
    return reason
