"""The tiled edition in plain PyTorch: time and memory follow the tiles visited, never Lq x Lk.

A small plain problem is one call on all pairs where that is estimated to cost less (`cpu_whole`).
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from foveal._problem import Problem
from foveal.engines.tile import cpu_whole
from foveal.engines.tile.parts import Task, solve, whole_task
from foveal.engines.tile.token_lists import listed
from foveal.patterns.base import Pattern
from foveal.scores.base import Geometry
from foveal.scores.normal import NormalForm


def refuses(problem: Problem, pattern: Pattern, score: NormalForm) -> str | None:
    if problem.device != "cpu":
        return f"it runs on CPU tensors; these are on {problem.device}"
    return None


def method(problem: Problem, pattern: Pattern, score: NormalForm) -> str | None:
    """How a problem is computed where it is not by tiles, in a sentence."""
    whole = cpu_whole.estimate(problem, pattern, score)
    return None if whole is None else str(whole)


def attend(
    problem: Problem,
    pattern: Pattern,
    score: NormalForm,
    geometry: Geometry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """o [B, Lq, Hq, Dv] and lse [B, Lq, Hq] of q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]."""
    lists = listed(pattern, problem.extent, problem.kv_heads) if score.plain else None
    if lists is not None:
        from foveal.engines.tile.listed_tokens import attend_lists

        indices = lists.indices.expand(problem.batch, -1, -1, -1)
        return attend_lists(q, k, v, dataclasses.replace(lists, indices=indices), score.scale)
    if lists_per_query_head(problem, pattern):
        k = k.repeat_interleave(problem.groups, dim=2)
        v = v.repeat_interleave(problem.groups, dim=2)
    precision = torch.float64 if problem.dtype == torch.float64 else torch.float32
    q, k, v = (x.to(precision) for x in (q, k, v))
    if cpu_whole.estimate(problem, pattern, score) is not None and all_finite(q, k, v):
        hidden = cpu_whole.hidden_pairs(pattern, problem.extent, precision)
        return cpu_whole.attend_whole(hidden, score.scale, q, k, v).to(problem.dtype), None
    task = whole_task(problem, pattern, score, geometry, q.device)
    o, lse = solve(task, q, k, v, _tiled)
    return o.to(problem.dtype), lse


def all_finite(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether no element is NaN or inf; False too if the sum of one overflows, which only costs time."""
    with torch.no_grad():
        return all(math.isfinite(x.sum().item()) for x in (q, k, v))


def lists_per_query_head(problem: Problem, pattern: Pattern) -> bool:
    """Whether the lists differ between the query heads that share keys."""
    if problem.groups == 1 or not pattern.depends_on_data:
        return False
    from foveal.engines.tile.walk import flat_tile

    states = pattern.tile_map(problem.extent, *flat_tile(pattern))
    return states.shape[1] == problem.q_heads


def _tiled(task: Task, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Views with heads first, query heads grouped by the key head they share."""
    from foveal.engines.tile.cpu_tiles import TiledAttention

    q = q.transpose(1, 2).unflatten(1, (k.shape[2], -1))  # [N, Hkv, G, Lq, D]
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # [N, Hkv, Lk, D]
    o, lse = TiledAttention.apply(task, q, k, v, *task.score.parameters)  # type: ignore[no-untyped-call]
    lse = lse.flatten(1, 2).transpose(1, 2) if task.with_lse else None
    return o.flatten(1, 2).transpose(1, 2), lse
