"""A candidate: parameters, and a text where it has one of its own; and the cell that it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from foveal.search.space import Value

Cell = tuple[int, int, int, int]
"""Steps 0 to 3 of memory traffic, residency, kind of work and size of intermediates: see `cell_of`."""

_TRAFFIC = (2.0, 5.0, 12.0)
_OPERATORS = (4, 12, 40)
_PRODUCTS = (0.25, 0.5, 0.75)
_LARGEST = (0.3, 0.8, 2.0)
_SHARED = (0.25, 0.5, 0.75)
_RESIDENT = (2, 3, 5)
_COPIES = (1, 2, 3)


@dataclass(frozen=True)
class Candidate:
    """`params` are values of the space of a task; `text` None is the program that the task starts with."""

    params: Mapping[str, Value] = field(default_factory=dict)
    text: str | None = None

    @property
    def id(self) -> str:
        """SHA-256 of what it is, 16 digits: no candidate is judged twice."""
        text = None if self.text is None else self.text.replace("\r\n", "\n")
        parts = json.dumps([dict(self.params), text], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Proposal:
    """A candidate, which operator made it, out of what, and its one-line reason.

    chance: that it is faster than all before it, where the operator can tell.
    """

    candidate: Candidate
    operator: str
    parents: tuple[str, ...] = ()
    note: str = ""
    chance: float | None = None


def cell_of(facts: Mapping[str, float]) -> Cell:
    """The niche of a candidate, from what was measured on it, never from its text.

    On a GPU: shared memory of a program as a share of what there is; programs that are resident at once;
    how data moves (plain loads, asynchronous copies, bulk copies, bulk copies by warps of their own); share
    of matrix instructions.  Elsewhere: bytes moved over bytes of inputs and outputs; operators called; share
    of bytes that products move; the largest intermediate over the inputs and outputs.
    """
    if "shared" in facts:
        return (
            _step(facts["shared"], _SHARED),
            _step(facts["resident"], _RESIDENT),
            _step(facts["copies"], _COPIES),
            _step(facts["matrix_share"], _PRODUCTS),
        )
    compulsory = max(facts.get("compulsory", 1.0), 1.0)
    return (
        _step(facts.get("bytes", 0.0) / compulsory, _TRAFFIC),
        _step(facts.get("operators", 0.0), _OPERATORS),
        _step(facts.get("product_share", 0.0), _PRODUCTS),
        _step(facts.get("largest", 0.0) / compulsory, _LARGEST),
    )


def _step(value: float, cuts: tuple[float, ...]) -> int:
    return sum(value >= cut for cut in cuts)
