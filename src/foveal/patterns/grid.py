"""Helpers of the patterns that look at the axes of the grid one by one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal._errors import PatternError
from foveal.patterns.base import Extent, Pattern

FAR = 1 << 60
"""Beyond every sequence; a position plus a few of it fits an int64."""


def common_rank(pattern: Pattern, names: tuple[str, ...]) -> int | None:
    """Number of axes that the tuples among the named fields agree on; None without tuples."""
    lengths = {name: len(v) for name in names if isinstance(v := getattr(pattern, name), tuple)}
    if len(set(lengths.values())) > 1:
        raise PatternError(
            type(pattern).__name__, lengths, "options per axis must name the same number of axes"
        )
    rank = next(iter(lengths.values()), None)
    if rank is not None and not 1 <= rank <= 3:
        raise PatternError(
            type(pattern).__name__, f"{rank} axes", "one to three axes are supported"
        )
    return rank


def same_grid(pattern: Pattern, extent: Extent) -> None:
    """Queries and keys on one grid; on one axis the queries may be the last tokens."""
    if extent.q_grid == extent.kv_grid:
        return
    if len(extent.kv_grid) == 1 == len(extent.q_grid) and extent.Lq <= extent.Lk:
        return
    raise PatternError(
        type(pattern).__name__,
        f"queries on {extent.q_grid} and keys on {extent.kv_grid}",
        "the same grid is needed for both (one axis: no more queries than keys)",
    )


def raster(coordinates: list[Tensor], grid: tuple[int, ...]) -> Tensor:
    """Raster positions of every combination of per-axis coordinates.

    coordinates[a] is [parts_a, tokens_a]; returns int64 [prod(parts), prod(tokens)].
    """
    rank = len(grid)
    total = torch.zeros((1,) * (2 * rank), dtype=torch.int64)
    for axis, values in enumerate(coordinates):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = values.shape
        total = total + values.reshape(shape) * math.prod(grid[axis + 1 :])
    count = math.prod(values.shape[0] for values in coordinates)
    return total.reshape(count, math.prod(values.shape[1] for values in coordinates))
