"""Several documents packed in one sequence."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._errors import PackingError, PatternError
from foveal._kept import kept
from foveal.patterns.base import Bounds, Extent, Part, Pattern
from foveal.patterns.blocks import Blocks
from foveal.patterns.combine import Intersection
from foveal.patterns.dense import Dense


@dataclass(frozen=True, slots=True, repr=False)
class Documents(Pattern):
    """A query sees the keys of its own document, as cut by the `cu_seqlens` of the call.

    Equals: attention of each document on its own.  Passing `cu_seqlens` with any pattern confines
    that pattern to the documents; `Documents()` is the name of the unrestricted case.
    Limits: needs `cu_seqlens`; combines with `&` only.
    """

    def validate(self, extent: Extent) -> None:
        raise PatternError("pattern", repr(self), "pass cu_seqlens to say where documents begin")


@dataclass(frozen=True, slots=True, repr=False)
class Packed(Pattern):
    """`inner` applied to each of the packed documents on its own; positions restart at 0 in each."""

    inner: Pattern
    lengths: tuple[int, ...]

    def validate(self, extent: Extent) -> None:
        for length in set(self.lengths) - {0}:
            self.inner.validate(Extent((length,), (length,)))

    def allows(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> Tensor:
        visible = torch.zeros_like(q_pos + k_pos, dtype=torch.bool)
        for start, length in self._documents():
            q, k = q_pos - start, k_pos - start
            together = (q >= 0) & (q < length) & (k >= 0) & (k < length)
            local = Extent((length,), (length,))
            inside = self.inner.allows(q.clamp(0, length - 1), k.clamp(0, length - 1), local)
            visible |= together & inside
        return visible

    def simplify(self, extent: Extent) -> Pattern:
        if len(self._documents()) == 1:
            return self.inner.simplify(extent)
        return self

    def bounds(self, extent: Extent) -> Bounds | None:
        return _bounds(self, extent)

    def parts(self, extent: Extent) -> tuple[Part, ...] | None:
        if self.bounds(extent) is not None:
            return None
        by_length: dict[int, list[int]] = {}
        for start, length in self._documents():
            by_length.setdefault(length, []).append(start)
        parts = []
        for length, starts in by_length.items():
            tokens = torch.tensor(starts)[:, None] + torch.arange(length)
            parts.append(Part(self.inner, Extent((length,), (length,)), tokens, tokens))
        return tuple(parts)

    def offsets(self, q_pos: Tensor, k_pos: Tensor, extent: Extent) -> tuple[Tensor, ...]:
        own = Pattern.offsets(self, q_pos, k_pos, extent)[0]
        for start, length in self._documents():
            together = (q_pos >= start) & (q_pos < start + length) & (k_pos >= start)
            local = Extent((length,), (length,))
            inside = self.inner.offsets(q_pos - start, k_pos - start, local)[0]
            own = torch.where(together & (k_pos < start + length), inside, own)
        return (own,)

    def reach(self, extent: Extent) -> tuple[int, ...]:
        longest = max(self.lengths, default=0)
        return self.inner.reach(Extent((longest,), (longest,)))

    def _documents(self) -> list[tuple[int, int]]:
        """(start, length) of the documents that hold a token."""
        starts = itertools.accumulate(self.lengths, initial=0)
        return [
            (start, length) for start, length in zip(starts, self.lengths, strict=False) if length
        ]


# Asked for several times while a call is planned, and every batch is cut in another way.
@kept(4)
def _bounds(packed: Packed, extent: Extent) -> Bounds | None:
    if not packed._documents():
        return Dense().bounds(extent)
    lower, upper = [], []
    for start, length in packed._documents():
        bounds = packed.inner.bounds(Extent((length,), (length,)))
        if bounds is None:
            return None
        lower.append(bounds.lower[0] + start)
        upper.append(bounds.upper[0] + start)
    return Bounds(extent, (torch.cat(lower),), (torch.cat(upper),))


def pack(pattern: Pattern, cu_seqlens: Tensor, extent: Extent) -> Pattern:
    """The pattern confined to the documents that `cu_seqlens` [N + 1] cuts; checks both."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
        raise PackingError("cu_seqlens", list(cu_seqlens.shape), "integers [N + 1] are needed")
    if len(extent.kv_grid) > 1 or extent.Lq != extent.Lk:
        raise PackingError(
            "cu_seqlens",
            f"q {extent.q_grid}, k {extent.kv_grid}",
            "q and k must be packed alike, [1, total, H, D]",
        )
    ends = cu_seqlens.tolist()
    lengths = tuple(stop - start for start, stop in itertools.pairwise(ends))
    if ends[0] != 0 or any(length < 0 for length in lengths):
        raise PackingError("cu_seqlens", ends, "it must start at 0 and never descend")
    if ends[-1] != extent.Lk:
        raise PackingError("cu_seqlens", ends, f"it must end at the total of {extent.Lk} tokens")
    packed = _confined(pattern, lengths)
    packed.validate(extent)
    return packed


def _confined(pattern: Pattern, lengths: tuple[int, ...]) -> Pattern:
    """Static members restart in each document; block lists speak of the packed tokens."""
    members = pattern.flattened() if isinstance(pattern, Intersection) else (pattern,)
    static = tuple(
        Dense() if isinstance(p, Documents) else p for p in members if not p.depends_on_data
    )
    lists = tuple(p for p in members if p.depends_on_data)
    if any(not isinstance(p, Blocks) for p in lists):
        raise PackingError(
            "pattern", repr(pattern), "with cu_seqlens, join block lists by `&` only"
        )
    inside = Intersection(static) if len(static) > 1 else next(iter(static), Dense())
    packed = Packed(inside, lengths)
    return Intersection((packed, *lists)) if lists else packed
