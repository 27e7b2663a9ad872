"""explain(): the plan of a call, in numbers and sentences, without running it."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from torch import Tensor

from foveal._attend import prepare
from foveal._problem import Problem, describe, element_bytes
from foveal.engines.tile.walk import choose_tile, flat_tile
from foveal.patterns.base import FULL, PARTIAL, Bounds, Extent, Pattern
from foveal.patterns.dense import Dense
from foveal.probe.ceilings import Ceilings
from foveal.scores.base import Score
from foveal.scores.softmax import Softmax


@dataclass(frozen=True)
class TileCounts:
    """Tiles of one problem, counted per list (batch and heads share a list unless they differ).

    q_tile and kv_tile are in tokens per axis; `pairs` counts visible (query, key) pairs exactly.
    """

    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    full: int
    partial: int
    total: int
    pairs: int

    @property
    def visited(self) -> int:
        return self.full + self.partial

    @property
    def speedup_bound(self) -> float:
        """Dense time over this time if every visited tile cost the same."""
        return self.total / self.visited if self.visited else math.inf


@dataclass(frozen=True)
class Explanation:
    """What a call of `attend` will do.

    flops counts forward products of visible pairs only; bytes is each of q, k, v, o moved once;
    bound_seconds is the larger of the two over the measured ceilings of this device, or None.
    """

    implementation: str
    pattern: str
    score: str
    refusals: tuple[tuple[str, str], ...]
    tiles: TileCounts
    flops: int
    bytes: int
    bound_seconds: float | None

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        tiles = dataclasses.asdict(self.tiles)
        bound = self.tiles.speedup_bound if self.tiles.visited else None
        tiles |= {"visited": self.tiles.visited, "speedup_bound": bound}
        return dataclasses.asdict(self) | {"tiles": tiles}

    def __str__(self) -> str:
        tiles = self.tiles
        shape = " x ".join(str(side) for side in tiles.q_tile)
        lines = [
            f"runs       {self.implementation}",
            f"pattern    {self.pattern}",
            f"score      {self.score}",
            f"tiles      {tiles.visited:,} of {tiles.total:,} visited "
            f"({tiles.full:,} full, {tiles.partial:,} partial, "
            f"{tiles.total - tiles.visited:,} skipped) with query tiles of {shape}",
            f"pairs      {tiles.pairs:,} visible per head",
            f"speed-up   at most {tiles.speedup_bound:.2f}x over dense, by tiles",
            f"work       {self.flops / 1e9:,.3f} GFLOP forward, {self.bytes / 1e6:,.2f} MB moved",
        ]
        if self.bound_seconds is not None:
            lines.append(f"bound      {self.bound_seconds * 1e3:,.3f} ms forward on this device")
        lines.extend(f"refused    {name}: {reason}" for name, reason in self.refusals)
        return "\n".join(lines)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = Dense(),
    score: Score = Softmax(),
    *,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    ceilings: Ceilings | None = None,
    device: str = "cpu",
) -> Explanation:
    """What `attend` with the same arguments will run, visit and cost; nothing is computed.

    Shapes: as `attend`; tensors on the meta device stand for a call on `device`.
    Options: ceilings, from foveal.probe.ceilings, adds the time bound of this device.
    """
    problem = describe(q, k, v, return_lse)
    if problem.device == "meta":
        problem = dataclasses.replace(problem, device=device)
    plan, _, _ = prepare(problem, q.device, pattern, score, cu_seqlens, implementation)
    tiles = count_tiles(plan.pattern, problem)
    flops = (
        2 * (problem.head_dim + problem.value_dim) * problem.batch * problem.q_heads * tiles.pairs
    )
    moved = element_bytes(problem)
    bound = None
    if ceilings is not None:
        bound = max(flops / ceilings.flops_per_second, moved / ceilings.bytes_per_second)
    return Explanation(
        plan.implementation,
        plan.pattern.key,
        score.key,
        plan.refusals,
        tiles,
        flops,
        moved,
        bound,
    )


def count_tiles(pattern: Pattern, problem: Problem) -> TileCounts:
    """Tiles and pairs of a simplified pattern on the problem's grid."""
    heads = problem.batch * problem.q_heads
    if pattern.depends_on_data:
        return _counted(pattern, problem.extent, heads)
    return _count_static(pattern, problem.extent, heads)


@functools.lru_cache(maxsize=256)
def _count_static(pattern: Pattern, extent: Extent, heads: int) -> TileCounts:
    return _counted(pattern, extent, heads)


def _counted(pattern: Pattern, extent: Extent, heads: int) -> TileCounts:
    pattern = pattern.simplify(extent)
    parts = pattern.parts(extent)
    if parts is not None:
        return _sum_of_parts(
            [(len(part.q_tokens), _counted(part.pattern, part.extent, heads)) for part in parts],
            extent,
        )
    bounds = pattern.bounds(extent)
    if bounds is not None:
        return _count_box(bounds, choose_tile(bounds, heads) if extent.Lq else (1,))
    return _count_flat(pattern, extent)


def _count_box(bounds: Bounds, tile: tuple[int, ...]) -> TileCounts:
    totals = [bounds.tile_totals(axis, side, side) for axis, side in enumerate(tile)]
    visited, full, total = (math.prod(counts) for counts in zip(*totals, strict=True))
    return TileCounts(tile, tile, full, visited - full, total, bounds.pairs)


def _count_flat(pattern: Pattern, extent: Extent) -> TileCounts:
    q_tile, kv_tile = flat_tile(pattern)
    states = pattern.tile_map(extent, q_tile, kv_tile)
    lists = math.prod(states.shape[:-2])
    pairs = 0
    k_pos = extent.k_positions()[None]
    for rows, state in zip(extent.q_positions().split(q_tile), states.unbind(-2), strict=True):
        seen = (state > 0).flatten(0, -2).any(0) if state.dim() > 1 else state > 0
        columns = k_pos[:, seen.repeat_interleave(kv_tile)[: extent.Lk]]
        pairs += int(pattern.allows(rows[:, None], columns, extent).sum())
    return TileCounts(
        (q_tile,),
        (kv_tile,),
        int((states == FULL).sum()) // lists,
        int((states == PARTIAL).sum()) // lists,
        states.numel() // lists,
        pairs // lists,
    )


def _sum_of_parts(parts: list[tuple[int, TileCounts]], extent: Extent) -> TileCounts:
    _, largest = max(parts, key=lambda part: part[0] * part[1].pairs)
    dense = -(-extent.Lq // math.prod(largest.q_tile)) * -(-extent.Lk // math.prod(largest.kv_tile))
    return TileCounts(
        largest.q_tile,
        largest.kv_tile,
        sum(count * tiles.full for count, tiles in parts),
        sum(count * tiles.partial for count, tiles in parts),
        dense,
        sum(count * tiles.pairs for count, tiles in parts),
    )
