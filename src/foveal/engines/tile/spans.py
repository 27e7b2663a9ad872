"""Patterns on sequences in which a token sees at most two intervals: windows with global tokens, prefixes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from foveal.engines.tile.lists import inverse
from foveal.patterns.base import Bounds, Extent, Pattern
from foveal.patterns.combine import Intersection, Union
from foveal.patterns.rectangle import Rectangle
from foveal.patterns.sliding import Sliding

_MOST_MEMBERS = 8
Spans = tuple[Tensor, Tensor, Tensor, Tensor]


def spans(pattern: Pattern, extent: Extent, by_key: bool) -> Spans | None:
    """Start and stop of two intervals per own token, int32; None where some token needs more of them.

    Token i sees the tokens j of the other side with lower[i] <= j < upper[i] in one of them; an interval
    that a token does not need is empty.  Own tokens are queries, or keys (`by_key`).
    """
    members = _members(pattern, extent.flat())
    if members is None or not 0 < len(members) <= _MOST_MEMBERS:
        return None
    sides = [inverse(m) if by_key else (m.lower, m.upper) for m in members]
    return _two(*(torch.stack([side[end][0] for side in sides]) for end in (0, 1)))


def _members(pattern: Pattern, extent: Extent) -> list[Bounds] | None:
    """Intervals whose union the pattern is."""
    bounds = pattern.bounds(extent)
    if bounds is not None:
        return [bounds] if len(bounds.extent.kv_grid) == 1 else None
    if isinstance(pattern, Sliding):
        first = Rectangle((0, extent.Lk), (0, pattern.sink_tokens))
        pattern = Sliding(pattern.left, pattern.right) | (first & Sliding(extent.Lk, pattern.right))
    if not isinstance(pattern, Union | Intersection):
        return None
    found = [_members(member, extent) for member in pattern.members]
    every = [members for members in found if members is not None]
    if len(every) < len(found):
        return None
    if isinstance(pattern, Union):
        return [bounds for members in every for bounds in members]
    return [_common(chosen) for chosen in itertools.product(*every)]


def _common(chosen: Sequence[Bounds]) -> Bounds:
    """The pairs in all of some intervals; none decreases, as none of theirs does."""
    lower, upper = (
        torch.stack([x.lower[0] for x in chosen]),
        torch.stack([x.upper[0] for x in chosen]),
    )
    low, high = lower.amax(0), upper.amin(0)
    return Bounds(chosen[0].extent, (low,), (high.maximum(low),))


def _two(lower: Tensor, upper: Tensor) -> Spans | None:
    """Intervals [members, tokens] joined where they meet, if no token keeps more than two."""
    beyond = int(upper.max()) + 1 if upper.numel() else 1
    lower = torch.where(lower < upper, lower, beyond)
    lower, order = lower.sort(0)
    upper = upper.gather(0, order)
    used = lower < beyond
    reached = torch.where(used, upper, -1).cummax(0).values
    starts = used.clone()
    starts[1:] &= lower[1:] > reached[:-1]
    number = starts.cumsum(0)
    if int(number.max()) > 2:
        return None
    found = []
    for each in (1, 2):
        own = used & (number == each)
        found.append(torch.where(own, lower, beyond).amin(0))
        found.append(torch.where(own, upper, 0).amax(0))
    first, first_stop, second, second_stop = (x.to(torch.int32) for x in found)
    return first, first_stop, second, second_stop
