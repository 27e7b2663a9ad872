"""The tiles that the CPU edition visits, in the order in which it visits them.

A sweep lays some queries and keys out as plain matrices; each of its tiles takes some rows of
the one and some columns of the other.  Separable patterns become boxes of the grid that start
where the window starts, so no tile is wider than its rows need; every other pattern becomes
runs of flat key tiles, or per-head lists.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveal.engines.tile.workers import Scratch
from foveal.patterns.base import PARTIAL, SKIPPED, Bounds, Extent, Pattern

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Mask:
    """Pairs of a tile that take no part: each piece hides pairs among some of the columns.

    Pieces are (columns, hidden) with hidden bool [rows, columns of the piece], or [N or 1, heads or
    1, rows, columns] where lists differ.  `blind` marks rows that see no key of the tile [..., rows, 1];
    `width` counts the columns of the tile.
    """

    pieces: tuple[tuple[slice, Tensor], ...]
    blind: Tensor | None
    width: int

    @functools.cached_property
    def additive_pieces(self) -> tuple[tuple[slice, Tensor], ...]:
        """The pieces as -inf where hidden, else 0."""
        return tuple(
            (columns, torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf))
            for columns, hidden in self.pieces
        )

    @functools.cached_property
    def additive(self) -> Tensor:
        """-inf where hidden, else 0.  [..., rows, columns]"""
        pieces = self.additive_pieces
        whole = torch.zeros(*pieces[0][1].shape[:-1], self.width)
        for columns, piece in pieces:
            whole[..., columns] = piece
        return whole


def _mask(hidden: Tensor) -> Mask | None:
    """One piece over all columns, or None when nothing is hidden."""
    width = hidden.shape[-1]
    if width and not bool(hidden.any()):
        return None
    blind = hidden.all(-1, keepdim=True)
    return Mask(((slice(None), hidden),), blind if bool(blind.any()) else None, width)


@dataclass(frozen=True)
class Runs:
    """Columns as runs of neighbouring keys: views, never copies."""

    slices: Slices

    @property
    def width(self) -> int:
        return sum(s.stop - s.start for s in self.slices)

    def take(self, keys: Tensor) -> Tensor:
        """[M, columns, D] of keys [M, C, D]"""
        if len(self.slices) == 1:
            return keys[:, self.slices[0]]
        return torch.cat([keys[:, s] for s in self.slices], dim=1)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
        """total[:, columns] += alpha left [M, columns, rows] @ right [M, rows, D]"""
        widths = [s.stop - s.start for s in self.slices]
        for run, piece in zip(self.slices, left.split(widths, dim=1), strict=True):
            total[:, run].baddbmm_(piece, right, alpha=alpha)


@dataclass(frozen=True)
class Listed:
    """Columns as one list of keys per matrix.  index int64 [M, columns]"""

    index: Tensor

    @property
    def width(self) -> int:
        return self.index.shape[-1]

    def take(self, keys: Tensor) -> Tensor:
        return keys.gather(1, self._rows(keys.shape[-1]))

    def add_product(self, total: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> None:
        part = torch.bmm(left, right).mul_(alpha)
        total.scatter_add_(1, self._rows(total.shape[-1]), part)

    def _rows(self, width: int) -> Tensor:
        return self.index[..., None].expand(-1, -1, width)


@dataclass(frozen=True)
class Tile:
    """Rows of a sweep's queries against some of its keys.

    `columns` are runs, or one list of keys per head [N or 1, heads or 1, columns].  `tokens` gives the
    indices of the rows among the queries and of the columns among the keys.
    """

    rows: slice
    columns: Runs | Tensor
    mask: Mask | None
    tokens: Callable[[], tuple[Tensor, Tensor]]

    @property
    def height(self) -> int:
        start, stop = self.rows.start, self.rows.stop
        return int(stop - start)


@dataclass(frozen=True)
class Sweep:
    """A box of the grids laid out as matrices; without slices all tokens.

    `widest` is the number of elements of the largest score matrix among the tiles.
    """

    extent: Extent
    tiles: Iterable[Tile] = field(repr=False)
    widest: int
    q_box: Slices = ()
    k_box: Slices = ()

    def queries(self, tokens: Tensor, scratch: Scratch, name: str) -> Tensor:
        """Matrices [M, G, R, D] of tokens [N, heads, G, Lq, D]: a view where one will do."""
        return _matrices(self._q_view(tokens), 3, scratch, name)

    def keys(self, tokens: Tensor, scratch: Scratch, name: str) -> Tensor:
        """Matrices [M, C, D] of tokens [N, heads, Lk, D]: a view where one will do."""
        return _matrices(self._k_view(tokens), 2, scratch, name)

    def results(self, total: Tensor, scratch: Scratch, name: str) -> Tensor:
        """Unwritten matrices [M, G, R, D] for `store`: total [N, heads, G, Lq, D] itself if it will do."""
        view = self._q_view(total)
        return view[0] if _one_batch_of_matrices(view, 3) else _flattened(view, 3, scratch, name)

    def store(self, total: Tensor, part: Tensor) -> None:
        """total[box] = part [M, G, R, D], as `results` gave it."""
        view = self._q_view(total)
        if not _one_batch_of_matrices(view, 3):
            view.copy_(part.view(view.shape))

    def add_keys(self, total: Tensor, part: Tensor) -> None:
        """total[box] += part [M, C, D]"""
        view = self._k_view(total)
        view.add_(part.view(view.shape))

    def _q_view(self, tokens: Tensor) -> Tensor:
        return _boxed(tokens, self.extent.q_grid, self.q_box)

    def _k_view(self, tokens: Tensor) -> Tensor:
        return _boxed(tokens, self.extent.kv_grid, self.k_box)


def _matrices(view: Tensor, outer: int, scratch: Scratch, name: str) -> Tensor:
    """[M, ..., rows, D] of a view [n, heads, ..., *box, D] with `outer` axes before its box."""
    if _one_batch_of_matrices(view, outer):
        return view[0]
    matrices = _flattened(view, outer, scratch, name)
    matrices.view(view.shape).copy_(view)
    return matrices


def _one_batch_of_matrices(view: Tensor, outer: int) -> bool:
    """Whether products may read view[0] as it stands."""
    return view.shape[0] == 1 and view.dim() == outer + 2 and view.stride(-1) == 1


def _flattened(view: Tensor, outer: int, scratch: Scratch, name: str) -> Tensor:
    """Unwritten contiguous memory for the matrices of a view."""
    rows = math.prod(view.shape[outer:-1])
    shape = (view.shape[0] * view.shape[1], *view.shape[2:outer], rows, view.shape[-1])
    return scratch.take(name, shape, view.dtype)


def _boxed(tokens: Tensor, grid: tuple[int, ...], box: Slices) -> Tensor:
    """View [..., *box, D] of tokens [..., L, D]."""
    index: tuple[Any, ...] = (..., *box, slice(None))
    return tokens.unflatten(-2, grid)[index] if box else tokens


def walk(pattern: Pattern, extent: Extent, heads: int) -> tuple[Sweep, ...]:
    """Every sweep of the pattern; each query belongs to exactly one tile.

    `heads` is the number of score matrices that a tile computes at once (batch x query heads).
    """
    if extent.Lq == 0:
        return ()
    if pattern.depends_on_data:
        return (_listed_sweep(pattern, extent),)
    if _separable(pattern, extent):
        return _box_sweeps(pattern, extent, heads)
    return (_run_sweep(pattern, extent),)


@functools.lru_cache(maxsize=64)
def _separable(pattern: Pattern, extent: Extent) -> bool:
    return pattern.bounds(extent) is not None


class _Tiles(Iterable[Tile]):
    """Tiles that are made anew on every pass, because all their masks together would be large."""

    def __init__(self, make: Callable[[], Iterator[Tile]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Tile]:
        return self._make()


# What a tile costs, in elements of its score matrices: its elements, more the fewer rows share the
# keys they read (products of 18 rows run at half speed, of 64 at nearly full speed), and its calls (of
# the chain of the backward, at D = 64 on two AVX-512 cores).
_CALLS = 5_000
_HALF_SPEED_ROWS = 18
# Queries of one sweep: with their keys they are copied out of the caller's layout once.
_SWEEP_QUERIES = 2048
_SIDES = {1: (16, 32, 64, 96, 128, 256, 512), 2: (4, 8, 12, 16, 32), 3: (2, 4, 8)}


def choose_tile(bounds: Bounds, heads: int) -> tuple[int, ...]:
    """The query tile, per axis, that visits the pattern at the least estimated cost.

    `heads` is the number of score matrices that a tile computes (batch x query heads).
    """
    grid = bounds.extent.q_grid
    options = []
    for axis, length in enumerate(grid):
        sides = sorted({min(side, max(length, 1)) for side in _SIDES[len(grid)]})
        options.append([(side, *_swept(bounds, axis, side)) for side in sides])

    def cost(choice: tuple[tuple[int, int, int], ...]) -> float:
        rows = math.prod(side for side, _, _ in choice)
        elements = math.prod(elements for _, elements, _ in choice)
        tiles = math.prod(tiles for _, _, tiles in choice)
        return heads * elements * (1 + (_HALF_SPEED_ROWS / rows) ** 2) + _CALLS * tiles

    return tuple(side for side, _, _ in min(itertools.product(*options), key=cost))


def _swept(bounds: Bounds, axis: int, side: int) -> tuple[int, int]:
    """Elements (rows x columns summed over tiles) and tiles of one axis."""
    first_lo, _, _, last_hi = bounds.tile_ends(axis, side)
    rows = torch.full_like(first_lo, side)
    if len(rows):
        rows[-1] = len(bounds.lower[axis]) - side * (len(rows) - 1)
    return int((rows * (last_hi - first_lo)).sum()), len(rows)


@dataclass(frozen=True)
class _Span:
    """One tile of one axis: its queries, its keys, and each query's interval as written by `_code`."""

    queries: slice
    keys: slice
    lower: bytes  # counted from the first key
    upper: bytes  # counted from the last key

    @property
    def widths(self) -> tuple[int, int]:
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start


def _code(values: Tensor) -> bytes:
    return values.numpy().tobytes()


def _decode(code: bytes) -> Tensor:
    return torch.frombuffer(bytearray(code), dtype=torch.int64)


def _spans(bounds: Bounds, axis: int, side: int) -> list[_Span]:
    lower, upper = bounds.lower[axis], bounds.upper[axis]
    spans = []
    for start in range(0, len(lower), side):
        stop = min(start + side, len(lower))
        lo, hi = lower[start:stop], upper[start:stop]
        first, last = int(lo[0]), max(int(hi[-1]), int(lo[0]))
        spans.append(
            _Span(slice(start, stop), slice(first, last), _code(lo - first), _code(hi - last))
        )
    return spans


@functools.lru_cache(maxsize=32)
def _box_sweeps(pattern: Pattern, extent: Extent, heads: int) -> tuple[Sweep, ...]:
    bounds = pattern.bounds(extent)
    assert bounds is not None
    extent = bounds.extent
    spans = [_spans(bounds, axis, side) for axis, side in enumerate(choose_tile(bounds, heads))]
    sweeps = []
    for inner in itertools.product(*spans[1:]):
        q_box = tuple(span.queries for span in inner)
        k_box = tuple(span.keys for span in inner)
        rows = math.prod(span.widths[0] for span in inner)
        for outer in _segments(spans[0], rows):
            queries = slice(outer[0].queries.start, outer[-1].queries.stop)
            keys = slice(outer[0].keys.start, outer[-1].keys.stop)
            widest = max(math.prod(math.prod(s.widths) for s in (o, *inner)) for o in outer)
            tiles = _Tiles(functools.partial(_box_tiles, extent, outer, inner))
            sweeps.append(Sweep(extent, tiles, widest, (queries, *q_box), (keys, *k_box)))
    return tuple(sweeps)


def _segments(spans: list[_Span], rows: int) -> Iterator[list[_Span]]:
    """Neighbouring spans whose queries (times `rows`) stay few enough to be laid out in cache."""
    count = max(1, _SWEEP_QUERIES // (rows * spans[0].widths[0]))
    for start in range(0, len(spans), count):
        yield spans[start : start + count]


def _box_tiles(extent: Extent, outer: list[_Span], inner: tuple[_Span, ...]) -> Iterator[Tile]:
    q_index = torch.arange(extent.Lq).view(extent.q_grid)
    k_index = torch.arange(extent.Lk).view(extent.kv_grid)
    q_width = math.prod(span.widths[0] for span in inner)
    k_width = math.prod(span.widths[1] for span in inner)
    q_first, k_first = outer[0].queries.start, outer[0].keys.start
    for span in outer:
        chosen = (span, *inner)
        rows = slice(
            (span.queries.start - q_first) * q_width, (span.queries.stop - q_first) * q_width
        )
        columns = slice((span.keys.start - k_first) * k_width, (span.keys.stop - k_first) * k_width)
        yield Tile(
            rows,
            Runs((columns,)),
            _box_mask(chosen),
            functools.partial(_box_tokens, q_index, k_index, chosen),
        )


def _box_tokens(
    q_index: Tensor, k_index: Tensor, spans: tuple[_Span, ...]
) -> tuple[Tensor, Tensor]:
    return (
        q_index[tuple(span.queries for span in spans)].flatten(),
        k_index[tuple(span.keys for span in spans)].flatten(),
    )


def _box_mask(spans: tuple[_Span, ...]) -> Mask | None:
    if len(spans) == 1:
        mask = _edge_mask(spans[0].lower, spans[0].upper, spans[0].widths[1])
        if mask is not None:
            return mask if mask.pieces else None
    return _product_mask(tuple((s.lower, s.upper, s.widths[1]) for s in spans))


@functools.lru_cache(maxsize=64)
def _edge_mask(lower: bytes, upper: bytes, width: int) -> Mask | None:
    """One axis: keys before some rows' windows and after others'; None where the two overlap."""
    lo, hi = _decode(lower), _decode(upper)
    head, tail = int(lo[-1]), -int(hi[0])
    if head + tail > width or head == width:
        return None
    pieces = []
    if head:
        pieces.append((slice(0, head), torch.arange(head) < lo[:, None]))
    if tail:
        pieces.append((slice(width - tail, width), torch.arange(-tail, 0) >= hi[:, None]))
    blind = (lo >= hi + width)[:, None]
    return Mask(tuple(pieces), blind if bool(blind.any()) else None, width)


@functools.lru_cache(maxsize=32)
def _product_mask(axes: tuple[tuple[bytes, bytes, int], ...]) -> Mask | None:
    """The product of the axes' intervals as [rows, columns], or None when nothing is hidden."""
    rank = len(axes)
    visible = torch.ones((1,) * (2 * rank), dtype=torch.bool)
    for axis, (lower, upper, width) in enumerate(axes):
        lo, hi = _decode(lower)[:, None], _decode(upper)[:, None] + width
        column = torch.arange(width)
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = len(lo), width
        visible = visible & ((column >= lo) & (column < hi)).view(shape)
    rows = math.prod(visible.shape[:rank])
    return _mask(~visible.reshape(rows, math.prod(visible.shape[rank:])))


def _pair(q_tokens: Tensor, k_tokens: Tensor) -> tuple[Tensor, Tensor]:
    return q_tokens, k_tokens


def flat_tile(pattern: Pattern) -> tuple[int, int]:
    """Query and key tile of patterns that are walked in raster order."""
    return pattern.tile_unit() or (64, 64)


def _run_sweep(pattern: Pattern, extent: Extent) -> Sweep:
    q_tile, kv_tile = flat_tile(pattern)
    states = _states(pattern, extent)
    widest = q_tile * kv_tile * int((states != SKIPPED).sum(-1).max())
    tiles = _Tiles(functools.partial(_run_tiles, pattern, extent, states))
    return Sweep(extent.flat(), tiles, widest)


@functools.lru_cache(maxsize=32)
def _states(pattern: Pattern, extent: Extent) -> Tensor:
    return pattern.tile_map(extent, *flat_tile(pattern))


def _run_tiles(pattern: Pattern, extent: Extent, states: Tensor) -> Iterator[Tile]:
    q_tile, kv_tile = flat_tile(pattern)
    q_pos, k_pos = extent.q_positions(), extent.k_positions()
    for row, state in enumerate(states):
        rows = slice(row * q_tile, min((row + 1) * q_tile, extent.Lq))
        seen = torch.nonzero(state != SKIPPED)[:, 0].tolist()
        runs = tuple(
            slice(first * kv_tile, min((last + 1) * kv_tile, extent.Lk))
            for first, last in _runs(seen)
        )
        k_tokens = torch.cat([k_pos[run] for run in runs]) if runs else k_pos[:0]
        mask = None
        if bool((state == PARTIAL).any()):
            mask = _mask(~pattern.allows(q_pos[rows, None], k_tokens[None], extent))
        own = torch.arange(rows.start, rows.stop)
        yield Tile(
            rows, Runs(runs or (slice(0, 0),)), mask, functools.partial(_pair, own, k_tokens)
        )


def _runs(ascending: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive integers."""
    for _, group in itertools.groupby(enumerate(ascending), lambda pair: pair[1] - pair[0]):
        members = [value for _, value in group]
        yield members[0], members[-1]


def _listed_sweep(pattern: Pattern, extent: Extent) -> Sweep:
    q_tile, kv_tile = flat_tile(pattern)
    states = pattern.tile_map(extent, q_tile, kv_tile)
    widest = q_tile * kv_tile * int((states != SKIPPED).sum(-1).max()) if states.numel() else 0
    tiles = _Tiles(functools.partial(_listed_tiles, pattern, extent, states))
    return Sweep(extent.flat(), tiles, widest)


def _listed_tiles(pattern: Pattern, extent: Extent, states: Tensor) -> Iterator[Tile]:
    """Per query tile, the key tiles that each head visits; states [N or 1, heads, q_tiles, kv_tiles]."""
    q_tile, kv_tile = flat_tile(pattern)
    within = torch.arange(kv_tile)
    for row, state in enumerate(states.unbind(2)):
        rows = slice(row * q_tile, min((row + 1) * q_tile, extent.Lq))
        order = torch.argsort((state == SKIPPED).to(torch.uint8), dim=-1, stable=True)
        chosen = order[..., : int((state != SKIPPED).sum(-1).max()) if state.numel() else 0]
        padding = state.gather(-1, chosen) == SKIPPED
        k_tokens = (chosen[..., None] * kv_tile + within).flatten(-2)
        outside = (k_tokens >= extent.Lk) | padding.repeat_interleave(kv_tile, dim=-1)
        k_tokens = k_tokens.clamp(max=max(extent.Lk - 1, 0))
        hidden = outside[..., None, :].expand(-1, -1, rows.stop - rows.start, -1)
        if bool((state == PARTIAL).any()):
            q_pos = extent.q_positions()[rows]
            hidden = hidden | ~pattern.allows_listed(q_pos, k_tokens, extent)
        mask = _mask(hidden)
        own = torch.arange(rows.start, rows.stop)
        yield Tile(rows, k_tokens, mask, functools.partial(_pair, own, k_tokens))
