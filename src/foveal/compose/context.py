"""Keys beside the grid that every query sees: registers, text of an image, a global context."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from foveal._attend import attend
from foveal._errors import ShapeError
from foveal.compose.merge import merge
from foveal.patterns import Dense, Pattern
from foveal.scores import Score, Softmax
from foveal.scores.base import Composed


@overload
def attend_with_context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    pattern: Pattern = ...,
    score: Score = ...,
    *,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
) -> Tensor: ...
@overload
def attend_with_context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    pattern: Pattern = ...,
    score: Score = ...,
    *,
    return_lse: Literal[True],
    implementation: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attend_with_context(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    pattern: Pattern = Dense(),
    score: Score = Softmax(),
    *,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One softmax over the keys that `pattern` shows and, for every query, all keys of the context.

    Shapes: q, k, v as in `attend`; context_k [B, Lx, Hkv, D], context_v [B, Lx, Hkv, Dv]; returns what
    `attend` returns.  Gradients flow into all five tensors and those of the score.
    Options: scale and soft cap of the score act on both, its sink counts once, its additive terms
    and its pattern speak of the grid only; implementation names that of the grid, the plan chooses
    for the context.
    Equals: `attend` over the concatenation of grid and context, by `merge` of two calls.
    Cost: that of `attend`, and 2 (D + Dv) Lq Lx Hq FLOPs.
    """
    if context_k.dim() != 4 or context_v.dim() != 4:
        raise ShapeError("context_k", list(context_k.shape), "[B, Lx, Hkv, D] is needed")
    near = attend(q, k, v, pattern, score, return_lse=True, implementation=implementation)
    flat = q.flatten(1, -3)
    far = attend(flat, context_k, context_v, Dense(), _bare(score), return_lse=True)
    grid = q.shape[1:-2]
    o, lse = merge(
        (near[0], far[0].unflatten(1, grid)),
        (near[1], far[1].unflatten(1, grid)),
    )
    return (o, lse) if return_lse else o


def _bare(score: Score) -> Softmax:
    """Scale and soft cap of a score, without what speaks of the grid and without its sink."""
    members = score.members if isinstance(score, Composed) else (score,)
    softmax = next((member for member in members if isinstance(member, Softmax)), Softmax())
    return Softmax(softmax.scale, softmax.soft_cap)
