"""The GPU edition, written in Triton: NVIDIA sm_80 and later, AMD gfx942; on sm_90 with passes in Gluon."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveal._kept import kept
from foveal._problem import Problem
from foveal.engines.common.once import once_differentiable
from foveal.engines.local_linear.solution import Solution
from foveal.engines.tile import hopper as hopper_edition
from foveal.engines.tile import triton as tile_edition
from foveal.engines.tile.parts import Division, Task, add, divide, put, take
from foveal.patterns.base import Extent, Pattern
from foveal.scores.base import Geometry
from foveal.scores.local_linear import LocalForm
from foveal.scores.normal import NormalForm

if TYPE_CHECKING:
    from foveal.engines.local_linear.kernels import Reached

_LN2 = math.log(2)


def refuses(problem: Problem, pattern: Pattern, score: LocalForm) -> str | None:
    return tile_edition.refuses(problem, pattern, _plain(score))


def caveat(problem: Problem, pattern: Pattern, score: LocalForm) -> str | None:
    """Why a plan does not choose it although it runs, or None."""
    compared = problem.dtype == torch.bfloat16 and not pattern.depends_on_data
    if compared and max(problem.head_dim, problem.value_dim) <= 128:
        return None
    return (
        "its gradients were compared with float64 on a GPU in bfloat16, up to 128 channels and without "
        "block lists; elsewhere it runs when it is named"
    )


def _plain(score: LocalForm) -> NormalForm:
    return NormalForm(score.scale, None, None, ())


def attend(
    problem: Problem,
    pattern: Pattern,
    score: LocalForm,
    geometry: Geometry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] and lse [B, Lq, Hq] of q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hkv, Dv]."""
    run = _run(problem, pattern, score, geometry, q.device)
    (given,) = score.parameters or (None,)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *score.parameters))
    decoded = None if wanted else _decoded(run, q, k, v, given)
    if decoded is not None:
        return decoded[0], decoded[1].transpose(1, 2)
    found = None if wanted else _with_given(run, q, k, v, given)
    if found is None:
        found = _LocalLinear.apply(run, q, k, v, given)  # type: ignore[no-untyped-call]
    o, lse = found
    return o, lse.transpose(1, 2) * _LN2


def _decoded(
    run: _Run, q: Tensor, k: Tensor, v: Tensor, given: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """o and lse [N, H, Lq] where few queries see many keys; None elsewhere."""
    from foveal.engines.local_linear.launch_decode import decode, decode_given, decodes

    (task, *others), _ = run.tasks
    if others or not task.whole or not decodes(task, q, v):
        return None
    if run.score.r is not None and task.extent.Lq > 1:
        return None
    q, k, v = (_in_rows(x) for x in (q, k, v))
    with _on(q):
        if run.score.r is not None and given is not None:
            return decode_given(task, q, k, v, _in_rows(given.flatten(1, -3)))
        return decode(task, _solver(run, _ridge(run.score, given, q), q), q, k, v)


def _with_given(
    run: _Run, q: Tensor, k: Tensor, v: Tensor, given: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """o and base-2 lse by one pass over the keys, where r is given and a device has the kernel."""
    (task, *others), _ = run.tasks
    if run.score.r is None or given is None or given.dtype != q.dtype:
        return None
    if others or not task.whole or not run.passes:
        return None
    from foveal.engines.local_linear import hopper

    if not hopper.suits(task, q, v):
        return None
    q, k, v = (_in_rows(x) for x in (q, k, v))
    with _on(q):
        return hopper.forward_given(task, q, k, v, _in_rows(given.flatten(1, -3)))


def solved(
    problem: Problem,
    pattern: Pattern,
    score: LocalForm,
    geometry: Geometry,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor, Solution]:
    """o and lse as of `attend`, and what the solves reached."""
    run = _run(problem, pattern, score, geometry, q.device)
    (given,) = score.parameters or (None,)
    with torch.no_grad():
        o, lse = _LocalLinear.apply(run, q, k, v, given)  # type: ignore[no-untyped-call]
    solution = Solution()
    for reached in run.reached:
        solution.iterations += reached.count.flatten().tolist()
        solution.ratios += reached.ratio.nan_to_num(0.0).flatten().tolist()
    return o, lse.transpose(1, 2) * _LN2, solution


@dataclass(frozen=True)
class _Run:
    """A call without its tensors; `reached` is filled by the forward.  passes: Hopper's kernels take it."""

    tasks: tuple[tuple[Task, ...], bool]
    score: LocalForm
    reached: list[Reached]
    passes: bool


def _run(
    problem: Problem, pattern: Pattern, score: LocalForm, geometry: Geometry, device: torch.device
) -> _Run:
    passes = hopper_edition.refuses(problem, pattern, _plain(score)) is None
    return _Run(_tasks(problem, pattern, score, geometry, device), score, [], passes)


def _tasks(
    problem: Problem, pattern: Pattern, score: LocalForm, geometry: Geometry, device: torch.device
) -> tuple[tuple[Task, ...], bool]:
    """The shares of a pattern, and whether every key belongs to exactly one of them."""
    make = divide if pattern.depends_on_data else _kept_division
    division = make(pattern, problem.extent, device)
    return division.tasks(_plain(score), geometry, problem.return_lse), division.keys_once


@kept(64)
def _kept_division(pattern: Pattern, extent: Extent, device: torch.device) -> Division:
    return divide(pattern, extent, device)


class _LocalLinear(torch.autograd.Function):
    """o [B, Lq, Hq, Dv] and base-2 lse [B, Hq, Lq] of q, k, v and ridge [Hq] or r [B, *grid, Hq, D]."""

    @staticmethod
    def forward(
        ctx: Any, run: _Run, q: Tensor, k: Tensor, v: Tensor, given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = (_in_rows(x) for x in (q, k, v))
        tasks, _ = run.tasks
        r = None if run.score.r is None or given is None else _in_rows(given.flatten(1, -3))
        ridge = None if r is not None else _ridge(run.score, given, q)
        found = []
        if tasks[0].whole:
            o, lse, rows = _forward(run, tasks[0], q, k, v, r, ridge)
            found.append(rows)
        else:
            o = q.new_empty(*q.shape[:3], v.shape[3])
            lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
            for task in tasks:
                own = take((q,) if r is None else (q, r), task.q_tokens)
                own_r = None if r is None else own[1]
                k_own, v_own = take((k, v), task.k_tokens)
                own_o, own_lse, rows = _forward(run, task, own[0], k_own, v_own, own_r, ridge)
                put((o, lse), task.q_tokens, (own_o, own_lse))
                found.append(rows)
        ctx.run = run
        ctx.given = None if given is None else (given.shape, given.dtype)
        ctx.save_for_backward(q, k, v, o, ridge, r, *(x for rows in found for x in rows))
        if not tasks[0].with_lse:
            ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable("triton")
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        run: _Run = ctx.run
        tasks, keys_once = run.tasks
        q, k, v, o, ridge, r, *saved = ctx.saved_tensors
        each = list(zip(*[iter(saved)] * (3 if r is None else 2), strict=True))
        do = _in_rows(do)
        # d of the base-2 lse; a call that returns none has no gradient of it.
        natural = dlse / _LN2 if tasks[0].with_lse else dlse.new_zeros(()).expand(dlse.shape)
        if tasks[0].whole:
            own = each[0] if r is None else (r, *each[0])
            dq, dk, dv, d_given = _backward(run, tasks[0], q, k, v, own, o, do, natural, ridge)
        else:
            dq, d_ridges = torch.empty_like(q), []
            make = torch.empty_like if keys_once else torch.zeros_like
            dk, dv = make(k), make(v)
            dr = q.new_empty(q.shape if ridge is None else 0, dtype=torch.float32)
            for task, own in zip(tasks, each, strict=True):
                rows = own if r is None else (*take((r,), task.q_tokens), *own)
                q_own, o_own, do_own, d_own = take((q, o, do, natural), task.q_tokens)
                k_own, v_own = take((k, v), task.k_tokens)
                d_q, d_k, d_v, share = _backward(
                    run, task, q_own, k_own, v_own, rows, o_own, do_own, d_own, ridge
                )
                put((dq,), task.q_tokens, (d_q,))
                if keys_once:
                    put((dk, dv), task.k_tokens, (d_k, d_v))
                else:
                    add(dk, task.k_tokens, d_k)
                    add(dv, task.k_tokens, d_v)
                if ridge is None:
                    put((dr,), task.q_tokens, (share,))
                else:
                    d_ridges.append(share)
            d_given = dr if ridge is None else torch.stack(d_ridges).sum(0)
        if ctx.given is None:
            return None, dq, dk, dv, None
        shape, dtype = ctx.given
        return None, dq, dk, dv, d_given.reshape(shape).to(dtype)


def _ridge(score: LocalForm, given: Tensor | None, q: Tensor) -> Tensor:
    """float32 [Hq]"""
    if given is not None:
        return given.float()
    assert isinstance(score.ridge, float | int)
    return _filled(float(score.ridge), q.shape[2], q.device)


@kept(64)
def _filled(ridge: float, heads: int, device: torch.device) -> Tensor:
    return torch.full((heads,), ridge, device=device)


def _forward(
    run: _Run, task: Task, q: Tensor, k: Tensor, v: Tensor, r: Tensor | None, ridge: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """o, base-2 lse, and what the backward needs: mean and lse, after r if it was solved for."""
    from foveal.engines.local_linear import kernels

    with _on(q):
        if run.passes and ridge is not None:
            from foveal.engines.local_linear import hopper

            if hopper.suits(task, q, v):
                o, rows, reached = hopper.forward(task, _solver(run, ridge, q), q, k, v)
                run.reached.append(reached)
                return o, rows.lse, (rows.r, rows.mean, rows.lse)
        mean, lse = kernels.moments(task, q, k, v)
        if r is not None:
            return kernels.output(task, q, k, v, kernels.Rows(r, mean, lse)), lse, (mean, lse)
        assert ridge is not None
        r, reached = kernels.solve(task, _solver(run, ridge, q), q, k, v, mean, lse)
        run.reached.append(reached)
        o = kernels.output(task, q, k, v, kernels.Rows(r, mean, lse))
        return o, lse, (r, mean, lse)


def _backward(
    run: _Run,
    task: Task,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: tuple[Tensor, ...],
    o: Tensor,
    do: Tensor,
    dlse: Tensor,
    ridge: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of r or, per head, of the ridge; rows: r, mean, lse."""
    from foveal.engines.local_linear import kernels

    solver = None if ridge is None else _solver(run, ridge, q)
    with _on(q):
        dq, dk, dv, share = kernels.backward(
            task, solver, q, k, v, kernels.Rows(*rows), o, do, dlse, run.score.detached
        )
    return dq, dk, dv, share if ridge is None else share.sum((0, 2))


def _solver(run: _Run, ridge: Tensor, q: Tensor) -> Any:
    from foveal.engines.local_linear.kernels import Solver

    return Solver(ridge, run.score.residual_limit(q.dtype), run.score.max_iterations)


def _on(q: Tensor) -> Any:
    """Launches go to the current device."""
    return torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext()


def _in_rows(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the last axis."""
    return x if x.stride(-1) == 1 else x.contiguous()
