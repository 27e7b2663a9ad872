"""Queries on a finer grid than the keys."""

from __future__ import annotations

import dataclasses
from typing import Literal, overload

from torch import Tensor

from foveal._attend import attend
from foveal._errors import ScoreError, ShapeError
from foveal.patterns import Dense, Pattern
from foveal.scores import KeyBias, RelativeBias, Score, Softmax
from foveal.scores.base import Composed


@overload
def attend_finer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = ...,
    score: Score = ...,
    *,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
) -> Tensor: ...
@overload
def attend_finer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = ...,
    score: Score = ...,
    *,
    return_lse: Literal[True],
    implementation: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attend_finer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = Dense(),
    score: Score = Softmax(),
    *,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Query i of a grid r times finer per axis sees what query floor(i / r) of the key grid would see.

    Shapes: q [B, *grid_q, Hq, D] with grid_q[a] = r_a grid_k[a], whole numbers r_a >= 1 of each axis;
    k and v on grid_k; returns o [B, *grid_q, Hq, Dv] and, with return_lse, lse [B, *grid_q, Hq].
    Options: pattern and the terms of the score speak of the key grid; terms per pair (Bias) and per
    distance are refused.
    Equals: `attend` with k and v repeated r times per axis and a neighborhood of dilation r whose
    window counts steps of r; r = 1 is `attend`.
    Cost: that of `attend`: the queries of one key cell run as heads that share its keys.
    """
    q_grid, grid = tuple(q.shape[1:-2]), tuple(k.shape[1:-2])
    if len(q_grid) != len(grid) or any(a % b for a, b in zip(q_grid, grid, strict=True)):
        raise ShapeError("q", list(q.shape), f"whole multiples of the key grid {grid} are needed")
    ratios = tuple(a // b for a, b in zip(q_grid, grid, strict=True))
    cells = _to_heads(q, grid, ratios)
    count = cells.shape[-2] // q.shape[-2]
    o, lse = attend(
        cells, k, v, pattern, _spread(score, count), return_lse=True, implementation=implementation
    )
    o = _from_heads(o, ratios, q.shape[-2])
    if not return_lse:
        return o
    return o, _from_heads(lse[..., None], ratios, q.shape[-2]).squeeze(-1)


def _to_heads(q: Tensor, grid: tuple[int, ...], ratios: tuple[int, ...]) -> Tensor:
    """[B, *grid, H * prod(ratios), D], the queries of a cell next to each other within each head."""
    rank = len(grid)
    for axis, sizes in enumerate(zip(grid, ratios, strict=True)):
        q = q.unflatten(1 + 2 * axis, sizes)
    cells, within = range(1, 1 + 2 * rank, 2), range(2, 2 + 2 * rank, 2)
    q = q.permute(0, *cells, 2 * rank + 1, *within, 2 * rank + 2)
    return q.flatten(1 + rank, -2)


def _from_heads(x: Tensor, ratios: tuple[int, ...], heads: int) -> Tensor:
    rank = len(ratios)
    x = x.unflatten(1 + rank, (heads, *ratios))
    order = [0]
    for axis in range(rank):
        order += [1 + axis, 2 + rank + axis]
    x = x.permute(*order, 1 + rank, 2 * rank + 2)
    for axis in range(rank):
        x = x.flatten(1 + axis, 2 + axis)
    return x


def _spread(score: Score, count: int) -> Score:
    """The score with every value per query head repeated for the queries of a cell."""
    if isinstance(score, Composed):
        return Composed(tuple(_spread(member, count) for member in score.members))
    if isinstance(score, Softmax):
        sink = None if score.sink is None else score.sink.repeat_interleave(count)
        return dataclasses.replace(score, sink=sink)
    if isinstance(score, RelativeBias):
        return RelativeBias(_repeated(score.table, 0, count))
    if isinstance(score, KeyBias):
        return KeyBias(_repeated(score.tensor, 1, count))
    raise ScoreError("score", score.key, "a finer grid takes Softmax, KeyBias and RelativeBias")


def _repeated(values: Tensor, axis: int, count: int) -> Tensor:
    """One value for all heads stays one."""
    return values if values.shape[axis] == 1 else values.repeat_interleave(count, dim=axis)
