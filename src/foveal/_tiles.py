"""tiles(): which tiles a pattern visits, as counts and as lists.  `explain` and the benchmark count here."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveal._arguments import named_device, need_tensors, tensors_or_none
from foveal._errors import PatternError
from foveal._host import on_host
from foveal._problem import Problem, describe
from foveal.engines.tile.walk import choose_tile, flat_tile
from foveal.patterns.base import FULL, PARTIAL, SKIPPED, Bounds, Extent, Pattern
from foveal.patterns.dense import Dense
from foveal.patterns.documents import pack
from foveal.tuning.tile import choose_shapes

_GPU_TILE = 128
_PAIRS_AT_ONCE = 2**24


@dataclass(frozen=True)
class TileCounts:
    """Tiles of one problem, counted per list (batch and heads share a list unless they differ).

    q_tile and kv_tile are in tokens per axis; `pairs` counts visible (query, key) pairs exactly, on
    average over the lists, `all_pairs` summed over `lists` lists.
    """

    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    full: int
    partial: int
    total: int
    pairs: int
    lists: int = 1
    all_pairs: int = 0

    @property
    def visited(self) -> int:
        return self.full + self.partial

    @property
    def skipped(self) -> int:
        return self.total - self.visited

    @property
    def speedup_bound(self) -> float:
        """Dense time over this time if every visited tile cost the same."""
        return self.total / self.visited if self.visited else math.inf

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        bound = self.speedup_bound if self.visited else None
        return dataclasses.asdict(self) | {
            "visited": self.visited,
            "skipped": self.skipped,
            "speedup_bound": bound,
        }


@dataclass(frozen=True, eq=False)
class TileList:
    """The tiles that each query tile of a sub-problem visits, in ascending order.

    The sub-problem is one of a kind that occurs once per row of `q_tokens` int64 [count, Lq] and
    `k_tokens` [count, Lk]: the tokens of the whole problem that it takes, in raster order of its own
    grid.  Tiles have sides of q_tile and kv_tile tokens; q_starts int32 [q_tiles, axes] and k_starts
    int32 [lists, q_tiles, n, axes] are their first tokens on that grid, -1 where a list is shorter
    than n; states uint8 [lists, q_tiles, n] are PARTIAL (1), FULL (2), or SKIPPED (0) behind the end.
    `lists` is 1, or batch x heads where they differ.
    """

    pattern: Pattern
    extent: Extent
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    q_tokens: Tensor
    k_tokens: Tensor
    q_starts: Tensor
    k_starts: Tensor
    states: Tensor


@dataclass(frozen=True, eq=False)
class Tiles:
    """What `tiles` found: the counts, and a list per kind of sub-problem."""

    counts: TileCounts
    lists: tuple[TileList, ...] = field(repr=False)

    @property
    def full(self) -> int:
        return self.counts.full

    @property
    def partial(self) -> int:
        return self.counts.partial

    @property
    def skipped(self) -> int:
        return self.counts.skipped

    @property
    def speedup_bound(self) -> float:
        """Dense time over this time if every visited tile cost the same."""
        return self.counts.speedup_bound


@on_host
def tiles(
    q: Tensor,
    k: Tensor,
    pattern: Pattern = Dense(),
    *,
    cu_seqlens: Tensor | None = None,
    device: str = "cpu",
) -> Tiles:
    """The tiles that a call of `attend` visits: full, partial and skipped, as counts and as lists.

    Full tiles need no mask, partial ones do, skipped ones cost nothing; the bound on the speed-up over
    dense attention is all tiles / visited tiles.  Nothing is computed; the counts are those that
    `explain` reports.
    A tile on the CPU is the one that the tiled implementation walks; on a GPU it is the box of 128
    queries by 128 keys that visits fewest, or the blocks of a selection.  Where the pattern is an
    interval on every axis, key tiles on a GPU begin at the first key that a query tile sees.

    Shapes: q [B, *grid, Hq, D], k [B, *grid, Hkv, D]; tensors on the meta device stand for a call on
    `device`.  Returns Tiles with int32 tensors on the CPU.
    Cost: memory of the lists, 4 (1 + axes) bytes per visited tile.
    Raises what `attend` raises for such q, k and pattern.
    """
    need_tensors(q=q, k=k)
    tensors_or_none(cu_seqlens=cu_seqlens)
    if not isinstance(pattern, Pattern):
        raise PatternError("pattern", type(pattern), "a pattern such as fv.Causal() is needed")
    problem, device = describe(q, k, k, return_lse=False), named_device(device)
    if problem.device == "meta":
        problem = dataclasses.replace(problem, device=device)
    if cu_seqlens is not None:
        pattern = pack(pattern, cu_seqlens, problem.extent)
    else:
        pattern.validate(problem.extent)
    pattern.validate_lists(problem.batch, problem.q_heads, problem.kv_heads)
    everything = torch.arange(problem.extent.Lq)[None], torch.arange(problem.extent.Lk)[None]
    lists = _lists(pattern, problem.extent, *everything, _Machine.of(problem))
    return Tiles(count_tiles(pattern, problem), tuple(lists))


def count_tiles(pattern: Pattern, problem: Problem) -> TileCounts:
    """Tiles and pairs of a pattern on the problem's grid."""
    machine = _Machine.of(problem)
    if pattern.depends_on_data:
        return _counted(pattern, problem.extent, machine)
    return _count_static(pattern, problem.extent, machine)


@dataclass(frozen=True)
class _Machine:
    """What decides on tiles: `matrices` of scores (batch x heads) that share them, and the device."""

    matrices: int
    gpu: bool

    @classmethod
    def of(cls, problem: Problem) -> _Machine:
        return cls(problem.batch * problem.q_heads, problem.device == "cuda")

    def box(self, bounds: Bounds) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Query tile and key tile of a separable pattern."""
        if not bounds.extent.Lq or not bounds.extent.Lk:
            return (1,) * len(bounds.lower), (1,) * len(bounds.lower)
        if not self.gpu:
            tile = choose_tile(bounds, self.matrices)
            return tile, tile
        axes = len(bounds.lower)
        sides = (
            min(_GPU_TILE, 1 << max(n - 1, 0).bit_length())
            for n in (bounds.extent.Lq, bounds.extent.Lk)
        )
        chosen = choose_shapes(bounds.lower, bounds.upper, bounds.extent.kv_grid, *sides)
        q_tile, kv_tile = (shape[-axes:] for shape in chosen)
        return q_tile, kv_tile

    def flat(self, pattern: Pattern) -> tuple[int, int]:
        """Query tile and key tile of other patterns."""
        if not self.gpu:
            return flat_tile(pattern)
        q_unit, k_unit = pattern.tile_unit() or (_GPU_TILE, _GPU_TILE)
        return math.gcd(q_unit, _GPU_TILE), math.gcd(k_unit, _GPU_TILE)

    def starts(self, bounds: Bounds, axis: int, own: int, other: int) -> _Axis:
        """Visits of one axis."""
        first_lo, last_lo, first_hi, last_hi = bounds.tile_ends(axis, own)
        begin = first_lo if self.gpu else first_lo // other * other
        count = (-(-(last_hi - begin) // other)).clamp(min=0)
        count = torch.where(last_hi > first_lo, count, 0)
        return _Axis(begin, count, last_lo, first_hi, bounds.extent.kv_grid[axis], other)


@dataclass(frozen=True)
class _Axis:
    """Per query tile of one axis: where its key tiles begin and how many they are, and the keys
    whole[0] <= j < whole[1] that all of its queries see."""

    begin: Tensor
    count: Tensor
    first_whole: Tensor
    stop_whole: Tensor
    length: int
    side: int

    def states(self) -> tuple[Tensor, Tensor]:
        """First keys and states of the key tiles, [q_tiles, n]; behind the end -1 and SKIPPED."""
        number = torch.arange(int(self.count.max()) if len(self.count) else 0)
        start = self.begin[:, None] + self.side * number
        stop = (start + self.side).clamp(max=self.length)
        whole = (start >= self.first_whole[:, None]) & (stop <= self.stop_whole[:, None])
        there = number < self.count[:, None]
        states = torch.where(there, torch.where(whole, FULL, PARTIAL), SKIPPED)
        return torch.where(there, start, -1).to(torch.int32), states.to(torch.uint8)

    def totals(self) -> tuple[int, int]:
        """Visited and full tiles, counted without laying them out."""
        end = self.begin + self.side * self.count
        stop = torch.where(self.stop_whole == self.length, end, self.stop_whole)
        last = (stop.minimum(end) - self.begin) // self.side
        first = -((self.begin - self.first_whole) // self.side)
        full = (last - first.clamp(min=0)).clamp(min=0)
        return int(self.count.sum()), int(torch.where(self.count > 0, full, 0).sum())


@functools.lru_cache(maxsize=256)
def _count_static(pattern: Pattern, extent: Extent, machine: _Machine) -> TileCounts:
    return _counted(pattern, extent, machine)


def _counted(pattern: Pattern, extent: Extent, machine: _Machine) -> TileCounts:
    pattern = pattern.simplify(extent)
    parts = pattern.parts(extent)
    if parts is not None:
        each = [(len(p.q_tokens), _counted(p.pattern, p.extent, machine)) for p in parts]
        return _sum_of_parts(each, extent)
    bounds = pattern.bounds(extent)
    if bounds is not None:
        return _count_boxes(bounds, machine)
    return _count_flat(pattern, extent, machine)


def _count_boxes(bounds: Bounds, machine: _Machine) -> TileCounts:
    q_tile, kv_tile = machine.box(bounds)
    axes = [
        machine.starts(bounds, a, *pair) for a, pair in enumerate(zip(q_tile, kv_tile, strict=True))
    ]
    visited, full = (math.prod(n) for n in zip(*(axis.totals() for axis in axes), strict=True))
    total = _dense_tiles(bounds.extent, q_tile, kv_tile)
    return TileCounts(q_tile, kv_tile, full, visited - full, total, bounds.pairs, 1, bounds.pairs)


def _dense_tiles(extent: Extent, q_tile: tuple[int, ...], kv_tile: tuple[int, ...]) -> int:
    pairs = (*zip(extent.q_grid, q_tile, strict=True), *zip(extent.kv_grid, kv_tile, strict=True))
    return math.prod(-(-max(length, 1) // side) for length, side in pairs)


def _count_flat(pattern: Pattern, extent: Extent, machine: _Machine) -> TileCounts:
    q_tile, kv_tile = machine.flat(pattern)
    states = pattern.tile_map(extent, q_tile, kv_tile)
    lists = math.prod(states.shape[:-2])
    rows = _sizes(extent.Lq, q_tile)
    columns = _sizes(extent.Lk, kv_tile)
    pairs = int(((states == FULL) * rows[:, None] * columns).sum())
    pairs += _visible_in_partial(pattern, extent, states, q_tile, kv_tile)
    full, partial = (int((states == kind).sum()) // lists for kind in (FULL, PARTIAL))
    total = states.numel() // lists
    return TileCounts((q_tile,), (kv_tile,), full, partial, total, pairs // lists, lists, pairs)


def _sizes(length: int, side: int) -> Tensor:
    """Tokens of each tile.  int64 [tiles]"""
    return (length - torch.arange(0, length, side)).clamp(max=side)


def _visible_in_partial(
    pattern: Pattern, extent: Extent, states: Tensor, q_tile: int, kv_tile: int
) -> int:
    """Visible pairs of the partial tiles, many tiles at once."""
    states = states.cpu().reshape(-1, *states.shape[-2:])
    tested = torch.nonzero((states == PARTIAL).any(0))
    if not len(tested):
        return 0
    first_query = extent.Lk - extent.Lq
    count = 0
    for tiles in tested.split(max(_PAIRS_AT_ONCE // (q_tile * kv_tile * len(states)), 1)):
        q = tiles[:, :1] * q_tile + torch.arange(q_tile)
        k = tiles[:, 1:] * kv_tile + torch.arange(kv_tile)
        there = (q < extent.Lq)[:, :, None] & (k < extent.Lk)[:, None]
        q, k = q.clamp(max=extent.Lq - 1) + first_query, k.clamp(max=extent.Lk - 1)
        seen = pattern.allows(q[:, :, None], k[:, None], extent).cpu() & there
        own = states[:, tiles[:, 0], tiles[:, 1]] == PARTIAL
        count += int((seen.reshape(-1, *there.shape).sum((-1, -2)) * own).sum())
    return count


def _sum_of_parts(parts: list[tuple[int, TileCounts]], extent: Extent) -> TileCounts:
    _, largest = max(parts, key=lambda part: part[0] * part[1].pairs)
    dense = -(-extent.Lq // math.prod(largest.q_tile)) * -(-extent.Lk // math.prod(largest.kv_tile))
    full, partial, pairs, all_pairs = (
        sum(count * getattr(each, name) for count, each in parts)
        for name in ("full", "partial", "pairs", "all_pairs")
    )
    tiles = largest.q_tile, largest.kv_tile
    return TileCounts(*tiles, full, partial, dense, pairs, largest.lists, all_pairs)


def _lists(
    pattern: Pattern, extent: Extent, q_tokens: Tensor, k_tokens: Tensor, machine: _Machine
) -> list[TileList]:
    pattern = pattern.simplify(extent)
    parts = pattern.parts(extent)
    if parts is not None:
        found = []
        for part in parts:
            q_own = q_tokens[:, part.q_tokens].flatten(0, 1)
            k_own = k_tokens[:, part.k_tokens].flatten(0, 1)
            found += _lists(part.pattern, part.extent, q_own, k_own, machine)
        return found
    bounds = pattern.bounds(extent)
    if bounds is not None:
        sides = machine.box(bounds)
        boxes = _box_lists(bounds, *sides, machine)
        return [TileList(pattern, bounds.extent, *sides, q_tokens, k_tokens, *boxes)]
    q_tile, kv_tile = machine.flat(pattern)
    starts = _flat_lists(pattern, extent, q_tile, kv_tile)
    return [TileList(pattern, extent.flat(), (q_tile,), (kv_tile,), q_tokens, k_tokens, *starts)]


def _box_lists(
    bounds: Bounds, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], machine: _Machine
) -> tuple[Tensor, Tensor, Tensor]:
    rank = len(q_tile)
    starts, states = torch.zeros(1, 1, 0, dtype=torch.int32), torch.full((1, 1), FULL)
    q_starts = torch.zeros(1, 0, dtype=torch.int32)
    for axis, (own, other) in enumerate(zip(q_tile, kv_tile, strict=True)):
        k_own, own_states = machine.starts(bounds, axis, own, other).states()
        q_own = torch.arange(0, bounds.extent.q_grid[axis], own, dtype=torch.int32)
        q_starts = _pairs(q_starts, q_own[:, None])
        starts = _crossed(starts, k_own[..., None])
        states = torch.minimum(states[:, None, :, None], own_states[None, :, None]).flatten(2)
        states = states.flatten(0, 1)
    starts = torch.where((states == SKIPPED)[..., None], -1, starts)
    order = torch.argsort((states == SKIPPED).to(torch.uint8), dim=-1, stable=True)
    starts = starts.gather(1, order[..., None].expand(*order.shape, rank))
    return q_starts, starts[None], states.gather(1, order)[None].to(torch.uint8)


def _pairs(a: Tensor, b: Tensor) -> Tensor:
    """Rows of a before rows of b, all combinations.  [m n, x + y]"""
    left = a[:, None].expand(-1, len(b), -1)
    return torch.cat([left, b[None].expand(len(a), -1, -1)], dim=-1).flatten(0, 1)


def _crossed(a: Tensor, b: Tensor) -> Tensor:
    """[p q, m n, x + y] of a [p, m, x] and b [q, n, y]."""
    p, m, _ = a.shape
    q, n, _ = b.shape
    left = a[:, None, :, None].expand(p, q, m, n, -1)
    right = b[None, :, None].expand(p, q, m, n, -1)
    return torch.cat([left, right], dim=-1).reshape(p * q, m * n, -1)


def _flat_lists(
    pattern: Pattern, extent: Extent, q_tile: int, kv_tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    states = pattern.tile_map(extent, q_tile, kv_tile).cpu()
    states = states.reshape(-1, *states.shape[-2:])
    width = int((states != SKIPPED).sum(-1).max()) if states.numel() else 0
    order = torch.argsort((states == SKIPPED).to(torch.uint8), dim=-1, stable=True)[..., :width]
    own = states.gather(-1, order)
    starts = torch.where(own == SKIPPED, -1, order * kv_tile).to(torch.int32)
    q_starts = torch.arange(0, extent.Lq, q_tile, dtype=torch.int32)
    return q_starts[:, None], starts[..., None], own
