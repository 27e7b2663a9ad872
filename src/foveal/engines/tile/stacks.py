"""Neighbouring tiles of one shape, whose matrices are cut out of those of a sweep in one go.

Every view costs a turn on the interpreter's lock, for which the worker threads wait.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from foveal.engines.tile.cpu_scores import Chunk
from foveal.engines.tile.walk import Listed, Runs, Tile

Adder = Callable[..., object]


@dataclass(frozen=True)
class Stack:
    """Tiles of equal height, width and mask, each `step` columns behind the one before it.

    `columns` are those of the first tile.
    """

    tiles: tuple[Tile, ...]
    columns: Runs | Listed
    step: int

    def queries(self, x: Tensor) -> Tensor:
        """View [tiles, M, G, rows, D] of x [M, G, R, D]."""
        start, stop = self.tiles[0].rows.start, self.tiles[-1].rows.stop
        rows: Tensor = x[:, :, start:stop].unflatten(2, (-1, self.tiles[0].height))
        return rows.permute(2, 0, 1, 3, 4)

    def of_queries(self, x: Tensor) -> tuple[Tensor, ...]:
        """Per tile [M, G rows, D] of x [M, G, R, D]; views if G is 1."""
        if x.shape[1] > 1:
            return tuple(x[:, :, tile.rows].flatten(1, 2) for tile in self.tiles)
        start, stop = self.tiles[0].rows.start, self.tiles[-1].rows.stop
        rows: tuple[Tensor, ...] = x[:, 0, start:stop].split(self.tiles[0].height, dim=1)
        return rows

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Per tile the view [M, G, rows, D] of x [M, G, R, D], or [M, rows, D] if G is 1."""
        if x.shape[1] > 1:
            return tuple(x[:, :, tile.rows] for tile in self.tiles)
        return self.of_queries(x)

    def of_keys(self, x: Tensor) -> tuple[Tensor, ...]:
        """Per tile [M, columns, D] of x [M, C, D]; views unless columns are gathered."""
        return self.keys(x).unbind()

    def of_keys_transposed(self, x: Tensor) -> tuple[Tensor, ...]:
        """Per tile [M, D, columns] of x [M, C, D]."""
        return self.keys(x).mT.unbind()

    def adders(self, x: Tensor) -> tuple[Adder, ...]:
        """Per tile the function (left, right, alpha) that adds alpha left @ right to its columns of x.

        Shapes: left [M, columns, rows], right [M, rows, D], x [M, C, D].
        """
        if _one_run(self.columns):
            return tuple(view.baddbmm_ for view in self.keys(x).unbind())
        return (functools.partial(self.columns.add_product, x),)

    def keys(self, x: Tensor) -> Tensor:
        """[tiles, M, columns, D] of x [M, C, D]; a view unless columns are gathered."""
        if len(self.tiles) == 1:
            return self.columns.take(x)[None]
        size = (len(self.tiles), len(x), self.columns.width, x.shape[2])
        row = x.stride(1)
        first = x.storage_offset() + row * _start(self.columns)
        return x.as_strided(size, (row * self.step, *x.stride()), first)


def stacks(tiles: Iterable[Tile], chunk: Chunk) -> Iterator[Stack]:
    """The tiles in their order, in as few stacks as they allow."""
    held: list[Tile] = []
    for tile in tiles:
        if held and not _continues(held, tile):
            yield _stack(held, chunk)
            held = []
        held.append(tile)
    if held:
        yield _stack(held, chunk)


def _continues(held: list[Tile], tile: Tile) -> bool:
    last = held[-1]
    if tile.height != last.height or tile.mask is not last.mask:
        return False
    if not _one_run(tile.columns) or not _one_run(last.columns):
        return False
    assert isinstance(tile.columns, Runs)
    assert isinstance(last.columns, Runs)
    if tile.columns.width != last.columns.width or tile.columns.width == 0:
        return False
    return len(held) == 1 or _step(last, tile) == _step(held[0], held[1])


def _one_run(columns: Runs | Listed | Tensor) -> bool:
    return isinstance(columns, Runs) and len(columns.slices) == 1


def _step(before: Tile, after: Tile) -> int:
    return _start(after.columns) - _start(before.columns)


def _start(columns: Runs | Listed | Tensor) -> int:
    assert isinstance(columns, Runs), "gathered columns have no start"
    return int(columns.slices[0].start)


def _stack(tiles: list[Tile], chunk: Chunk) -> Stack:
    columns = tiles[0].columns
    laid = Listed(chunk.of_broadcast(columns)) if isinstance(columns, Tensor) else columns
    return Stack(tuple(tiles), laid, _step(tiles[0], tiles[1]) if len(tiles) > 1 else 0)
