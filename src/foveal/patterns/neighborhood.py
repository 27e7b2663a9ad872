"""Neighborhood attention and its generalisations, in one to three dimensions."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveal._errors import PatternError
from foveal.patterns.base import Bounds, Extent, Part, Pattern, interval_reach
from foveal.patterns.dense import Causal, Dense
from foveal.patterns.grid import common_rank, raster, same_grid
from foveal.patterns.partition import Partition

Border = Literal["shift", "clip", "wrap"]


@dataclass(frozen=True, slots=True, repr=False)
class Neighborhood(Pattern):
    """Each token sees a window of `window` keys around it, on every axis of the grid.

    Per axis of length L, with dilation d: token i belongs to class r = i mod d and stands at
    g = i // d among the L_r tokens of its class; tokens of a group of `stride` share the window of
    the group's leader c:

        c  = min((g // stride) * stride + stride // 2, L_r - 1)
        lo = clamp(c - window // 2, 0, L_r - window),   hi = lo + window           (border "shift")
        lo = max(c - window // 2, 0),   hi = min(c - window // 2 + window, L_r)    (border "clip")
        keys (c - window // 2 ... + window) mod L_r                                (border "wrap")
        causal:  c = min((g // stride) * stride + stride - 1, L_r - 1),  lo = max(c - window + 1, 0),
                 hi = g + 1
        keys of i:  r + d x  for lo <= x < hi;  several axes: the product of the axes' sets

    Options: integers, bools or border names, one for all axes or one per axis; 1 <= stride <= window
    and window * dilation <= axis length.  An even window holds one key more before than after.
    Limits: queries and keys on the same grid (one axis: Lq <= Lk); a wrapped axis cannot be causal and
    its length must be a multiple of its dilation.
    Equals: window = grid, dilation 1 is Dense(); stride = window dividing the grid is
    Partition(window); one causal axis with window = L is Causal().
    Cost: prod(window) / prod(grid) of dense.
    Paper: Neighborhood Attention Transformer (2204.07143), Dilated NAT (2209.15001), Generalized
    Neighborhood Attention (2504.16922).
    """

    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    border: Border | tuple[Border, ...] = "shift"

    def __post_init__(self) -> None:
        common_rank(self, ("window", "stride", "dilation", "causal", "border"))
        for axis, rule in enumerate(self._axes(self.rank or 1)):
            rule.check(axis)

    @property
    def rank(self) -> int | None:
        return common_rank(self, ("window", "stride", "dilation", "causal", "border"))

    def validate(self, extent: Extent) -> None:
        Pattern.validate(self, extent)
        same_grid(self, extent)
        for rule, length in zip(self._axes(len(extent.kv_grid)), extent.kv_grid, strict=True):
            rule.check_length(length)

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        axes = zip(
            self._axes(len(extent.kv_grid)),
            extent.coordinates(q_pos),
            extent.coordinates(k_pos),
            extent.kv_grid,
            strict=True,
        )
        return functools.reduce(
            torch.logical_and, (rule.allows(q, k, length) for rule, q, k, length in axes)
        )

    def simplify(self, extent: Extent) -> Pattern:
        rules = self._axes(len(extent.kv_grid))
        covers = [rule.covers(length) for rule, length in zip(rules, extent.kv_grid, strict=True)]
        if all(covers):
            return Dense()
        first = rules[0]
        if len(rules) == 1 and first == _Axis(extent.Lk, 1, 1, True, first.border):
            return Causal()
        if extent.q_grid == extent.kv_grid and all(
            rule.is_partition(length) for rule, length in zip(rules, extent.kv_grid, strict=True)
        ):
            return Partition(tuple(rule.window for rule in rules))
        return self

    def bounds(self, extent: Extent) -> Bounds | None:
        rules = self._axes(len(extent.kv_grid))
        if any(rule.dilation > 1 or rule.border == "wrap" for rule in rules):
            return None
        return _window_bounds(rules, extent, extent.kv_grid)

    def parts(self, extent: Extent) -> tuple[Part, ...] | None:
        rules = self._axes(len(extent.kv_grid))
        if self.bounds(extent) is not None or extent.q_grid != extent.kv_grid:
            return None
        per_axis_groups = [
            _class_groups(rule, length) for rule, length in zip(rules, extent.kv_grid, strict=True)
        ]
        parts = []
        for groups in itertools.product(*per_axis_groups):
            grid = tuple(group.q_coordinates.shape[1] for group in groups)
            kv_grid = tuple(group.k_coordinates.shape[1] for group in groups)
            inner = _ClassWindows(tuple(rule.undilated() for rule in rules), grid)
            parts.append(
                Part(
                    inner,
                    Extent(grid, kv_grid),
                    raster([group.q_coordinates for group in groups], extent.kv_grid),
                    raster([group.k_coordinates for group in groups], extent.kv_grid),
                )
            )
        return tuple(parts)

    def offsets(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> tuple[Tensor, ...]:
        steps = Pattern.offsets(self, q_pos, k_pos, extent)
        q_axes = extent.coordinates(q_pos)
        rules = self._axes(len(extent.kv_grid))
        return tuple(
            rule.steps(step, q, length)
            for rule, step, q, length in zip(rules, steps, q_axes, extent.kv_grid, strict=True)
        )

    def reach(self, extent: Extent) -> tuple[int, ...]:
        rules = self._axes(len(extent.kv_grid))
        return tuple(rule.reach(length) for rule, length in zip(rules, extent.kv_grid, strict=True))

    def keys(self, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Every query's window as a list: its places row by row, from the lowest coordinates up.

        Returns the raster positions of the keys, int64 [L, prod(window)], and which of them exist,
        bool of that shape: a causal or clipped window holds fewer keys, at the front of each axis.
        """
        index, exists = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
        for rule, length in zip(self._axes(len(grid)), grid, strict=True):
            place, inside = rule.window_places(length)
            index = (
                (index[:, None, :, None] * length + place[None, :, None]).flatten(2).flatten(0, 1)
            )
            exists = (exists[:, None, :, None] & inside[None, :, None]).flatten(2).flatten(0, 1)
        return index, exists

    def _axes(self, rank: int) -> tuple[_Axis, ...]:
        spread = (_spread(getattr(self, name), rank) for name in _Axis.__slots__)
        return tuple(_Axis(*values) for values in zip(*spread, strict=True))


def _spread(value: object, rank: int) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,) * rank


@dataclass(frozen=True, slots=True)
class _Axis:
    """The rule of one axis."""

    window: int
    stride: int
    dilation: int
    causal: bool
    border: str

    def check(self, axis: int) -> None:
        for name in ("window", "stride", "dilation"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PatternError(
                    name, value, f"an integer of at least 1 is needed on axis {axis}"
                )
        if self.stride > self.window:
            raise PatternError(
                "stride", self.stride, f"at most the window, {self.window}, on axis {axis}"
            )
        if not isinstance(self.causal, bool):
            raise PatternError("causal", repr(self.causal), f"a bool is needed on axis {axis}")
        if self.border not in ("shift", "clip", "wrap"):
            raise PatternError("border", repr(self.border), "'shift', 'clip' or 'wrap' is needed")
        if self.causal and self.border == "wrap":
            raise PatternError("border", "'wrap'", "a causal axis cannot wrap")

    def check_length(self, length: int) -> None:
        if self.window * self.dilation > length:
            raise PatternError(
                "window",
                f"{self.window} with dilation {self.dilation}",
                f"window * dilation must not exceed the axis of {length} tokens",
            )
        if self.border == "wrap" and length % self.dilation:
            raise PatternError(
                "dilation", self.dilation, f"it must divide the wrapped axis of {length} tokens"
            )

    def undilated(self) -> _Axis:
        return _Axis(self.window, self.stride, 1, self.causal, self.border)

    def covers(self, length: int) -> bool:
        """Whether every token sees the whole axis."""
        return self.window == length and not self.causal and self.border != "clip"

    def is_partition(self, length: int) -> bool:
        whole = self.stride == self.window and self.dilation == 1 and length % self.window == 0
        return whole and not self.causal

    def leader(self, place: Tensor, class_length: Tensor | int) -> Tensor:
        offset = self.stride - 1 if self.causal else self.stride // 2
        leader = place // self.stride * self.stride + offset
        return leader.minimum(torch.as_tensor(class_length) - 1)

    def first(self, place: Tensor, class_length: Tensor | int) -> Tensor:
        """First key of the window, before any border rule."""
        leader = self.leader(place, class_length)
        return leader - (self.window - 1 if self.causal else self.window // 2)

    def interval(self, place: Tensor, class_length: Tensor | int) -> tuple[Tensor, Tensor]:
        """[lo, hi) among the tokens of the class; unrolled (lo may be negative) when it wraps."""
        length = torch.as_tensor(class_length)
        lo = self.first(place, class_length)
        if self.causal:
            return lo.clamp(min=0), place + 1
        if self.border == "shift":
            lo = lo.clamp(min=0).minimum(length - self.window)
            return lo, lo + self.window
        if self.border == "clip":
            return lo.clamp(min=0), (lo + self.window).minimum(length)
        return lo, lo + self.window

    def window_places(self, length: int) -> tuple[Tensor, Tensor]:
        """Tokens [length, window] of every window, ascending from its start, and which exist."""
        token = torch.arange(length)
        residue = token % self.dilation
        class_length = (length - residue + self.dilation - 1) // self.dilation
        lo, hi = self.interval(token // self.dilation, class_length)
        place = lo[:, None] + torch.arange(self.window)
        inside = place < hi[:, None]
        if self.border == "wrap":
            place = place % class_length[:, None]
        place = torch.where(inside, place, lo[:, None])
        return residue[:, None] + self.dilation * place, inside

    def reach(self, length: int) -> int:
        """Largest distance from a token to a key of its window, in dilation steps."""
        class_lengths = {length // self.dilation, -(-length // self.dilation)}
        places = (torch.arange(class_length) for class_length in class_lengths)
        return max(interval_reach(place, *self.interval(place, len(place))) for place in places)

    def allows(self, q: Tensor, k: Tensor, length: int) -> Tensor:
        residue = q % self.dilation
        class_length = (length - residue + self.dilation - 1) // self.dilation
        lo, hi = self.interval(q // self.dilation, class_length)
        same_class = k % self.dilation == residue
        if self.border == "wrap":
            return same_class & ((k // self.dilation - lo) % class_length < self.window)
        place = k // self.dilation
        return same_class & (place >= lo) & (place < hi)

    def steps(self, step: Tensor, q: Tensor, length: int) -> Tensor:
        step = step.div(self.dilation, rounding_mode="floor")
        if self.border != "wrap":
            return step
        class_length = length // self.dilation
        place = q // self.dilation
        lo = self.first(place, class_length)
        return lo + (step + place - lo) % class_length - place


@dataclass(frozen=True)
class _ClassGroup:
    """Dilation classes of one axis that hold the same number of tokens.

    Coordinates [classes, tokens] int64; the keys of a wrapped axis are unrolled, so that
    windows across the border are intervals.
    """

    q_coordinates: Tensor
    k_coordinates: Tensor


def _class_groups(rule: _Axis, length: int) -> list[_ClassGroup]:
    residues = torch.arange(rule.dilation)
    lengths = (length - residues + rule.dilation - 1) // rule.dilation
    groups = []
    for class_length in lengths.unique().tolist():
        classes = residues[lengths == class_length][:, None]
        places = torch.arange(class_length)
        k_places = places
        if rule.border == "wrap":
            k_places = (
                torch.arange(class_length + rule.window - 1) - rule.window // 2
            ) % class_length
        groups.append(
            _ClassGroup(classes + rule.dilation * places, classes + rule.dilation * k_places)
        )
    return groups


@dataclass(frozen=True, slots=True, repr=False)
class _ClassWindows(Pattern):
    """Windows among the tokens of one dilation class, wrapped axes unrolled."""

    axes: tuple[_Axis, ...]
    grid: tuple[int, ...]

    def bounds(self, extent: Extent) -> Bounds:
        return _window_bounds(self.axes, extent, self.grid)


def _window_bounds(rules: tuple[_Axis, ...], extent: Extent, class_grid: tuple[int, ...]) -> Bounds:
    intervals = []
    for axis, (rule, length) in enumerate(zip(rules, class_grid, strict=True)):
        place = extent.axis_positions(axis)
        if rule.border == "wrap":
            lo, hi = rule.interval(torch.arange(length), length)
            intervals.append((lo + rule.window // 2, hi + rule.window // 2))
        else:
            intervals.append(rule.interval(place, length))
    lower, upper = zip(*intervals, strict=True)
    return Bounds(extent, lower, upper)
