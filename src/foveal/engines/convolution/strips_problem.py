"""Two strips one behind the other, as one filter of two axes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveal._arguments import need_tensors, tensors_or_none
from foveal._errors import ShapeError
from foveal.engines.convolution.problem import Convolution, check_tensors


@dataclass(frozen=True)
class Strips:
    """A filter of images for `convolve`: row, then column; y = column * (between + row * x).

    Shapes: row [F, K_x] along the last axis, column [F, K_y] along the first, each of which serves C / F
    channels in a row; between [C] is added to what the row gives on the grid, None for nothing.
    Cost: K_x + K_y products per channel and token; on a GPU one launch, that writes nothing between
    the strips, where it is estimated to be the faster way.
    Equals: without `between`, the filter [F, K_y, K_x] of column[:, :, None] row[:, None, :].
    Raises foveal.errors.ShapeError where the strips are for different channels.
    """

    row: Tensor
    column: Tensor
    between: Tensor | None = None

    def __post_init__(self) -> None:
        need_tensors(row=self.row, column=self.column)
        tensors_or_none(between=self.between)
        if self.row.dim() != 2 or self.column.dim() != 2 or len(self.row) != len(self.column):
            got = f"row {list(self.row.shape)} and column {list(self.column.shape)}"
            raise ShapeError("filter", got, "[filters, taps] each are needed, as many filters")
        check_tensors(dict(self._named()))

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield "row", self.row
        yield "column", self.column
        if self.between is not None:
            yield "between", self.between

    def outline(self) -> Tensor:
        """A filter [F, K_y, K_x] that takes no memory, of the same shape, dtype and device."""
        window = self.column.shape[1], self.row.shape[1]
        return self.row.new_empty(()).expand(len(self.row), *window)

    def for_channels(self, channels: int) -> Strips:
        """A strip of its own for every channel."""
        if self.between is not None and self.between.shape != (channels,):
            raise ShapeError("between", list(self.between.shape), f"[{channels}] is needed")
        each = channels // max(len(self.row), 1)
        if each == 1:
            return self
        row, column = (t.repeat_interleave(each, dim=0) for t in (self.row, self.column))
        return Strips(row, column, self.between)

    def to(self, dtype: torch.dtype) -> Strips:
        between = None if self.between is None else self.between.to(dtype)
        return Strips(self.row.to(dtype), self.column.to(dtype), between)

    @property
    def needs_grad(self) -> bool:
        return any(tensor.requires_grad for _, tensor in self._named())


def row_of(problem: Convolution) -> Convolution:
    """The first of two convolutions: along the last axis, on the rows of x."""
    return _along(problem, 1, problem.grid)


def column_of(problem: Convolution) -> Convolution:
    """The second: along the first axis, on what the row has left of the last."""
    return _along(problem, 0, (problem.grid[0], problem.out_grid[1]))


def _along(problem: Convolution, axis: int, grid: tuple[int, ...]) -> Convolution:
    def kept(values: tuple[int, ...], other: int) -> tuple[int, ...]:
        return tuple(v if n == axis else other for n, v in enumerate(values))

    return replace(
        problem,
        grid=grid,
        window=kept(problem.window, 1),
        dilation=kept(problem.dilation, 1),
        before=kept(problem.before, 0),
        after=kept(problem.after, 0),
    )
