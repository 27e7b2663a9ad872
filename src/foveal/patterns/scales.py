"""Several grids in one sequence: the scales of a picture, or pictures of different sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveal._errors import PatternError
from foveal.patterns.base import Bounds, Extent, Part, Pattern, per_axis
from foveal.patterns.neighborhood import Neighborhood

Sees = Literal["own", "before"]
Grid = tuple[int, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Scales(Pattern):
    """A sequence of grids, one after another, each in raster order.

    sees "own": a token sees its own grid; "before": its own and every earlier one; with `window`, the
    neighborhood of its own grid, the window cut to the grid.

    Options: grids, each the side of a square or a size per axis; window in tokens, one for all axes or
    one per axis, with "own" only.
    Equals: one grid and no window is Dense(); "own" is attention of each grid on its own; "before" with
    grids of one token is Causal().
    Cost: the sum of the squared sizes over the square of the sum; half of dense and more with "before".
    Limits: queries and keys are the whole sequence.
    Paper: VAR (2404.02905; before), HMAR (2506.04421; own), MVAR (2505.12742; window).
    """

    grids: tuple[int | Grid, ...]
    sees: Sees = "own"
    window: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.sees not in ("own", "before"):
            raise PatternError("sees", repr(self.sees), "'own' or 'before' is needed")
        if self.window is not None and self.sees == "before":
            raise PatternError("window", self.window, "a window needs sees='own'")
        if not isinstance(self.grids, tuple) or not all(_is_grid(grid) for grid in self.grids):
            raise PatternError("grids", self.grids, "a tuple of sides or grids >= 1 is needed")
        if self.window is not None and not _is_grid(self.window):
            raise PatternError("window", self.window, "integers of at least 1 are needed")

    @property
    def rank(self) -> int:
        return 1

    def each(self) -> list[Grid]:
        """The grids, squares written out."""
        return [(g, g) if isinstance(g, int) else tuple(g) for g in self.grids]

    def validate(self, extent: Extent) -> None:
        Pattern.validate(self, extent)
        total = sum(math.prod(grid) for grid in self.each())
        if extent.Lq != total or extent.Lk != total:
            raise PatternError(
                "grids",
                f"{self.grids}",
                f"{extent.Lq} queries and {extent.Lk} keys are needed, not {total}",
            )
        for _, grid in self._placed():
            self._inside(grid)

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        if self.window is None:
            lower, upper = self._intervals()
            return (k_pos >= lower[q_pos]) & (k_pos < upper[q_pos])
        visible = torch.zeros_like(q_pos + k_pos, dtype=torch.bool)
        for start, grid in self._placed():
            size = math.prod(grid)
            q, k = q_pos - start, k_pos - start
            together = (q >= 0) & (q < size) & (k >= 0) & (k < size)
            local = q.clamp(0, size - 1), k.clamp(0, size - 1)
            visible |= together & self._inside(grid).allows(*local, Extent(grid, grid))
        return visible

    def bounds(self, extent: Extent) -> Bounds | None:
        if self.window is not None:
            return None
        lower, upper = self._intervals()
        return Bounds(extent.flat(), (lower,), (upper,))

    def parts(self, extent: Extent) -> tuple[Part, ...] | None:
        if self.window is None:
            return None
        alike: dict[Grid, list[Tensor]] = {}
        for start, grid in self._placed():
            alike.setdefault(grid, []).append(torch.arange(start, start + math.prod(grid)))
        return tuple(
            Part(self._inside(grid), Extent(grid, grid), torch.stack(tokens), torch.stack(tokens))
            for grid, tokens in alike.items()
        )

    def _placed(self) -> Iterator[tuple[int, Grid]]:
        """Where each grid begins, and its sizes."""
        starts = itertools.accumulate((math.prod(grid) for grid in self.each()), initial=0)
        return zip(starts, self.each(), strict=False)

    def _inside(self, grid: Grid) -> Neighborhood:
        window = per_axis(self.window or max(grid), len(grid))
        return Neighborhood(tuple(min(pair) for pair in zip(window, grid, strict=True)))

    def _intervals(self) -> tuple[Tensor, Tensor]:
        sizes = torch.tensor([math.prod(grid) for grid in self.each()], dtype=torch.int64)
        stop = sizes.cumsum(0)
        start = stop - sizes if self.sees == "own" else torch.zeros_like(stop)
        return start.repeat_interleave(sizes), stop.repeat_interleave(sizes)


def _is_grid(sides: object) -> bool:
    """Whether it is a side or a tuple of them, each at least 1."""
    each = sides if isinstance(sides, tuple) and sides else (sides,)
    return all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in each)
