"""Which implementation runs a convolution, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from foveal._errors import RefusedError, UnknownNameError
from foveal.engines.convolution import (
    banded,
    cpu,
    library,
    mix_library,
    mix_reference,
    mix_taps,
    mix_triton,
    reference,
    spectral,
    spectral_reference,
    spectral_triton,
    strips_library,
    strips_reference,
    strips_triton,
    triton,
)

# Asked in this order; the first that does not refuse runs.
CONVOLUTION_IMPLEMENTATIONS: dict[str, ModuleType] = {
    "toeplitz": banded,
    "triton": triton,
    "cpu": cpu,
    "torch": library,
    "reference": reference,
}

STRIP_IMPLEMENTATIONS: dict[str, ModuleType] = {
    "triton": strips_triton,
    "in turn": strips_library,
    "reference": strips_reference,
}

MIX_IMPLEMENTATIONS: dict[str, ModuleType] = {
    "triton": mix_triton,
    "taps": mix_taps,
    "torch": mix_library,
    "reference": mix_reference,
}

SPECTRAL_IMPLEMENTATIONS: dict[str, ModuleType] = {
    "triton": spectral_triton,
    "torch": spectral,
    "reference": spectral_reference,
}


@dataclass(frozen=True)
class ConvolutionPlan:
    """What will run, and a sentence per implementation that refused before it."""

    implementation: str
    refusals: tuple[tuple[str, str], ...]


def choose_convolution(
    problem: Any, implementations: Mapping[str, ModuleType], implementation: str | None = None
) -> ConvolutionPlan:
    """The first implementation that does not refuse; a named one runs or raises RefusedError."""
    if implementation is not None:
        if implementation not in implementations:
            raise UnknownNameError("implementation", implementation, tuple(implementations))
        reason = implementations[implementation].refuses(problem)
        if reason is not None:
            raise RefusedError(implementation, reason)
        return ConvolutionPlan(implementation, ())
    refusals: list[tuple[str, str]] = []
    for name, module in implementations.items():
        reason = module.refuses(problem) or module.caveat(problem)
        if reason is None:
            return ConvolutionPlan(name, tuple(refusals))
        refusals.append((name, reason))
    raise AssertionError("the reference never refuses")
