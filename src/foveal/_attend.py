"""The tile engine's verb."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from foveal._errors import PatternError, ScoreError
from foveal._memory import memory_note
from foveal._plan import TILE_IMPLEMENTATIONS, Plan, choose
from foveal._problem import Problem, describe
from foveal.patterns.base import Pattern
from foveal.patterns.dense import Dense
from foveal.patterns.documents import pack
from foveal.scores.base import Geometry, Score
from foveal.scores.normal import NormalForm, check_parameters, normal_form
from foveal.scores.softmax import Softmax


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = ...,
    score: Score = ...,
    *,
    cu_seqlens: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    implementation: str | None = ...,
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = ...,
    score: Score = ...,
    *,
    cu_seqlens: Tensor | None = ...,
    return_lse: Literal[True],
    implementation: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = Dense(),
    score: Score = Softmax(),
    *,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """o_i = sum_j w_ij v_j over the keys j that `pattern` lets query i see, w_i = softmax of `score`.

    Shapes: q [B, *grid, Hq, D], k [B, *grid, Hkv, D], v [B, *grid, Hkv, Dv] with one to three grid
    axes; Hkv divides Hq and query head h reads key head h // (Hq / Hkv).  Returns o
    [B, *grid, Hq, Dv] in the dtype of q and, with `return_lse`, the natural log of the softmax
    denominator [B, *grid, Hq] in float32 (float64 for float64 inputs).  Gradients flow through both.
    Options: cu_seqlens int32 [N + 1], ascending from 0 to the total, confines the pattern to packed
    documents (B is 1 as a rule, any B shares the cut); implementation names one of "hopper", "triton",
    "sdpa", "cpu", "reference", which then runs or raises RefusedError; None lets the plan choose.
    Cost: 2 (D + Dv) FLOPs per visible pair and query head forward, 2.5 times that backward.
    Limits: a row that sees no key gives o = 0, lse = -inf and gradient 0; NaN and inf reach the rows
    that see them and no others.  Raises a subclass of foveal.errors.FovealError on bad input.
    """
    problem = describe(q, k, v, return_lse)
    plan, form, geometry = prepare(problem, q.device, pattern, score, cu_seqlens, implementation)
    flat = (x.flatten(1, -3) for x in (q, k, v))
    with memory_note(problem, plan):
        o, lse = TILE_IMPLEMENTATIONS[plan.implementation].attend(
            problem, plan.pattern, form, geometry, *flat
        )
    grid = problem.extent.q_grid
    o = o.unflatten(1, grid)
    return (o, lse.to(problem.lse_dtype).unflatten(1, grid)) if return_lse else o


def prepare(
    problem: Problem,
    device: torch.device,
    pattern: Pattern,
    score: Score,
    cu_seqlens: Tensor | None,
    implementation: str | None,
) -> tuple[Plan, NormalForm, Geometry]:
    """Everything that is decided before a kernel runs."""
    if not isinstance(pattern, Pattern):
        raise PatternError("pattern", type(pattern), "a pattern such as fv.Causal() is needed")
    if not isinstance(score, Score):
        raise ScoreError("score", type(score), "a score such as fv.Softmax() is needed")
    if cu_seqlens is not None:
        pattern = pack(pattern, cu_seqlens, problem.extent)
    else:
        pattern.validate(problem.extent)
    pattern.validate_lists(problem.batch, problem.q_heads, problem.kv_heads)
    geometry = Geometry(pattern, problem.extent, problem.batch, problem.q_heads, problem.kv_heads)
    form = normal_form(score, problem.head_dim, geometry)
    check_parameters(form, device)
    return choose(problem, pattern, form, implementation), form, geometry
