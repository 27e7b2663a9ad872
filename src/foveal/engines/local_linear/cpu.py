"""The tiled edition in plain PyTorch: a solve per tile of queries, never Lq x Lk."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._problem import Problem
from foveal.engines.local_linear.cpu_tiles import Setting, TiledLocalLinear
from foveal.engines.local_linear.solution import Solution
from foveal.engines.tile.cpu import lists_per_query_head
from foveal.engines.tile.parts import Task, solve, whole_task
from foveal.patterns.base import Pattern
from foveal.scores.base import Geometry
from foveal.scores.local_linear import LocalForm
from foveal.scores.normal import NormalForm


def refuses(problem: Problem, pattern: Pattern, score: LocalForm) -> str | None:
    if problem.device != "cpu":
        return f"it runs on CPU tensors; these are on {problem.device}"
    return None


def attend(
    problem: Problem,
    pattern: Pattern,
    score: LocalForm,
    geometry: Geometry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """o [B, Lq, Hq, Dv] and lse [B, Lq, Hq] of q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]."""
    o, lse, _ = solved(problem, pattern, score, geometry, q, k, v)
    return o, lse


def solved(
    problem: Problem,
    pattern: Pattern,
    score: LocalForm,
    geometry: Geometry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor | None, Solution]:
    """o and lse as of `attend`, and what the solves reached."""
    if lists_per_query_head(problem, pattern):
        k = k.repeat_interleave(problem.groups, dim=2)
        v = v.repeat_interleave(problem.groups, dim=2)
    precision = torch.float64 if problem.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(precision) for x in (q, k, v))
    if score.r is None:
        given = score.ridge_per_head(problem.q_heads, q)
    else:
        given = q.new_empty(0)
        # Where tokens are gathered r goes with q.
        q = torch.cat([q, score.r.flatten(1, -3).to(precision)], dim=-1)
    solution = Solution()
    limit, iterations = score.residual_limit(problem.dtype), score.max_iterations
    setting = Setting(limit, iterations, score.detached, score.r is not None, solution)
    form = NormalForm(score.scale, None, None, ())

    def tiled(task: Task, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Views with heads first, query heads grouped by the key head they share."""
        q = q.transpose(1, 2).unflatten(1, (k.shape[2], -1))  # [N, Hkv, G, Lq, D]
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # [N, Hkv, Lk, D]
        o, lse = TiledLocalLinear.apply(task, setting, q, k, v, given)  # type: ignore[no-untyped-call]
        lse = lse.flatten(1, 2).transpose(1, 2) if task.with_lse else None
        return o.flatten(1, 2).transpose(1, 2), lse

    task = whole_task(problem, pattern, form, geometry, q.device)
    o, lse = solve(task, q, k, v, tiled)
    return o.to(problem.dtype), lse, solution
