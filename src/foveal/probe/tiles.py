"""What tiles a pattern visits, what that costs, and what would cost less: counted, never run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from foveal._errors import PatternError, UnknownNameError
from foveal.patterns.base import FULL, PARTIAL, Bounds, Extent, Pattern, per_axis
from foveal.patterns.neighborhood import Neighborhood

Start = Literal["grid", "window"]


@dataclass(frozen=True)
class Simulation:
    """Tiles of one head of a problem.

    q_tile and kv_tile are in tokens per axis; `full` tiles hold visible pairs only, `partial` ones
    need a mask, `dense` is the number that dense attention visits; `pairs` of Lq x Lk are visible;
    q_tiles is the number of query tiles, each of which a program works on.
    """

    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    start: Start
    full: int
    partial: int
    dense: int
    pairs: int
    tokens: tuple[int, int]
    q_tiles: int

    @property
    def visited(self) -> int:
        return self.full + self.partial

    @property
    def mask_share(self) -> float:
        """Share of the visited tiles that need a mask."""
        return self.partial / self.visited if self.visited else 0.0

    @property
    def tile_speedup(self) -> float:
        """Dense time over this time if every tile cost the same."""
        return self.dense / self.visited if self.visited else math.inf

    @property
    def flop_speedup(self) -> float:
        """Pairs of dense attention over visible pairs: what tiles of one token would reach."""
        return math.prod(self.tokens) / self.pairs if self.pairs else math.inf

    @property
    def useful(self) -> float:
        """Share of the pairs of the visited tiles that are visible."""
        computed = self.visited * math.prod(self.q_tile) * math.prod(self.kv_tile)
        return self.pairs / computed if computed else 1.0

    @property
    def perfect(self) -> bool:
        """No visited tile needs a mask: every pair that is computed counts."""
        return self.partial == 0


def simulate(
    pattern: Pattern,
    grid: Extent | tuple[int, ...] | int,
    q_tile: int | tuple[int, ...] = 128,
    kv_tile: int | tuple[int, ...] = 128,
    *,
    start: Start = "window",
) -> Simulation:
    """Counts the tiles that boxes of these shapes visit.

    Options: grid of queries and keys alike, or an Extent; a tile is one number of tokens (cut into
    the box that visits fewest, see `best_tiles`) or a side per axis; start "window" lays the first
    key tile of a query tile at the first key that it sees, as the engines here do, "grid" at
    multiples of the tile, as block-sparse kernels do.
    Cost: a few operations per axis and tile; nothing of the size of the mask, except for patterns
    that are not intervals, whose flat tile map is made.
    """
    extent = _extent(grid)
    pattern.validate(extent)
    if isinstance(q_tile, int) or isinstance(kv_tile, int):
        rank = len(extent.kv_grid)
        q_size = q_tile if isinstance(q_tile, int) else math.prod(q_tile)
        kv_size = kv_tile if isinstance(kv_tile, int) else math.prod(kv_tile)
        if rank > 1:
            return best_tiles(pattern, extent, q_size, kv_size, start=start)
        q_tile, kv_tile = (q_size,), (kv_size,)
    return _simulate(pattern, extent, tuple(q_tile), tuple(kv_tile), start)


def best_tiles(
    pattern: Pattern,
    grid: Extent | tuple[int, ...] | int,
    queries: int = 128,
    keys: int = 128,
    *,
    start: Start = "window",
    stack: int = 1,
) -> Simulation:
    """The simulation with the boxes of so many tokens, powers of two per axis, that cost least.

    A masked tile counts as 1.15 tiles.  A pattern that is walked by lists has one shape only.
    Options: stack, boxes of queries one behind the other on the first axis, which make one tile.
    """
    extent = _extent(grid)
    pattern.validate(extent)
    stacked = ((first * stack, *rest) for first, *rest in _boxes(queries, extent.q_grid))
    shapes = itertools.product(stacked, _boxes(keys, extent.kv_grid))
    if not any(inner is not None for _, _, inner in _pieces(pattern, extent)):
        shapes = itertools.islice(shapes, 1)  # type: ignore[assignment]
    found = (_simulate(pattern, extent, *pair, start) for pair in shapes)
    return min(found, key=lambda s: (s.visited + _MASKED * s.partial, s.q_tile, s.kv_tile))


def interior(
    pattern: Pattern,
    grid: Extent | tuple[int, ...] | int,
    q_tile: tuple[int, ...],
    kv_tile: tuple[int, ...],
) -> float:
    """Tile speed-up of the query tile in the middle of the grid, key tiles at multiples of the tile.

    This is the "theoretical maximum" of Generalized Neighborhood Attention (2504.16922); tiles at
    the border, which see no more keys but start elsewhere, are not counted.
    """
    extent = _extent(grid)
    bounds = pattern.bounds(extent)
    if bounds is None:
        raise PatternError("pattern", pattern.key, "a pattern of intervals is needed")
    share = 1.0
    for axis, (own, other) in enumerate(zip(q_tile, kv_tile, strict=True)):
        first_lo, _, _, last_hi = (ends.tolist() for ends in bounds.tile_ends(axis, own))
        middle = len(first_lo) // 2
        visited = -(-last_hi[middle] // other) - first_lo[middle] // other
        share *= -(-bounds.extent.kv_grid[axis] // other) / visited
    return share


@dataclass(frozen=True)
class Machine:
    """What a device does with tiles: measured, not promised.

    rates: FLOP/s of dense attention forward, by head_dim up to that number; masked: the time of a
    masked tile over that of a full one, minus 1; bytes_per_second of a copy; launch: seconds of the
    shortest call; opening: seconds of a program beside its tiles; processors: programs at once.
    Tiles of its kernel: queries of a box and boxes in a stack (by head_dim), keys, where key tiles start.
    """

    name: str
    rates: tuple[tuple[int, float], ...]
    masked: float
    bytes_per_second: float
    launch: float
    opening: float = 0.0
    processors: int = 1
    queries: int = 128
    stacks: tuple[tuple[int, int], ...] = ((256, 1),)
    keys: int = 128
    start: Start = "window"

    def rate(self, head_dim: int) -> float:
        """FLOP/s at a head_dim; past the largest measured one, as there."""
        return _up_to(head_dim, self.rates)

    def tiles(
        self, pattern: Pattern, grid: Extent | tuple[int, ...] | int, head_dim: int
    ) -> Simulation:
        """The best tiles that its kernel has for a pattern."""
        stack = _up_to(head_dim, self.stacks)
        return best_tiles(
            pattern, grid, self.queries, self.keys, start=self.start, stack=int(stack)
        )


def _up_to(head_dim: int, values: tuple[tuple[int, float], ...]) -> float:
    """The value of the first entry that reaches so far, else of the last."""
    return next((value for dim, value in values if head_dim <= dim), values[-1][1])


# Dense and local forward passes in bfloat16 at 16,384 tokens and more: benchmarks/tile_h100.jsonl.
_MASKED = 0.15
MACHINES = (
    Machine(
        "h100",
        ((64, 572e12), (128, 698e12)),
        masked=_MASKED,
        bytes_per_second=3.0e12,
        launch=12e-6,
        opening=3e-6,
        processors=132,
        queries=64,
        stacks=((64, 3), (256, 2)),
    ),
    Machine(
        "h100-triton",
        ((64, 375e12), (128, 436e12)),
        masked=0.25,
        bytes_per_second=3.0e12,
        launch=15e-6,
    ),
)


def machine(name: str) -> Machine:
    """The machine of that name; raises UnknownNameError."""
    known = {each.name: each for each in MACHINES}
    if name not in known:
        raise UnknownNameError("machine", name, tuple(known))
    return known[name]


def predict(
    simulation: Simulation,
    on: Machine,
    heads: int,
    head_dim: int,
    *,
    value_dim: int | None = None,
    batch: int = 1,
    element_bytes: int = 2,
) -> float:
    """Seconds of a forward pass: the larger of the time of its tiles and that of its bytes, + launch.

    A tile takes 2 (D + Dv) FLOPs per pair, masked ones (1 + masked) times as long.  Programs run in
    waves, one on each processor, the last of which takes as long as the others.
    """
    value_dim = head_dim if value_dim is None else value_dim
    weighted = simulation.visited + on.masked * simulation.partial
    per_tile = math.prod(simulation.q_tile) * math.prod(simulation.kv_tile)
    flops = 2 * (head_dim + value_dim) * per_tile * weighted * heads * batch
    moved = sum(simulation.tokens) * (head_dim + value_dim) * heads * batch * element_bytes
    waves = simulation.q_tiles * heads * batch / on.processors
    computing = flops / on.rate(max(head_dim, value_dim))
    if waves:
        computing = math.ceil(waves) * (computing / waves + on.opening)
    return max(computing, moved / on.bytes_per_second) + on.launch


def report(
    pattern: Pattern,
    grid: Extent | tuple[int, ...] | int,
    *,
    heads: int = 1,
    head_dim: int = 128,
    batch: int = 1,
    on: Machine = MACHINES[0],
) -> str:
    """The best tiles of a machine for a pattern, their cost, and advice; lines of text."""
    best = on.tiles(pattern, grid, head_dim)
    seconds = predict(best, on, heads, head_dim, batch=batch)
    lines = [
        f"best tiles of {on.name}: {_sides(best.q_tile)} queries on {_sides(best.kv_tile)} keys",
        f"{best.visited:,} of {best.dense:,} tiles visited, {100 * best.mask_share:.0f} % masked",
        f"{best.tile_speedup:.2f}x over dense by tiles, {best.flop_speedup:.2f}x by FLOPs",
        f"{seconds * 1e3:.3f} ms forward predicted, batch {batch}, {heads} heads of {head_dim}",
    ]
    return "\n".join([*lines, *advice(pattern, grid, on=on)])


def advice(
    pattern: Pattern,
    grid: Extent | tuple[int, ...] | int,
    *,
    on: Machine = MACHINES[0],
    now: Simulation | None = None,
) -> tuple[str, ...]:
    """Sentences on what would make a pattern cheaper, or free of masks, on a machine.

    They name other patterns, not other ways to compute the same one: whether a model bears them is
    not known here.  Empty where nothing is to be gained.
    Options: now, the tiles of today, default the best ones of 128 queries and 128 keys.
    """
    extent = _extent(grid)
    if not isinstance(pattern, Neighborhood) or extent.q_grid != extent.kv_grid:
        return ()
    if now is None:
        now = best_tiles(pattern, extent, start=on.start)
    found = (_whole_stride(pattern, extent, now), _free_window(pattern, extent, now))
    sentences = [sentence for sentence in found if sentence is not None]
    if now.tile_speedup < 1.1:
        sentences.append(
            f"tiles make this {now.tile_speedup:.2f}x of dense attention: Dense() sees more for as much"
        )
    return tuple(sentences)


def _whole_stride(pattern: Neighborhood, extent: Extent, now: Simulation) -> str | None:
    """The smallest stride per axis with which no tile needs a mask, if there is one."""
    if now.perfect:
        return None
    rank = len(extent.kv_grid)
    windows, strides = per_axis(pattern.window, rank), per_axis(pattern.stride, rank)
    best: tuple[Simulation, tuple[int, ...]] | None = None
    q_size, kv_size = math.prod(now.q_tile), math.prod(now.kv_tile)
    for q_tile in _boxes(q_size, extent.q_grid):
        for kv_tile in _boxes(kv_size, extent.kv_grid):
            chosen = []
            for axis in range(rank):
                step = q_tile[axis]
                sides = (strides[axis], *range(step, windows[axis] + 1, step))
                whole = (
                    stride
                    for stride in sides
                    if _axis_is_whole(
                        pattern, extent, axis, stride, q_tile[axis], kv_tile[axis], now.start
                    )
                )
                chosen.append(next(whole, None))
            if None in chosen:
                continue
            stride = tuple(s for s in chosen if s is not None)
            there = _simulate(
                dataclasses.replace(pattern, stride=stride), extent, q_tile, kv_tile, now.start
            )
            if best is None or _least(there, stride) < _least(*best):
                best = there, stride
    if best is None or best[0].visited >= now.visited + _MASKED * now.partial:
        return None
    gain = now.visited / best[0].visited
    return (
        f"stride {_option(best[1])} instead of {_option(strides)} removes all masking: {gain:.2f}x"
    )


def _least(simulation: Simulation, stride: tuple[int, ...]) -> tuple[int, int, int]:
    """Fewest tiles first, then the smallest steps."""
    return simulation.visited, max(stride), math.prod(stride)


@functools.lru_cache(maxsize=4096)
def _axis_is_whole(
    pattern: Neighborhood,
    extent: Extent,
    axis: int,
    stride: int,
    q_side: int,
    kv_side: int,
    start: Start,
) -> bool:
    """Whether no tile of one axis needs a mask when the window moves by `stride`."""
    rank = len(extent.kv_grid)
    values = {name: per_axis(getattr(pattern, name), rank)[axis] for name in ("window", "dilation")}
    causal = pattern.causal[axis] if isinstance(pattern.causal, tuple) else pattern.causal
    border = pattern.border[axis] if isinstance(pattern.border, tuple) else pattern.border
    line = Neighborhood(values["window"], stride, values["dilation"], causal, border)
    along = (extent.kv_grid[axis],)
    return _simulate(line, Extent(along, along), (q_side,), (kv_side,), start).perfect


def _free_window(pattern: Neighborhood, extent: Extent, now: Simulation) -> str | None:
    """The largest window that visits no more tiles than this one."""
    rank = len(extent.kv_grid)
    windows, dilations = per_axis(pattern.window, rank), per_axis(pattern.dilation, rank)
    larger = list(windows)
    for axis, length in enumerate(extent.kv_grid):
        limit = min(length // dilations[axis], windows[axis] + now.kv_tile[axis])
        for window in range(larger[axis] + 1, limit + 1):
            trial = tuple(window if a == axis else w for a, w in enumerate(larger))
            there = dataclasses.replace(pattern, window=trial)
            if _simulate(there, extent, now.q_tile, now.kv_tile, now.start).visited > now.visited:
                break
            larger[axis] = window
    if tuple(larger) == windows:
        return None
    share = 100 * (math.prod(larger) / math.prod(windows) - 1)
    return (
        f"window {_option(tuple(larger))} instead of {_option(windows)} visits no more tiles: "
        f"{share:.0f} % more keys for nothing"
    )


def _extent(grid: Extent | tuple[int, ...] | int) -> Extent:
    if isinstance(grid, Extent):
        return grid
    sizes = per_axis(grid, 1)
    return Extent(sizes, sizes)


@functools.lru_cache(maxsize=4096)
def _simulate(
    pattern: Pattern,
    extent: Extent,
    q_tile: tuple[int, ...],
    kv_tile: tuple[int, ...],
    start: Start,
) -> Simulation:
    full = partial = pairs = programs = 0
    for count, piece, inner in _pieces(pattern, extent):
        tiles = _in_boxes(inner, q_tile, kv_tile, start) if isinstance(inner, Bounds) else None
        if tiles is None:
            tiles = _in_lists(piece[0], piece[1], math.prod(q_tile), math.prod(kv_tile))
        full += count * tiles[0]
        partial += count * (tiles[1] - tiles[0])
        pairs += count * tiles[2]
        programs += count * _query_tiles(piece[1], q_tile)
    dense = math.prod(
        -(-length // side) for length, side in zip(extent.q_grid, q_tile, strict=True)
    ) * math.prod(-(-length // side) for length, side in zip(extent.kv_grid, kv_tile, strict=True))
    tokens = (extent.Lq, extent.Lk)
    return Simulation(q_tile, kv_tile, start, full, partial, dense, pairs, tokens, programs)


def _query_tiles(extent: Extent, q_tile: tuple[int, ...]) -> int:
    """Of a sub-problem, in boxes where it has the axes for them."""
    if len(extent.q_grid) != len(q_tile):
        return -(-extent.Lq // math.prod(q_tile))
    return math.prod(-(-n // side) for n, side in zip(extent.q_grid, q_tile, strict=True))


def _pieces(
    pattern: Pattern, extent: Extent
) -> Iterator[tuple[int, tuple[Pattern, Extent], Bounds | None]]:
    """Independent sub-problems: how many of a kind, what it is, and its intervals if it has some."""
    bounds = pattern.bounds(extent)
    if bounds is not None:
        yield 1, (pattern, extent), bounds
        return
    parts = pattern.parts(extent)
    if not parts:
        yield 1, (pattern, extent), None
        return
    for part in parts:
        for count, piece, inner in _pieces(part.pattern, part.extent):
            yield count * len(part.q_tokens), piece, inner


def _in_boxes(
    bounds: Bounds, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], start: Start
) -> tuple[int, int, int] | None:
    """Full and visited tiles and pairs of intervals; None where the grid has other axes."""
    rank = len(bounds.extent.kv_grid)
    if rank != len(q_tile):
        if rank != 1:
            return None
        q_tile, kv_tile = (math.prod(q_tile),), (math.prod(kv_tile),)
    full = visited = 1
    for axis, (own, other) in enumerate(zip(q_tile, kv_tile, strict=True)):
        if start == "grid":
            seen, whole, _ = bounds.tile_totals(axis, own, other)
        else:
            seen, whole = _from_window(bounds, axis, own, other)
        full, visited = full * whole, visited * seen
    return full, visited, bounds.pairs


def _from_window(bounds: Bounds, axis: int, own: int, other: int) -> tuple[int, int]:
    """Visited and full tiles of one axis when key tiles start at the first key of the query tile."""
    first_lo, last_lo, first_hi, last_hi = bounds.tile_ends(axis, own)
    visited = -((first_lo - last_hi) // other)
    begin = -((first_lo - last_lo) // other)
    stop = (first_hi - first_lo) // other
    return int(visited.clamp(min=0).sum()), int((stop - begin).clamp(min=0).sum())


def _in_lists(pattern: Pattern, extent: Extent, queries: int, keys: int) -> tuple[int, int, int]:
    """Full and visited flat tiles and pairs, per list."""
    unit = pattern.tile_unit()
    if unit is not None:
        queries, keys = math.gcd(queries, unit[0]), math.gcd(keys, unit[1])
    states = pattern.tile_map(extent, queries, keys)
    lists = math.prod(states.shape[:-2])
    pairs = 0
    k_pos = extent.k_positions()
    for rows, state in zip(extent.q_positions().split(queries), states.unbind(-2), strict=True):
        seen = (state > 0).reshape(-1, state.shape[-1]).any(0)
        columns = k_pos[seen.repeat_interleave(keys)[: extent.Lk]]
        pairs += int(pattern.allows(rows[:, None], columns[None], extent).sum())
    full, partial = (int((states == kind).sum()) // lists for kind in (FULL, PARTIAL))
    return full, full + partial, pairs // lists


@functools.lru_cache(maxsize=256)
def _boxes(tokens: int, grid: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Boxes of so many tokens with sides that are powers of two, none twice its axis if possible."""
    if tokens & (tokens - 1) or tokens < 1:
        raise PatternError("tile", tokens, "a power of two is needed")
    sides = [1 << power for power in range(tokens.bit_length())]
    boxes = [b for b in itertools.product(sides, repeat=len(grid)) if math.prod(b) == tokens]
    fitting = [b for b in boxes if all(s < 2 * n for s, n in zip(b, grid, strict=True))]
    return tuple(fitting or boxes)


def _sides(tile: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in tile)


def _option(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else str(values)
