"""The GPU edition, written in Triton: NVIDIA sm_80 and later, AMD gfx942."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveal._problem import Problem
from foveal._recent import Recent
from foveal.engines.common.current import on
from foveal.engines.common.once import once_differentiable
from foveal.engines.tile import triton as tile
from foveal.engines.tile.parts import Task, solve, whole_task
from foveal.engines.tile.replay import Replay, Results, replayed
from foveal.patterns.base import Extent, Pattern
from foveal.scores.base import Geometry
from foveal.scores.entmax import EntmaxForm
from foveal.scores.normal import NormalForm
from foveal.tuning import tile as tuning

_LEAST_ALPHA = 1.01


def refuses(problem: Problem, pattern: Pattern, score: EntmaxForm) -> str | None:
    if problem.return_lse:
        return "alpha-entmax has no log-sum-exp"
    if isinstance(score.alpha, Tensor):
        return "alpha per head, which may ask for its gradient, is a number in no kernel"
    if score.alpha < _LEAST_ALPHA:
        return (
            f"powers of 1 / (alpha - 1) need alpha >= {_LEAST_ALPHA} in float32, not {score.alpha}"
        )
    if score.scale <= 0:
        return f"it needs a scale above 0, not {score.scale}"
    reason = tile.refuses(problem, pattern, NormalForm(score.scale, None, None, ()))
    return reason or _refuses_lists(pattern, problem.extent)


def _refuses_lists(pattern: Pattern, extent: Extent) -> str | None:
    """Every pattern is walked by lists here."""
    from foveal.engines.tile.launch import refuses_lists

    pattern = pattern.simplify(extent)
    parts = pattern.parts(extent)
    if parts:
        reasons = (_refuses_lists(part.pattern, part.extent) for part in parts)
        return next((reason for reason in reasons if reason is not None), None)
    return refuses_lists(pattern, extent)


def attend(
    problem: Problem,
    pattern: Pattern,
    score: EntmaxForm,
    geometry: Geometry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, None]:
    """o [B, Lq, Hq, Dv] of q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]."""
    task = whole_task(problem, pattern, score, geometry, q.device)  # type: ignore[arg-type]

    def solver(own: Task, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        return KernelEntmax.apply(own, score, q, k, v), None  # type: ignore[no-untyped-call]

    o, _ = solve(task, q, k, v, solver)
    return o, None


class KernelEntmax(torch.autograd.Function):
    """o [N, Lq, Hq, Dv] of a task's tensors."""

    @staticmethod
    def forward(ctx: Any, task: Task, score: EntmaxForm, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from foveal.engines.entmax import launch

        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        training = any(ctx.needs_input_grad)

        def compute() -> Results:
            return launch.forward(launch.setting(task, score, q, v), q, k, v, training)

        o, *kept = _repeated(task, score, training, (q, k, v), compute)
        assert o is not None
        if training:
            ctx.task, ctx.score = task, score
            ctx.save_for_backward(q, k, v, *kept)
        return o

    @staticmethod
    @once_differentiable("triton")
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        from foveal.engines.entmax import launch

        q, k, v, *kept = ctx.saved_tensors
        do = do if do.stride(-1) == 1 else do.contiguous()
        task, score = ctx.task, ctx.score

        def compute() -> Results:
            return launch.backward(launch.setting(task, score, q, v), q, k, v, do, kept)

        found = _repeated(task, score, "backward", (q, k, v, do, *kept), compute)
        return None, None, *found


_REPLAYS: Recent[Replay | int] = Recent(64)


def _repeated(
    task: Task,
    score: EntmaxForm,
    kind: object,
    tensors: tuple[Tensor, ...],
    compute: Callable[[], Results],
) -> Results:
    """compute(), as a repetition of its launches if a call like it was there before."""
    x = tensors[0]
    if x.device.type != "cuda":
        return compute()
    with on(x.device):
        if task.pattern.depends_on_data or tuning.measuring():
            return compute()
        key = (kind, task.pattern, task.extent, score.alpha, score.scale, x.dtype, x.device)
        return replayed(_REPLAYS, key, tensors, compute)
