"""What a head computes, as a plan says: a window, columns and diagonals, blocks, or a comb."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from foveal._arguments import finite, need_tensors, tensors_or_none
from foveal._attend import attend
from foveal._errors import DtypeError, OptionError, SelectionError, ShapeError, UnknownNameError
from foveal.compose.merge import merge
from foveal.patterns import Blocks, Causal, Chosen, Pattern, Rows, TokenSelection
from foveal.selectors import Pooled, TopK, VerticalSlash, select
from foveal.selectors.base import against_keys

Kind = Literal["dense", "a_shape", "vertical_slash", "blocks", "grid"]
Boundary = Literal["none", "query", "both"]
KINDS: tuple[Kind, ...] = ("dense", "a_shape", "vertical_slash", "blocks", "grid")
_TILE = 64


@dataclass(frozen=True)
class Mode:
    """One way to attend, by its kind and two sizes.

    dense: all keys.  a_shape: the first `first` keys and a window of `second`.  vertical_slash: the `first`
    heaviest columns and the `second` heaviest distances of the last 64 queries.  blocks: the `first` best
    blocks of 64 by mean query and mean key.  grid: one key in every stride, at most `first`, stride and place
    found from the last 64 queries, and a window of `second`.
    """

    kind: Kind
    first: int = 0
    second: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownNameError("kind of head", self.kind, KINDS)
        for size in (self.first, self.second):
            if not isinstance(size, int) or isinstance(size, bool):
                raise SelectionError("sizes", (self.first, self.second), "whole numbers are needed")
        least = {"dense": (0, 0), "a_shape": (0, 1), "vertical_slash": (1, 1), "blocks": (1, 0)}
        low = least.get(self.kind, (2, 1))
        if self.first < low[0] or self.second < low[1]:
            needed = f"at least {low[0]} and {low[1]} for {self.kind}"
            raise SelectionError("sizes", (self.first, self.second), needed)


@dataclass(frozen=True)
class Head:
    """What one query head computes: one mode, or one for each kind of token.

    boundary "none": modes[0] on the sequence; "query": modes[a] for the queries of kind a, on all keys;
    "both": modes[a M + b] for the queries of kind a on the keys of kind b of M, in one softmax.
    """

    boundary: Boundary
    modes: tuple[Mode, ...]

    def __post_init__(self) -> None:
        if self.boundary not in ("none", "query", "both") or not self.modes:
            raise UnknownNameError("boundary", self.boundary, ("none", "query", "both"))
        if not isinstance(self.modes, tuple) or any(not isinstance(m, Mode) for m in self.modes):
            raise OptionError("modes", repr(self.modes), "a tuple of Mode is needed")
        if self.boundary == "none" and len(self.modes) != 1:
            raise SelectionError(
                "modes", len(self.modes), 'one mode is needed with boundary "none"'
            )

    def as_json(self) -> list[Any]:
        """[boundary, {"modes": [[kind, first, second], ...]}], an entry of `save_plan`."""
        modes = [[mode.kind, mode.first, mode.second] for mode in self.modes]
        return [self.boundary, {"modes": modes}]

    @classmethod
    def from_json(cls, entry: Sequence[Any]) -> Head:
        """The head that `as_json` wrote."""
        fits = isinstance(entry, Sequence) and len(entry) == 2 and isinstance(entry[1], Mapping)
        if not fits or not isinstance(entry[1].get("modes"), Sequence):
            needed = '[boundary, {"modes": [[kind, first, second], ...]}] is needed'
            raise SelectionError("plan", entry, needed)
        return cls(entry[0], tuple(Mode(*mode) for mode in entry[1]["modes"]))


def plan_of(heads: Mapping[int, Sequence[Head]]) -> dict[str, list[Any]]:
    """{"layer": [head 0, head 1, ...], ...} for `selectors.save_plan`."""
    return {str(layer): [head.as_json() for head in own] for layer, own in heads.items()}


def heads_of(plan: Mapping[str, Sequence[Any]], layer: int) -> tuple[Head, ...]:
    """The heads of a layer in what `selectors.load_plan` read."""
    if str(layer) not in plan:
        raise UnknownNameError("layer of the plan", str(layer), tuple(plan))
    return tuple(Head.from_json(entry) for entry in plan[str(layer)])


def attend_planned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: Sequence[Head],
    kinds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, L, Hq, Dv] and lse [B, L, Hq] of causal attention, every query head by its own entry.

    Shapes: q [B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv]; kinds int [L], the kind of each token from 0
    on (None: one kind).  Heads with the same entry run together.
    """
    if len(heads) != q.shape[2] or q.shape[1] != k.shape[1]:
        needed = f"one for each of {q.shape[2]} query heads, and as many queries as keys"
        raise SelectionError("heads", len(heads), needed)
    if not all(isinstance(each, Head) for each in heads):
        raise OptionError("heads", repr(heads), "a Head for every query head is needed")
    if kinds is not None:
        _fit_kinds(kinds, q.shape[1])
    groups = q.shape[2] // k.shape[2]
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for entry in dict.fromkeys(heads):
        own = torch.tensor([n for n, each in enumerate(heads) if each == entry], device=q.device)
        part = _of_head(entry, q[:, :, own], k[:, :, own // groups], v[:, :, own // groups], kinds)
        o, lse = o.index_copy(2, own, part[0]), lse.index_copy(2, own, part[1].to(lse.dtype))
    return o, lse


def _fit_kinds(kinds: Tensor, length: int) -> None:
    if kinds.is_floating_point() or kinds.is_complex():
        raise DtypeError("kinds", kinds.dtype, "integers are needed")
    if kinds.shape != (length,):
        raise ShapeError(
            "kinds", list(kinds.shape), f"[{length}], the kind of each token, is needed"
        )
    if length and int(kinds.min()) < 0:
        raise SelectionError("kinds", int(kinds.min()), "numbers from 0 on are needed")


def _of_head(
    head: Head, q: Tensor, k: Tensor, v: Tensor, kinds: Tensor | None
) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    if head.boundary != "none" and kinds is None and len(head.modes) != 1:
        raise SelectionError("modes", len(head.modes), "one mode is needed for one kind of token")
    if head.boundary == "none" or kinds is None:
        visible = torch.arange(1, length + 1, device=q.device)
        return attend_mode(head.modes[0], q, k, v, visible, whole=True)
    o, lse = torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v.shape[3]), q.new_zeros(q.shape[:3])
    lse = lse.to(torch.promote_types(q.dtype, torch.float32))
    for rows, parts in _cells(head, q, k, v, kinds.to(q.device)):
        found = merge(*zip(*parts, strict=True))
        o, lse = o.index_copy(1, rows, found[0]), lse.index_copy(1, rows, found[1].to(lse.dtype))
    return o, lse


def _cells(
    head: Head, q: Tensor, k: Tensor, v: Tensor, kinds: Tensor
) -> Iterator[tuple[Tensor, list[tuple[Tensor, Tensor]]]]:
    """Queries of each kind, with attention to each group of keys."""
    count = int(kinds.max()) + 1
    sizes = {"query": count, "both": count * count}
    if len(kinds) != q.shape[1] or len(head.modes) != sizes[head.boundary]:
        needed = f"{sizes[head.boundary]} modes for {count} kinds of {q.shape[1]} tokens"
        raise SelectionError("modes", len(head.modes), needed)
    for a in range(count):
        rows = (kinds == a).nonzero()[:, 0]
        if not len(rows):
            continue
        parts = []
        for b in range(count if head.boundary == "both" else 1):
            keys = (kinds == b).nonzero()[:, 0] if head.boundary == "both" else None
            own_k, own_v = (k, v) if keys is None else (k[:, keys], v[:, keys])
            visible = rows + 1 if keys is None else torch.searchsorted(keys, rows, right=True)
            mode = head.modes[a if keys is None else a * count + b]
            parts.append(attend_mode(mode, q[:, rows], own_k, own_v, visible))
        yield rows, parts


def attend_mode(
    mode: Mode, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """o and lse of queries that may see the first `visible` [Lq] of the keys, which never falls.

    Distances count back from the last visible key.  Shapes: q [B, Lq, H, D], k and v [B, Lk, H, .].
    Options: whole says that this is plain causal order, in which columns and distances are taken as blocks
    of 64 keys, and blocks are possible.
    """
    if not k.shape[1]:
        wide = torch.promote_types(q.dtype, torch.float32)
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(
            q.shape[:3], -torch.inf, dtype=wide
        )
    if mode.kind == "grid":
        return _comb(mode, q, k, v, visible)
    return attend(q, k, v, _pattern(mode, q, k, visible, whole), return_lse=True)


def _pattern(mode: Mode, q: Tensor, k: Tensor, visible: Tensor, whole: bool) -> Pattern:
    zero = torch.zeros_like(visible)
    if mode.kind == "a_shape":
        near = (visible - mode.second).clamp(min=0)
        return Rows(near, visible) | Rows(zero, near.clamp(max=mode.first))
    if mode.kind == "vertical_slash":
        if not whole:
            return Chosen(_columns_and_distances(mode, q, k, visible))
        return Chosen(VerticalSlash(mode.first, mode.second).select(q, k)) & Causal()
    if mode.kind == "blocks":
        if not whole:
            raise SelectionError("kind", "blocks", "a boundary of none is needed for blocks")
        found = select(q, k, Pooled(softmax=False), TopK(mode.first), q_block=_TILE, kv_block=_TILE)
        return Blocks(found) & Causal()
    return Rows(zero, visible)


def _last_map(q: Tensor, k: Tensor, visible: Tensor, queries: int = 64) -> tuple[Tensor, Tensor]:
    """Weights [B, H, n, Lk] of the last queries, and how many keys those see [n]."""
    own, seen = q[:, -queries:].detach(), visible[-queries:]
    wide = torch.promote_types(q.dtype, torch.float32)
    s = against_keys(own, k.detach()).to(wide) * q.shape[-1] ** -0.5
    hidden = torch.arange(k.shape[1], device=k.device) >= seen[:, None]
    return torch.softmax(s.masked_fill(hidden, -torch.inf), dim=-1).nan_to_num(0.0), seen


def _columns_and_distances(mode: Mode, q: Tensor, k: Tensor, visible: Tensor) -> TokenSelection:
    """The heaviest columns and distances of the last queries, key by key for every query."""
    p, seen = _last_map(q, k, visible)
    length = k.shape[1]
    columns = p.sum(2)
    offset = (seen[:, None] - 1 - torch.arange(length, device=k.device)).clamp(min=0)
    offsets = torch.zeros_like(columns).scatter_add_(
        -1, offset.expand_as(p).flatten(2), p.flatten(2)
    )
    columns[..., : min(30, mode.first)] = torch.inf
    offsets[..., : min(100, mode.second)] = torch.inf
    best = columns.topk(min(mode.first, length)).indices
    apart = offsets.topk(min(mode.second, length)).indices
    last = visible[:, None] - 1
    listed = torch.cat([
        best[:, :, None].expand(-1, -1, len(visible), -1),
        last - apart[:, :, None],
    ], dim=-1)  # fmt: skip
    listed = torch.where((listed < 0) | (listed > last), length, listed).sort(-1).values
    again = torch.nn.functional.pad(listed.diff(dim=-1) == 0, (1, 0))
    listed = listed.masked_fill(again, length).sort(-1).values
    return TokenSelection(torch.where(listed == length, -1, listed).to(torch.int32))


def find_comb(columns: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Stride 2 ... most and place of the comb of keys that holds most mass beyond its share of the keys.

    Shapes: columns [..., L], mass per key; both results int64 [...].  Ties go to the smaller stride.
    """
    if most < 2:
        raise SelectionError("most", most, "at least 2 is needed")
    share = columns / columns.sum(-1, keepdim=True).clamp(min=1e-30)
    gains, places = [], []
    for stride in range(2, most + 1):
        behind = -columns.shape[-1] % stride
        folded = torch.nn.functional.pad(share, (0, behind)).unflatten(-1, (-1, stride)).sum(-2)
        best = folded.max(-1)
        gains.append(best.values - 1 / stride)
        places.append(best.indices)
    chosen = torch.stack(gains).argmax(0)
    return chosen + 2, torch.stack(places).gather(0, chosen[None])[0]


def _comb(mode: Mode, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """A window, and the keys of a comb before it, gathered so that they stand side by side."""
    p, _ = _last_map(q, k, visible)
    strides, places = find_comb(p.sum(2), min(mode.first, max(k.shape[1], 2)))
    near = (visible - mode.second).clamp(min=0)
    o, lse = attend(q, k, v, Rows(near, visible), return_lse=True)
    if not len(q):
        return o, lse
    batches = []
    for n in range(q.shape[0]):
        found = []
        for h in range(q.shape[2]):
            stride, place = int(strides[n, h]), int(places[n, h])
            comb = torch.arange(place, k.shape[1], stride, device=k.device)
            upper = torch.searchsorted(comb, near)
            one = (slice(n, n + 1), slice(None), slice(h, h + 1))
            far = attend(
                q[one], k[one][:, comb], v[one][:, comb],
                Rows(torch.zeros_like(upper), upper), return_lse=True,
            )  # fmt: skip
            found.append(merge((o[one], far[0]), (lse[one], far[1])))
        batches.append([torch.cat(each, dim=2) for each in zip(*found, strict=True)])
    whole_o, whole_lse = (torch.cat(each) for each in zip(*batches, strict=True))
    return whole_o, whole_lse


CANDIDATES: tuple[Mode, ...] = (
    Mode("vertical_slash", 30, 800), Mode("vertical_slash", 100, 750),
    Mode("vertical_slash", 500, 700), Mode("vertical_slash", 3500, 100),
    Mode("a_shape", 100, 800), Mode("blocks", 100),
)  # fmt: skip
"""Modes of about one cost, as MInference searches them for prompts of 30,000 tokens and more."""


def search_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    candidates: Sequence[Mode] = CANDIDATES,
    *,
    kinds: Tensor | None = None,
    tolerance: float = 5e-3,
) -> tuple[Head, ...]:
    """For every query head, the entry with the fewest outputs further than `tolerance` from dense attention.

    With kinds of tokens the boundaries "query" and "both" are tried, too: the best mode is found for each
    kind of queries, or for each pair of kinds with the other pairs dense.  Ties go to the earlier
    candidate and to the plainer boundary.
    Shapes: as of `attend_planned`; candidates cost about the same.
    """
    need_tensors(q=q, k=k, v=v)
    tensors_or_none(kinds=kinds)
    if not candidates:
        raise SelectionError("candidates", 0, "at least 1 is needed")
    if any(not isinstance(each, Mode) for each in candidates):
        raise OptionError("candidates", repr(candidates), "Modes are needed")
    if not finite(tolerance) or tolerance < 0:
        raise OptionError("tolerance", tolerance, "a number of at least 0 is needed")
    heads = q.shape[2]
    with torch.no_grad():
        dense = attend(q, k, v, Causal())

        def misses(chosen: Sequence[Head], rows: Tensor | None = None) -> Tensor:
            o = attend_planned(q, k, v, chosen, kinds)[0]
            far = ((o - dense).abs() > tolerance).sum((0, 3))  # [L, heads]
            return (far if rows is None else far[rows]).sum(0)

        found = [_best(candidates, lambda m: misses([Head("none", (m,))] * heads))]
        plans = [[Head("none", (found[0][h],)) for h in range(heads)]]
        if kinds is not None:
            plans += _with_kinds(candidates, kinds, heads, misses)
        losses = torch.stack([misses(plan) for plan in plans])
    return tuple(plans[int(n)][h] for h, n in enumerate(losses.argmin(0)))


def _with_kinds(
    candidates: Sequence[Mode], kinds: Tensor, heads: int, misses: Callable[..., Tensor]
) -> list[list[Head]]:
    """The best plan of every head for each of the two boundaries."""
    count, plans = int(kinds.max()) + 1, []
    usable = [mode for mode in candidates if mode.kind != "blocks"] or [Mode("dense")]
    boundaries: tuple[tuple[Boundary, int], ...] = (("query", count), ("both", count * count))
    for boundary, size in boundaries:
        best = [
            _best(usable, functools.partial(_tried, boundary, size, cell, kinds, heads, misses))
            for cell in range(size)
        ]
        plans.append([Head(boundary, tuple(own[h] for own in best)) for h in range(heads)])
    return plans


def _tried(
    boundary: Boundary,
    size: int,
    cell: int,
    kinds: Tensor,
    heads: int,
    misses: Callable[..., Tensor],
    mode: Mode,
) -> Tensor:
    """Misses of every head where one cell has a mode and the others are dense."""
    rows = (kinds == (cell if boundary == "query" else cell // (int(kinds.max()) + 1))).nonzero()
    modes = tuple(mode if n == cell else Mode("dense") for n in range(size))
    return misses([Head(boundary, modes)] * heads, rows[:, 0])


def _best(candidates: Sequence[Mode], misses: Callable[[Mode], Tensor]) -> list[Mode]:
    """Per head, the candidate with the fewest misses."""
    losses = torch.stack([misses(mode) for mode in candidates])
    return [candidates[int(n)] for n in losses.argmin(0)]
