"""The tiled edition on a CPU, with what it estimates tiles by as parameters.

The side of a query tile is the one with the least estimated cost,

    heads elements (1 + (rows_at_half / rows)^2) + calls tiles,

and a sweep copies the keys of `sweep` queries at once: see `foveal.engines.tile.walk`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from foveal._attend import attend
from foveal.engines.tile import walk
from foveal.patterns import Neighborhood, Pattern, Sliding

PATTERNS: dict[str, Pattern] = {
    "sliding": Sliding(255),
    "neighborhood": Neighborhood((9, 9)),
    "volume": Neighborhood((3, 5, 5)),
}

CALLS, ROWS, SWEEP = "_CALLS", "_HALF_SPEED_ROWS", "_SWEEP_QUERIES"
"""The numbers by their names there."""


@dataclass(frozen=True)
class Walk:
    """The numbers of the walk: elements that the calls of a tile cost, rows at which products run at half
    speed, queries of a sweep.  Sweeps that were made with them are kept with them."""

    calls: int = walk._CALLS
    rows: int = walk._HALF_SPEED_ROWS
    sweep: int = walk._SWEEP_QUERIES

    @functools.cached_property
    def _made(self) -> Callable[..., object]:
        return functools.lru_cache(maxsize=32)(walk._box_sweeps.__wrapped__)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within it, calls on this CPU walk so."""
        own = {CALLS: self.calls, ROWS: self.rows, SWEEP: self.sweep, "_box_sweeps": self._made}
        before = {name: getattr(walk, name) for name in own}
        _put(own)
        try:
            yield
        finally:
            _put(before)


def _put(values: Mapping[str, object]) -> None:
    for name, value in values.items():
        setattr(walk, name, value)


def build(
    *, pattern: str, reference: bool = False, calls: int = 0, rows: int = 0, sweep: int = 0
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`attend` with a pattern on a CPU: the reference, or the tiled edition with these numbers."""
    seen = PATTERNS[pattern]
    if reference:
        return lambda q, k, v: attend(q, k, v, seen, implementation="reference")
    chosen = Walk(calls or Walk.calls, rows or Walk.rows, sweep or Walk.sweep)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with chosen.used():
            o: Tensor = attend(q, k, v, seen, implementation="cpu")
        return o

    return run
