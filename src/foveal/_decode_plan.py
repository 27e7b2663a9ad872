"""Which implementation runs a decode, and why the others do not."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from foveal._errors import RefusedError, UnknownNameError
from foveal.engines.decode import cpu, lean, reference, triton
from foveal.engines.decode.problem import DecodeProblem, Terms

# Asked in this order; the first that does not refuse runs.
DECODE_IMPLEMENTATIONS: dict[str, ModuleType] = {
    "triton": triton,
    "lean": lean,
    "cpu": cpu,
    "reference": reference,
}


@dataclass(frozen=True)
class DecodePlan:
    """What will run, and a sentence per refusal."""

    implementation: str
    refusals: tuple[tuple[str, str], ...]
    module: ModuleType


def choose_decode(problem: DecodeProblem, terms: Terms, implementation: str | None) -> DecodePlan:
    """The first implementation that does not refuse; a named one runs or raises RefusedError."""
    if implementation is not None:
        if implementation not in DECODE_IMPLEMENTATIONS:
            raise UnknownNameError("implementation", implementation, tuple(DECODE_IMPLEMENTATIONS))
        module = DECODE_IMPLEMENTATIONS[implementation]
        reason = module.refuses(problem, terms)
        if reason is not None:
            raise RefusedError(implementation, reason)
        return DecodePlan(implementation, (), module)
    refusals: list[tuple[str, str]] = []
    for name, module in DECODE_IMPLEMENTATIONS.items():
        reason = module.refuses(problem, terms)
        if reason is None:
            return DecodePlan(name, tuple(refusals), module)
        refusals.append((name, reason))
    raise AssertionError("the reference never refuses")
