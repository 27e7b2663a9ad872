"""Patterns made of patterns: pairs in all of them, pairs in any of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveal.patterns.base import Bounds, Extent, Part, Pattern, TokenBoxes, for_heads
from foveal.patterns.blocked import blocked_parts
from foveal.patterns.dense import Dense


@dataclass(frozen=True, slots=True, repr=False)
class _Combination(Pattern):
    """Two or more patterns over the same tokens."""

    members: tuple[Pattern, ...]

    symbol: ClassVar[str]

    @property
    def key(self) -> str:
        keys = (f"({p.key})" if isinstance(p, _Combination) else p.key for p in self.members)
        return f" {self.symbol} ".join(keys)

    @property
    def rank(self) -> int | None:
        return next((p.rank for p in self.members if p.rank is not None), None)

    @property
    def depends_on_data(self) -> bool:
        return any(p.depends_on_data for p in self.members)

    def validate(self, extent: Extent) -> None:
        for member in self.members:
            member.validate(extent)

    def validate_lists(self, batch: int, q_heads: int, kv_heads: int) -> None:
        for member in self.members:
            member.validate_lists(batch, q_heads, kv_heads)

    def tile_unit(self) -> tuple[int, int] | None:
        units = [unit for p in self.members if (unit := p.tile_unit()) is not None]
        if not units:
            return None
        return math.gcd(*(unit[0] for unit in units)), math.gcd(*(unit[1] for unit in units))

    def offsets(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> tuple[Tensor, ...]:
        return self._measure().offsets(q_pos, k_pos, extent)

    def _measure(self) -> Pattern:
        """The member whose steps count the offsets: the first with steps of its own."""
        special = (p for p in self.members if type(p).offsets is not Pattern.offsets)
        return next(special, Dense())

    def flattened(self) -> tuple[Pattern, ...]:
        """Members with nested combinations of the same kind opened."""
        opened: list[Pattern] = []
        for member in self.members:
            nested = isinstance(member, type(self))
            opened.extend(member.flattened() if nested else [member])  # type: ignore[attr-defined]
        return tuple(dict.fromkeys(opened))

    def parts(self, extent: Extent) -> tuple[Part, ...] | None:
        """On a grid, its own tokens box after box: in raster order most tiles see a little."""
        return None if self.bounds(extent) is not None else blocked_parts(self, extent)

    def box_states(self, extent: Extent, q_boxes: TokenBoxes, k_boxes: TokenBoxes) -> Tensor | None:
        each = [p.box_states(extent, q_boxes, k_boxes) for p in self.members]
        known = [states for states in each if states is not None]
        return functools.reduce(self._join, known) if len(known) == len(each) else None

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        maps = (p.tile_map(extent, q_tile, kv_tile) for p in self.members)
        return functools.reduce(self._join, _together(maps))

    @staticmethod
    def _join(a: Tensor, b: Tensor) -> Tensor:
        """The state of a tile from those that two members give it."""
        raise NotImplementedError


def _together(results: Iterable[Tensor]) -> list[Tensor]:
    """What members answer [..., heads, q, k], on one device and for the same heads.

    Lists may lie on a GPU, and static patterns answer where they are asked; lists of one member may be
    per key head and those of another per query head.
    """
    found = list(results)
    device = next((x.device for x in found if x.device.type != "cpu"), None)
    if device is not None:
        found = [x.to(device) for x in found]
    heads = max(x.shape[-3] if x.dim() > 2 else 1 for x in found)
    return [for_heads(x, heads, -3) if x.dim() > 2 else x for x in found]


@dataclass(frozen=True, slots=True, repr=False)
class Intersection(_Combination):
    """Pairs that every member allows; written `a & b`."""

    symbol: ClassVar[str] = "&"

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        visible = (p.allows(q_pos, k_pos, extent) for p in self.members)
        return functools.reduce(torch.logical_and, _together(visible))

    def allows_listed(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        visible = (p.allows_listed(q_pos, k_pos, extent) for p in self.members)
        return functools.reduce(torch.logical_and, _together(visible))

    def simplify(self, extent: Extent) -> Pattern:
        members = dict.fromkeys(p.simplify(extent) for p in self.flattened())
        members.pop(Dense(), None)
        if len(members) > 1:
            return Intersection(tuple(members))
        return next(iter(members), Dense())

    def bounds(self, extent: Extent) -> Bounds | None:
        each = [p.bounds(extent) for p in self.members]
        found = [b for b in each if b is not None]
        if len(found) < len(each) or len({b.extent for b in found}) > 1:
            return None
        lower = tuple(
            functools.reduce(torch.maximum, los)
            for los in zip(*(b.lower for b in found), strict=True)
        )
        upper = tuple(
            functools.reduce(torch.minimum, his)
            for his in zip(*(b.upper for b in found), strict=True)
        )
        upper = tuple(hi.maximum(lo) for lo, hi in zip(lower, upper, strict=True))
        return Bounds(found[0].extent, lower, upper)

    def reach(self, extent: Extent) -> tuple[int, ...]:
        own = Pattern.reach(self, extent)
        measured = self._measure().reach(extent)
        return tuple(min(pair) for pair in zip(own, measured, strict=True))

    @staticmethod
    def _join(a: Tensor, b: Tensor) -> Tensor:
        return torch.minimum(a, b)


@dataclass(frozen=True, slots=True, repr=False)
class Union(_Combination):
    """Pairs that any member allows; written `a | b`."""

    symbol: ClassVar[str] = "|"

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        visible = (p.allows(q_pos, k_pos, extent) for p in self.members)
        return functools.reduce(torch.logical_or, _together(visible))

    def allows_listed(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        visible = (p.allows_listed(q_pos, k_pos, extent) for p in self.members)
        return functools.reduce(torch.logical_or, _together(visible))

    def simplify(self, extent: Extent) -> Pattern:
        members = dict.fromkeys(p.simplify(extent) for p in self.flattened())
        if Dense() in members:
            return Dense()
        return Union(tuple(members)) if len(members) > 1 else next(iter(members))

    def bounds(self, extent: Extent) -> Bounds | None:
        each = [p.bounds(extent) for p in self.members]
        found = [b for b in each if b is not None]
        if len(found) < len(each) or len(found[0].extent.kv_grid) > 1:
            return None
        if len({b.extent for b in found}) > 1:
            return None
        joined: Bounds | None = found[0]
        for other in found[1:]:
            joined = _touching(joined, other)
        return joined

    def reach(self, extent: Extent) -> tuple[int, ...]:
        if any(type(p).offsets is not Pattern.offsets for p in self.members):
            return Pattern.reach(self, extent)  # steps of one member, pairs of another
        return tuple(
            max(axis) for axis in zip(*(p.reach(extent) for p in self.members), strict=True)
        )

    def tile_map(self, extent: Extent, q_tile: int, kv_tile: int) -> Tensor:
        bounds = self.bounds(extent)
        if bounds is not None:
            return bounds.tile_counts(0, q_tile, kv_tile)
        return _Combination.tile_map(self, extent, q_tile, kv_tile)

    @staticmethod
    def _join(a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)


def _touching(a: Bounds | None, b: Bounds) -> Bounds | None:
    """The union of two sequences of intervals, where it is one too and never decreases."""
    if a is None:
        return None
    (a_lo,), (a_hi,), (b_lo,), (b_hi,) = a.lower, a.upper, b.lower, b.upper
    only_a, only_b = b_lo >= b_hi, a_lo >= a_hi
    if not bool((only_a | only_b | ((a_lo <= b_hi) & (b_lo <= a_hi))).all()):
        return None
    lower = torch.where(only_a, a_lo, torch.where(only_b, b_lo, a_lo.minimum(b_lo)))
    upper = torch.where(only_a, a_hi, torch.where(only_b, b_hi, a_hi.maximum(b_hi)))
    if bool((lower.diff() < 0).any()) or bool((upper.diff() < 0).any()):
        return None
    return Bounds(a.extent, (lower,), (upper,))
