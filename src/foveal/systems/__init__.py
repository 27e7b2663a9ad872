"""The catalogue: every paper by its name.  Families load on first use."""

from __future__ import annotations

import importlib

from foveal._errors import UnknownNameError
from foveal.systems.base import Check, Identity, System, Tool

__all__ = ["Check", "Identity", "System", "Tool", "system", "systems", "tool", "tools"]

_FAMILIES = (
    "locality",
    "state",
    "convolution",
    "local_linear",
    "sparse",
    "cache",
)


def system(name: str) -> System:
    """The entry of that name; raises UnknownNameError, with close matches, when there is none."""
    entries = {entry.name: entry for entry in systems()}
    if not isinstance(name, str) or name not in entries:
        raise UnknownNameError("system", name, tuple(entries))
    return entries[name]


def systems(family: str | None = None) -> tuple[System, ...]:
    """All entries, or those of one family, in the order in which the families list them."""
    if family is not None and family not in _FAMILIES:
        raise UnknownNameError("family", family, _FAMILIES)
    chosen = _FAMILIES if family is None else (family,)
    modules = (importlib.import_module(f"foveal.systems.{each}") for each in chosen)
    return tuple(entry for module in modules for entry in module.SYSTEMS)


def tool(name: str) -> Tool:
    """The tool of that name, for papers on making and judging kernels; raises UnknownNameError."""
    entries = {entry.name: entry for entry in tools()}
    if name not in entries:
        raise UnknownNameError("tool", name, tuple(entries))
    return entries[name]


def tools() -> tuple[Tool, ...]:
    """Entries of the catalogue that are no operators."""
    found: tuple[Tool, ...] = importlib.import_module("foveal.systems.search").TOOLS
    return found
