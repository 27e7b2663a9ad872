"""The Hopper edition: warp-specialised kernels in Gluon for compute capability 9.0."""

from __future__ import annotations

import functools
import importlib.util
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

_HEAD_DIMS = range(16, 129, 8)


def refuses(problem: Problem, pattern: Pattern, score: NormalForm) -> str | None:
    return (
        _refuses_machine(problem)
        or _refuses_sizes(problem)
        or _refuses_score(score)
        or _refuses_pattern(pattern, problem.extent)
    )


def caveat(pattern: Pattern) -> str | None:
    """Why it runs only when named, or None."""
    if isinstance(pattern, Dense):
        return None
    return (
        "it lets NaN and inf of hidden keys reach other rows of their tile, "
        "so it runs only when it is named"
    )


def _refuses_machine(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"it runs on CUDA tensors; these are on {problem.device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not _has_gluon():
        return "this Triton has no Gluon with Hopper instructions; 3.6 or later is needed"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no NVIDIA device is present"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"it is written for compute capability 9.0; this device has {capability}"
    return None


@functools.lru_cache(maxsize=1)
def _has_gluon() -> bool:
    return importlib.util.find_spec("triton.experimental.gluon.language.nvidia.hopper") is not None


def _refuses_sizes(problem: Problem) -> str | None:
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16; the tensors are {problem.dtype}"
    if problem.head_dim != problem.value_dim:
        return f"it needs Dv = D; here D is {problem.head_dim}, Dv {problem.value_dim}"
    if problem.head_dim not in _HEAD_DIMS:
        return f"it needs a head_dim from 16 to 128 in steps of 8; here it is {problem.head_dim}"
    if 0 in (problem.batch, problem.extent.Lq, problem.extent.Lk):
        return "it does not take empty tensors"
    return None


def _refuses_score(score: NormalForm) -> str | None:
    if not score.plain:
        return "it has no soft cap, sink or additive term"
    if score.scale <= 0:
        return f"it needs a positive scale; here it is {score.scale}"
    return None


def _refuses_pattern(pattern: Pattern, extent: Extent) -> str | None:
    if pattern.depends_on_data:
        return "its boxes know static patterns only"
    if not _separable(pattern, extent):
        return f"it needs an interval of keys on every axis; the pattern is {pattern.key}"
    return None


@functools.lru_cache(maxsize=256)
def _separable(pattern: Pattern, extent: Extent) -> bool:
    """Whether the pattern, or each of the parts it falls into, is an interval on every axis."""
    pattern = pattern.simplify(extent)
    parts = pattern.parts(extent)
    if parts is None:
        return pattern.bounds(extent) is not None
    return all(_separable(part.pattern, part.extent) for part in parts)


def attend(
    problem: Problem,
    pattern: Pattern,
    score: NormalForm,
    geometry: Geometry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """o and lse [B, Lq, Hq] of q [B, Lq, Hq, D], k and v [B, Lk, Hkv, D]."""
    task = whole_task(problem, pattern, score, geometry, q.device)
    return solve(task, q, k, v, _attend_part)


def _attend_part(task: Task, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    o, lse = _HopperAttention.apply(task.pattern, task.extent, task.score.scale, q, k, v)  # type: ignore[no-untyped-call]
    return o, lse.transpose(1, 2) if task.with_lse else None


class _HopperAttention(torch.autograd.Function):
    """o [N, Lq, Hq, D] and lse [N, Hq, Lq] of q [N, Lq, Hq, D], k and v [N, Lk, Hkv, D]."""

    @staticmethod
    def forward(
        ctx: Any, pattern: Pattern, extent: Extent, scale: float, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        from foveal.engines.tile.hopper_forward import launch_forward

        ctx.pattern, ctx.extent, ctx.scale = pattern, extent, scale
        with torch.cuda.device(q.device):
            o, lse = launch_forward(pattern, extent, scale, q, k, v)
        ctx.save_for_backward(q, k, v, o, lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        from foveal.engines.tile.hopper_backward import launch_backward

        q, k, v, o, lse = ctx.saved_tensors
        with torch.cuda.device(q.device):
            dq, dk, dv = launch_backward(
                ctx.pattern, ctx.extent, ctx.scale, q, k, v, o, lse, do, dlse
            )
        return None, None, None, dq, dk, dv
