"""Which engine family computes a score: its implementations, and the form in which they see the score."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from foveal.engines.tile import cpu, hopper, reference, sdpa, triton
from foveal.scores.base import Form, Geometry, Score
from foveal.scores.entmax import collect_entmax, entmax_form
from foveal.scores.local_linear import collect_local, local_form
from foveal.scores.normal import collect, normal_form


@dataclass(frozen=True)
class Family:
    """Implementations in the order in which they are asked; the first that does not refuse runs.

    form: checks a score against a problem and gives its form; collect: the same for a score whose like
    was checked before.
    """

    implementations: dict[str, ModuleType]
    form: Callable[[Score, int, Geometry], Form]
    collect: Callable[[Score, int], Form]


TILE_IMPLEMENTATIONS: dict[str, ModuleType] = {
    "hopper": hopper,
    "triton": triton,
    "sdpa": sdpa,
    "cpu": cpu,
    "reference": reference,
}

# Families beside the tile engine are imported when a score asks for them.
_FORMS: dict[str, tuple[tuple[str, ...], Callable[..., Form], Callable[..., Form]]] = {
    "entmax": (("triton", "cpu", "reference"), entmax_form, collect_entmax),
    "local_linear": (("triton", "cpu", "reference"), local_form, collect_local),
}


@functools.cache
def family(engine: str) -> Family:
    """The family that `engine` of a score names."""
    if engine == "tile":
        return Family(TILE_IMPLEMENTATIONS, normal_form, collect)
    names, form, known = _FORMS[engine]
    modules = {n: importlib.import_module(f"foveal.engines.{engine}.{n}") for n in names}
    return Family(modules, form, known)
