"""The two factorised patterns of Sparse Transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._errors import PatternError
from foveal.patterns.base import Extent, Part, Pattern
from foveal.patterns.dense import Causal, Dense
from foveal.patterns.grid import FAR
from foveal.patterns.partition import Partition

# Queries whose keys are listed together; each has some 2 sqrt(2 Lk).
_QUERIES_AT_ONCE = 1024


def _at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PatternError(name, value, "an integer of at least 1 is needed")


@dataclass(frozen=True, slots=True, repr=False)
class Strided(Pattern):
    """Query i sees keys j with (i - j) mod stride = 0, and j <= i when causal.

    Options: stride >= 1 tokens.
    Equals: stride 1 is Causal(), or Dense() when not causal; each residue class on its own is plain
    attention.  Cost: 1 / stride of causal.
    Paper: Generating Long Sequences with Sparse Transformers (1904.10509).
    """

    stride: int
    causal: bool = True

    def __post_init__(self) -> None:
        _at_least_one("stride", self.stride)

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        visible = (q_pos - k_pos) % min(self.stride, FAR) == 0
        return visible & (k_pos <= q_pos) if self.causal else visible

    def simplify(self, extent: Extent) -> Pattern:
        return self._inner() if self.stride == 1 else self

    def parts(self, extent: Extent) -> tuple[Part, ...]:
        stride = min(self.stride, extent.Lq + extent.Lk)
        residue, query = (extent.q_positions()[:stride] % stride).sort()
        queries = (extent.Lq - 1 - query) // stride + 1
        keys = (extent.Lk - 1 - residue).div(stride, rounding_mode="floor") + 1
        sizes = queries * (extent.Lk + 1) + keys
        parts = []
        for size in sizes.unique().tolist():
            Lq, Lk = divmod(size, extent.Lk + 1)
            q_tokens = query[sizes == size, None] + stride * torch.arange(Lq)
            k_tokens = residue[sizes == size, None] + stride * torch.arange(Lk)
            parts.append(Part(self._inner(), Extent((Lq,), (Lk,)), q_tokens, k_tokens))
        return tuple(parts)

    def _inner(self) -> Pattern:
        return Causal() if self.causal else Dense()


@dataclass(frozen=True, slots=True, repr=False)
class Fixed(Pattern):
    """Query i sees, up to itself, its own block of `stride` keys and the last `summary` keys of every block.

    j <= i  and  (j // stride = i // stride  or  j mod stride >= stride - summary).

    Options: stride >= 1 tokens, 1 <= summary <= stride.
    Equals: summary = stride is Causal().  Cost: about summary / stride of causal.
    Paper: Generating Long Sequences with Sparse Transformers (1904.10509).
    """

    stride: int
    summary: int = 1

    def __post_init__(self) -> None:
        _at_least_one("stride", self.stride)
        _at_least_one("summary", self.summary)
        if self.summary > self.stride:
            raise PatternError(
                "summary", self.summary, f"at most the stride, {self.stride}, is needed"
            )

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        return self._composed().allows(q_pos, k_pos, extent)

    def simplify(self, extent: Extent) -> Pattern:
        return Causal() if self.summary == self.stride or self.stride >= extent.Lk else self

    def tile_unit(self) -> tuple[int, int]:
        return self.stride, math.gcd(self.stride, self.summary)

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        return self._composed().tile_map(extent.flat(), q_tile, kv_tile)

    def _composed(self) -> Pattern:
        return (_SummaryKeys(self.stride, self.summary) | _OwnBlock(self.stride)) & Causal()


@dataclass(frozen=True, slots=True, repr=False)
class _SummaryKeys(Pattern):
    """Every query sees the last `summary` keys of each block."""

    stride: int
    summary: int

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        return _is_summary(k_pos, self.stride, self.summary) & (q_pos == q_pos)

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        chosen = _is_summary(extent.k_positions(), self.stride, self.summary)
        tiles = [int(tile.any()) + int(tile.all()) for tile in chosen.split(kv_tile)]
        return torch.tensor(tiles, dtype=torch.uint8).expand(-(-extent.Lq // q_tile), -1)


def _is_summary(k_pos: Tensor, stride: int, summary: int) -> Tensor:
    return k_pos % min(stride, FAR) >= min(stride - summary, FAR)


@dataclass(frozen=True, slots=True, repr=False)
class _OwnBlock(Pattern):
    """Blocks in raster order, whatever the grid."""

    stride: int

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        return Partition(self.stride).allows(q_pos, k_pos, extent.flat())

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        return Partition(self.stride).tile_map(extent.flat(), q_tile, kv_tile)


@dataclass(frozen=True, slots=True, repr=False)
class Triangular(Pattern):
    """Query i sees the keys trunc(step i + o) with |o| = t (t + 1) / 2, t = 0, 1, 2, ...

    Options: step, keys per query, above 0; steps away from the diagonal grow by one key each.
    Cost: about 2 sqrt(2 Lk) keys per query.
    Paper: Hybrid Transformers for Music Source Separation (2211.08553).
    """

    step: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.step < math.inf:
            raise PatternError("step", self.step, "a number above 0 is needed")

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        centre = (q_pos - (extent.Lk - extent.Lq)).double() * self.step
        whole, part = centre.floor(), centre - centre.floor()
        # trunc(c + o) = floor(c) + o where c + o >= 0, and 0 for the one offset just before the first key.
        offset = (k_pos - whole).abs()
        before = (k_pos == 0) & (part > 0)
        return _is_triangular(offset) | (before & _is_triangular(whole + 1))

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        """Counted from the pairs themselves, of which a query has few."""
        q_tiles, kv_tiles = -(-extent.Lq // q_tile), -(-extent.Lk // kv_tile)
        counts = torch.zeros(q_tiles * kv_tiles, dtype=torch.int64)
        furthest = max(extent.Lk, math.ceil(extent.Lq * self.step)) + 1
        t = torch.arange(math.isqrt(2 * furthest) + 2)
        steps = t * (t + 1) // 2
        offsets = torch.cat([-steps[1:].flip(0), steps])
        for queries in torch.arange(extent.Lq).split(_QUERIES_AT_ONCE):
            centre = queries.double() * self.step
            whole = centre.floor().to(torch.int64)
            key = whole[:, None] + offsets
            owner = (queries // q_tile * kv_tiles)[:, None] + key // kv_tile
            inside = (key >= 0) & (key < extent.Lk)
            counts += torch.bincount(owner[inside], minlength=len(counts))
            # The key 0 by truncation, where no whole offset leads there.
            cut = (centre > whole) & _is_triangular(whole + 1) & ~_is_triangular(whole)
            counts += torch.bincount(queries[cut] // q_tile * kv_tiles, minlength=len(counts))
        q_sizes, k_sizes = (
            torch.full((tiles,), tile).index_fill(0, torch.tensor(tiles - 1), last)
            for tiles, tile, last in (
                (q_tiles, q_tile, extent.Lq - q_tile * (q_tiles - 1)),
                (kv_tiles, kv_tile, extent.Lk - kv_tile * (kv_tiles - 1)),
            )
        )
        found = counts.view(q_tiles, kv_tiles)
        full = found == q_sizes[:, None] * k_sizes
        return (found > 0).to(torch.uint8) + full.to(torch.uint8)


def _is_triangular(n: Tensor) -> Tensor:
    """Whether 8 n + 1 is a square."""
    root = torch.sqrt(8 * n + 1).round()
    return root * root == 8 * n + 1
