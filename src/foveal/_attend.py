"""The tile engine's verb."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from foveal import _operators
from foveal._arguments import need_tensors
from foveal._host import on_host
from foveal._memory import memory_note
from foveal._plan import Prepared, decide, prepare
from foveal._problem import describe
from foveal.engines.tile.recorded import mapped, record, transforming
from foveal.patterns.base import Extent, Pattern
from foveal.patterns.dense import Dense
from foveal.scores.base import Score
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
@on_host
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
    Transforms: one operator under torch.compile, under torch.export and for fake tensors; autocast casts
    q, k, v as it does for PyTorch's own attention; torch.func maps it and differentiates it once,
    "reference" any number of times, forward too.  The capture of a CUDA graph needs one call of the same
    kind before it; cu_seqlens on a device are read once per tensor and per write that PyTorch counts,
    which the replay of a graph is not.
    """
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        need_tensors(q=q, k=k, v=v)
    if cu_seqlens is not None:
        need_tensors(cu_seqlens=cu_seqlens)
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        q, k, v = (_autocast(x) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            return _attend(q, k, v, pattern, score, cu_seqlens, return_lse, implementation)
    return _attend(q, k, v, pattern, score, cu_seqlens, return_lse, implementation)


def _autocast(x: Tensor) -> Tensor:
    """As PyTorch casts the arguments of its own attention."""
    eligible = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if eligible else x


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    score: Score,
    cu_seqlens: Tensor | None,
    return_lse: bool,
    implementation: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    if q.is_meta and not isinstance(q, FakeTensor):
        decide(describe(q, k, v, return_lse), q.device, pattern, score, cu_seqlens, implementation)
    if torch.compiler.is_compiling() or isinstance(q, FakeTensor) or q.is_meta:
        return _operators.attend(q, k, v, pattern, score, cu_seqlens, return_lse, implementation)
    prepared = prepare(q, k, v, pattern, score, cu_seqlens, return_lse, implementation)
    problem, form = prepared.problem, prepared.form(score)
    if prepared.division is not None or (transforming() and not _transforms(prepared, v)):
        run = prepared.run(form)
        with memory_note(problem, prepared.plan):
            o, statistic = record(run, q, k, v, *form.parameters)
        o = o if o.shape[:-1] == q.shape[:-1] else o.unflatten(1, problem.extent.q_grid)
        return (o, _lse(statistic, run.lse_unit, problem.extent)) if return_lse else o
    flat = (x.flatten(1, -3) for x in (q, k, v))
    with memory_note(problem, prepared.plan):
        o, lse = prepared.module.attend(
            problem, prepared.plan.pattern, form, prepared.geometry, *flat
        )
    grid = problem.extent.q_grid
    o = o.unflatten(1, grid)
    return (o, lse.to(problem.lse_dtype).unflatten(1, grid)) if return_lse else o


def _transforms(prepared: Prepared, v: Tensor) -> bool:
    """Whether torch.func reads the implementation itself: plain operations that ask for no value but v's."""
    return (
        prepared.plan.implementation == "reference" and prepared.engine == "tile" and not mapped(v)
    )


def _lse(statistic: Tensor, unit: float, extent: Extent) -> Tensor:
    """[B, *grid, Hq] of [B, Hq, Lq]"""
    lse: Tensor = statistic.transpose(1, 2).unflatten(1, extent.q_grid)
    return lse if unit == 1.0 else lse * unit
