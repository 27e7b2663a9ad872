"""Additive terms of a score as the tensors and numbers that the GPU hooks read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._kept import kept
from foveal.engines.tile.parts import Task
from foveal.patterns.base import Bounds, Extent, Pattern
from foveal.patterns.blocked import Reordered
from foveal.scores.base import Additive, Geometry
from foveal.scores.bias import Alibi, Bias, KeyBias, RelativeBias
from foveal.scores.normal import NormalForm

PER_PAIR, PER_KEY, BY_DISTANCE, FROM_TABLE = "per pair", "per key", "by distance", "from a table"
MOST_KINDS = 2


@dataclass(frozen=True)
class LocalTerm:
    """One kind of term on the tokens of a task; a sum of terms of that kind.

    values: [N or 1, Hq or 1, Lq, Lk or 1] per pair, [N or 1, heads, Lk] per key, [Hq] slopes, or
    [Hq or 1, entries] of a table; codes int32 [P, Lq] and [P, Lk]: their difference is the distance, or
    the entry of the table.
    """

    kind: str
    values: Tensor
    q_codes: Tensor | None = None
    k_codes: Tensor | None = None


def term_kinds(score: NormalForm) -> set[str]:
    return {_kind(term, _is_row(term)) for term in score.terms}


def refuses_terms(score: NormalForm) -> str | None:
    """Why the terms of a score cannot be summed here, or None."""
    kinds = term_kinds(score)
    if len(kinds) > MOST_KINDS:
        return f"it adds terms of at most {MOST_KINDS} kinds; here are {', '.join(sorted(kinds))}"
    tables = {tuple(t.parameter.shape[1:]) for t in score.terms if isinstance(t, RelativeBias)}
    if len(tables) > 1:
        return f"its tables share one shape; here are {sorted(tables)}"
    unknown = [t.key for t in score.terms if not isinstance(t, _KNOWN)]
    return f"it has no kernel for {unknown[0]}" if unknown else None


_KNOWN = (Bias, KeyBias, Alibi, RelativeBias)


def _is_row(term: Additive) -> bool:
    return isinstance(term, Bias) and term.parameter.shape[2] == 1


def _kind(term: Additive, row: bool) -> str:
    if isinstance(term, Bias):
        return PER_KEY if row and term.parameter.shape[3] > 1 else PER_PAIR
    if isinstance(term, KeyBias):
        return PER_KEY
    return BY_DISTANCE if isinstance(term, Alibi) else FROM_TABLE


def local_terms(task: Task, whole: bool) -> tuple[LocalTerm, ...]:
    """The terms of the task's score on its tokens; differentiable in their tensors.

    `whole`: the task holds the tokens of the problem as they are.
    """
    found: dict[str, LocalTerm] = {}
    for term in task.score.terms:
        local = _local(term, task, whole)
        before = found.get(local.kind)
        if before is not None:
            total = _sum(before.values, local.values, task.geometry)
            local = LocalTerm(local.kind, total, local.q_codes, local.k_codes)
        found[local.kind] = local
    return tuple(found.values())


def _sum(a: Tensor, b: Tensor, at: Geometry) -> Tensor:
    if a.dim() == 3 and a.shape[1] != b.shape[1]:
        a, b = (x.repeat_interleave(at.q_heads // x.shape[1], dim=1) for x in (a, b))
    return a + b


def _local(term: Additive, task: Task, whole: bool) -> LocalTerm:
    kind = _kind(term, _is_row(term))
    if kind == BY_DISTANCE:
        q_place = task.q_tokens + (task.geometry.extent.Lk - task.geometry.extent.Lq)
        return LocalTerm(
            kind,
            term.parameter,
            q_place.to(torch.int32).contiguous(),
            task.k_tokens.to(torch.int32).contiguous(),
        )
    if kind == FROM_TABLE:
        geometry, tokens = task.geometry, None if whole else (task.q_tokens, task.k_tokens)
        at = _Places(task.pattern, task.extent, geometry.pattern, geometry.extent, tokens)
        find = _codes if geometry.pattern.depends_on_data else _kept_codes
        q_codes, k_codes = find(tuple(term.parameter.shape[1:]), at, term.parameter.device)
        return LocalTerm(kind, term.parameter.flatten(1), q_codes, k_codes)
    if whole:
        values = term.parameter
        if kind == PER_KEY and values.dim() == 4:
            values = values[:, :, 0]
        return LocalTerm(kind, values)
    values = term.values(term.parameter, task.q_tokens, task.k_tokens, task.geometry)
    if values.shape[0] * values.shape[1] > 1:
        values = values.expand(task.geometry.batch, len(task.q_tokens), *values.shape[2:])
    values = values.flatten(0, 1)  # [N or 1, Hq or 1, Lq or 1, Lk or 1]
    return LocalTerm(kind, values[:, :, 0] if kind == PER_KEY else values)


@dataclass(frozen=True)
class _Places:
    """Where a task stands in the whole; tokens None: it is the whole.

    Two are the same if their tokens are the same tensors, as those of a division that is kept are.
    """

    pattern: Pattern
    extent: Extent
    whole_pattern: Pattern
    whole_extent: Extent
    tokens: tuple[Tensor, Tensor] | None


@kept(64)
def _kept_codes(sizes: tuple[int, ...], at: _Places, device: torch.device) -> tuple[Tensor, Tensor]:
    return _codes(sizes, at, device)


def _codes(sizes: tuple[int, ...], at: _Places, device: torch.device) -> tuple[Tensor, Tensor]:
    """Codes [1, Lq], [1, Lk] whose difference is the entry of every visible pair of a table [*sizes].

    Within a sub-problem the offset of a pair is linear in the difference of its local places, so two
    visible pairs per axis tell the factor of that axis.
    """
    if isinstance(at.pattern, Reordered):
        return _ordered_codes(sizes, at, at.pattern, device)
    grids = (at.extent.q_grid, at.extent.kv_grid)
    bounds = at.pattern.bounds(at.extent)
    if bounds is not None and bounds.extent.kv_grid != grids[1]:
        bounds = None
    rank = len(grids[1])
    factors = [0] * rank
    query, key = _widest_pair(bounds, rank)
    for axis in range(rank):
        after = [k + (a == axis) for a, k in enumerate(key)]
        if after[axis] < grids[1][axis]:
            factors[axis] = _entry(sizes, at, query, after) - _entry(sizes, at, query, key)
    constant = _entry(sizes, at, query, key)
    constant -= sum(f * (k - q) for f, k, q in zip(factors, key, query, strict=True))
    q_codes, k_codes = (_linear(factors, grid, device) for grid in grids)
    return q_codes - constant, k_codes


def _ordered_codes(
    sizes: tuple[int, ...], at: _Places, pattern: Reordered, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The codes on the grid, then in the order in which the pattern has the tokens of the grid."""
    order = pattern.order
    assert at.tokens is not None, "the whole is in raster order"
    back = order.argsort().to(at.tokens[0].device)
    tokens = at.tokens[0][:, back], at.tokens[1][:, back]
    extent = Extent(pattern.grid, pattern.grid)
    raster = _Places(pattern.inner, extent, at.whole_pattern, at.whole_extent, tokens)
    q_codes, k_codes = _codes(sizes, raster, device)
    order = order.to(device)
    return q_codes[:, order], k_codes[:, order]


def _linear(factors: list[int], grid: tuple[int, ...], device: torch.device) -> Tensor:
    """sum of factor x place over the axes, per token.  int32 [1, L]"""
    total = torch.zeros((), dtype=torch.int32, device=device)
    for axis, (factor, length) in enumerate(zip(factors, grid, strict=True)):
        place = torch.arange(length, dtype=torch.int32, device=device) * factor
        total = total + place.view(*(-1 if a == axis else 1 for a in range(len(grid))))
    return total.reshape(1, -1)


def _widest_pair(bounds: Bounds | None, rank: int) -> tuple[list[int], list[int]]:
    """A query that sees as many keys along every axis as any, and the first key that it sees."""
    if bounds is None:
        return [0] * rank, [0] * rank
    widths = [hi - lo for lo, hi in zip(bounds.lower, bounds.upper, strict=True)]
    query = [int(width.argmax()) for width in widths]
    return query, [int(lo[q]) for lo, q in zip(bounds.lower, query, strict=True)]


def _entry(sizes: tuple[int, ...], at: _Places, query: list[int], key: list[int]) -> int:
    """Where in the flat table the pair of two local places falls, before any clamp."""
    tokens = []
    for number, (place, grid) in enumerate(
        zip((query, key), (at.extent.q_grid, at.extent.kv_grid), strict=True)
    ):
        index = 0
        for coordinate, length in zip(place, grid, strict=True):
            index = index * length + coordinate
        token = torch.tensor([index]) if at.tokens is None else at.tokens[number][:1, index].cpu()
        tokens.append(token)
    q_pos = tokens[0] + (at.whole_extent.Lk - at.whole_extent.Lq)
    entry = 0
    offsets = at.whole_pattern.offsets(q_pos, tokens[1], at.whole_extent)
    for size, offset in zip(sizes, offsets, strict=True):
        entry = entry * size + int(offset) + size // 2
    return entry
