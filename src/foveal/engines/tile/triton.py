"""The portable GPU edition, written in Triton: NVIDIA sm_80 and later, AMD gfx942."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveal._problem import Problem
from foveal.engines.tile.parts import Task
from foveal.patterns.base import Extent, Pattern
from foveal.patterns.dense import Dense
from foveal.scores.normal import NormalForm

if TYPE_CHECKING:
    from foveal.engines.tile.launch import Sizes

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


LSE_UNIT = math.log(2)


def forward(task: Task, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o [N, Lq, Hq, Dv] and base-2 lse [N, Hq, Lq] of q [N, Lq, Hq, D], k and v [N, Lk, Hkv, .]."""
    from foveal.engines.tile.forward import forward_launch
    from foveal.engines.tile.launch import heads_to_pack, scoring, stage
    from foveal.engines.tile.launches import compile_together
    from foveal.engines.tile.repair import repair_launch
    from foveal.engines.tile.terms import local_terms
    from foveal.tuning.tile import FORWARD

    heads = q.shape[2]
    terms = local_terms(task, task.whole)
    packed = heads_to_pack(task, terms, heads // k.shape[2])
    chosen = stage(FORWARD, task, terms, _sizes(q, v), heads, packed)
    score = scoring(task, terms, heads)
    q, k, v = (_rows(x) for x in (q, k, v))
    attended = forward_launch(chosen, q, k, v, task.score.sink, score)
    launches = [attended.launch]
    if not isinstance(task.pattern, Dense):
        launches.append(repair_launch(chosen, q, k, v, attended, score))
    compile_together(launches, (chosen.spec, chosen.config), q)
    for each in launches:
        each()
    return attended.o, attended.lse


def backward(
    task: Task,
    tensors: tuple[Tensor, ...],
    do: Tensor,
    d_statistic: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, of the parameter of each term, and of the sink."""
    from foveal.engines.tile.gradients import gradients
    from foveal.engines.tile.terms import local_terms

    q, k, v, o, lse = tensors
    score = task.score
    with torch.enable_grad():
        leaves = [
            term.parameter.detach().requires_grad_(wanted)
            for term, wanted in zip(score.terms, needed[3:], strict=False)
        ]
        sinks = () if score.sink is None else (score.sink,)
        own = dataclasses.replace(task, score=score.with_parameters((*leaves, *sinks)))
        terms = local_terms(own, task.whole)
    differentiable = tuple(term.values.requires_grad for term in terms)
    dq, dk, dv, d_sink, *d_values = gradients(
        own,
        tuple(dataclasses.replace(term, values=term.values.detach()) for term in terms),
        _sizes(q, v),
        (_rows(q), _rows(k), _rows(v), o, lse),
        score.sink,
        do,
        d_statistic / LSE_UNIT if task.with_lse else d_statistic,
        (*needed[:3], score.sink is not None and needed[-1], *differentiable),
    )
    d_leaves = _pull(leaves, [term.values for term in terms], d_values)
    return dq, dk, dv, *d_leaves, *((d_sink,) if sinks else ())


def _pull(
    leaves: list[Tensor], values: list[Tensor], d_values: list[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of the parameters, given those of the values made from them."""
    pairs = [(x, d) for x, d in zip(values, d_values, strict=True) if d is not None]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if not pairs or not wanted:
        return (None,) * len(leaves)
    found = iter(torch.autograd.grad([x for x, _ in pairs], wanted, [d for _, d in pairs]))
    return tuple(next(found) if leaf.requires_grad else None for leaf in leaves)


def _sizes(q: Tensor, v: Tensor) -> Sizes:
    from foveal.engines.tile.launch import Sizes

    return Sizes(q.shape[-1], v.shape[-1], q.dtype, q.device)


def _rows(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()
