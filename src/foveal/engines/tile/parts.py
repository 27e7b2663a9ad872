"""Patterns that fall apart into independent sub-problems, solved one kind after another.

Dilation classes, residues, axes, pieces, documents: the tokens of each are gathered, stacked on the
batch axis and handed to an implementation that knows nothing of where they came from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._problem import Problem
from foveal.patterns.base import Extent, Pattern
from foveal.scores.base import Geometry
from foveal.scores.normal import NormalForm


@dataclass(frozen=True)
class Task:
    """What to compute: P sub-problems of one pattern, and where their tokens stand in the whole.

    `geometry` is that of the whole, where additive terms are evaluated.
    """

    pattern: Pattern
    extent: Extent
    q_tokens: Tensor  # [P, Lq]
    k_tokens: Tensor  # [P, Lk]
    score: NormalForm
    geometry: Geometry
    with_lse: bool


# o [N, Lq, Hq, Dv] and lse [N, Lq, Hq], if the task asks for it, of q, k, v with N = batch x P.
Solver = Callable[[Task, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def whole_task(
    problem: Problem, pattern: Pattern, score: NormalForm, geometry: Geometry, device: torch.device
) -> Task:
    """The problem as one task of one sub-problem."""
    extent = problem.extent
    q_tokens = torch.arange(extent.Lq, device=device)[None]
    k_tokens = torch.arange(extent.Lk, device=device)[None]
    return Task(pattern, extent, q_tokens, k_tokens, score, geometry, problem.return_lse)


def solve(
    task: Task, q: Tensor, k: Tensor, v: Tensor, solver: Solver
) -> tuple[Tensor, Tensor | None]:
    """Runs `solver` on every part of the task's pattern and puts the results in place."""
    pattern = task.pattern.simplify(task.extent)
    parts = pattern.parts(task.extent)
    if not parts:
        whole = Task(
            pattern,
            task.extent,
            task.q_tokens,
            task.k_tokens,
            task.score,
            task.geometry,
            task.with_lse,
        )
        return solver(whole, q, k, v)
    outputs, lses, order = [], [], []
    for part in parts:
        count = len(part.q_tokens)
        q_index, k_index = part.q_tokens.to(q.device), part.k_tokens.to(q.device)
        inner = Task(
            part.pattern,
            part.extent,
            task.q_tokens[:, q_index].flatten(0, 1),
            task.k_tokens[:, k_index].flatten(0, 1),
            task.score,
            task.geometry,
            task.with_lse,
        )
        q_part, k_part, v_part = (
            x[:, index].flatten(0, 1) for x, index in ((q, q_index), (k, k_index), (v, k_index))
        )
        o, lse = solve(inner, q_part, k_part, v_part, solver)
        outputs.append(o.unflatten(0, (-1, count)).flatten(1, 2))
        if lse is not None:
            lses.append(lse.unflatten(0, (-1, count)).flatten(1, 2))
        order.append(q_index.flatten())
    back = torch.argsort(torch.cat(order))
    lse = torch.cat(lses, dim=1)[:, back] if task.with_lse else None
    return torch.cat(outputs, dim=1)[:, back], lse
