"""The portable GPU edition, written in Triton: NVIDIA sm_80 and later, AMD gfx942."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal._problem import Problem
from foveal.engines.tile.parts import Task, solve, whole_task
from foveal.patterns.base import Extent, Pattern
from foveal.patterns.dense import Dense
from foveal.scores.base import Geometry
from foveal.scores.normal import NormalForm

_LARGEST_DIM = 256


def refuses(problem: Problem, pattern: Pattern, score: NormalForm) -> str | None:
    if problem.device != "cuda" and not (problem.device == "cpu" and _interpreted()):
        return f"it runs on CUDA tensors; these are on {problem.device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if problem.dtype == torch.float64:
        return "GPU matrix units have no float64 edition here; use float32 or less"
    if problem.dtype == torch.bfloat16 and problem.device == "cpu":
        return "Triton's interpreter computes bfloat16 products wrongly"
    if max(problem.head_dim, problem.value_dim) > _LARGEST_DIM:
        return (
            f"its tiles hold a head_dim and value_dim of at most {_LARGEST_DIM}; "
            f"here are {problem.head_dim} and {problem.value_dim}"
        )
    if problem.device == "cuda" and min(problem.head_dim, problem.value_dim) < 2:
        return "a head_dim of 1 makes strides of 1, which Triton 3.6 folds away and then rejects"
    if torch.cuda.is_available() and torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            return f"it needs compute capability 8.0 or later; this device has {capability}"
    from foveal.engines.tile.terms import refuses_terms

    return refuses_terms(score) or _refuses_pattern(pattern, problem)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _refuses_pattern(pattern: Pattern, problem: Problem) -> str | None:
    if pattern.depends_on_data:
        return _refusal(pattern, problem.extent)
    return _kept_refusal(pattern, problem.extent)


@functools.lru_cache(maxsize=256)
def _kept_refusal(pattern: Pattern, extent: Extent) -> str | None:
    return _refusal(pattern, extent)


def _refusal(pattern: Pattern, extent: Extent) -> str | None:
    from foveal.engines.tile.launch import refuses_lists, separable

    parts = pattern.parts(extent)
    if parts:
        reasons = (_refusal(part.pattern, part.extent) for part in parts)
        return next((reason for reason in reasons if reason is not None), None)
    return None if separable(pattern, extent) else refuses_lists(pattern, extent)


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
    task = whole_task(problem, pattern, score, geometry, q.device)
    return solve(task, q, k, v, functools.partial(_attend_task, task.q_tokens))


def _attend_task(
    whole: Tensor, task: Task, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor | None]:
    from foveal.engines.tile.terms import local_terms

    terms = local_terms(task, task.q_tokens is whole)
    values = tuple(term.values for term in terms)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    o, lse = _TileAttention.apply(task, terms, q, k, v, task.score.sink, *values)  # type: ignore[no-untyped-call]
    return o, lse.transpose(1, 2) if task.with_lse else None


class _TileAttention(torch.autograd.Function):
    """o [N, Lq, Hq, Dv] and lse [N, Hq, Lq] of q [N, Lq, Hq, D], k and v [N, Lk, Hkv, .].

    lse is in base 2, and not differentiable, unless the task asks for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        task: Task,
        terms: tuple[Any, ...],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        *values: Tensor,
    ) -> tuple[Tensor, Tensor]:
        from foveal.engines.tile.forward import launch_forward
        from foveal.engines.tile.launch import Sizes, scoring, stage
        from foveal.engines.tile.repair import launch_repair
        from foveal.tuning.tile import FORWARD

        heads = q.shape[2]
        ctx.sizes = Sizes(q.shape[-1], v.shape[-1], q.dtype, q.device)
        ctx.task = task
        ctx.terms = tuple(dataclasses.replace(t, values=t.values.new_empty(0)) for t in terms)
        forward = stage(FORWARD, task, terms, ctx.sizes, heads)
        score = scoring(task, terms, heads)
        o, lse, suspect = launch_forward(forward, q, k, v, sink, score)
        if len(suspect) and not isinstance(task.pattern, Dense):
            launch_repair(forward, q, k, v, o, lse, suspect, score)
        ctx.save_for_backward(q, k, v, sink, o, lse, *values)
        if task.with_lse:
            return o, lse * math.log(2)
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        from foveal.engines.tile.gradients import gradients

        q, k, v, sink, o, lse, *values = ctx.saved_tensors
        terms = tuple(
            dataclasses.replace(term, values=x) for term, x in zip(ctx.terms, values, strict=True)
        )
        needed = ctx.needs_input_grad[2:]
        tensors = (q, k, v, o, lse)
        found = gradients(ctx.task, terms, ctx.sizes, tensors, sink, do, dlse, needed)
        return (None, None, *found)
