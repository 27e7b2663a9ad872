"""The forward and the backward of a task as launches of kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.engines.local_linear.backward import (
    local_linear_adjoint,
    local_linear_backward_kv,
    local_linear_backward_q,
)
from foveal.engines.local_linear.forward import local_linear_moments, local_linear_output
from foveal.engines.local_linear.launch import LOG2E, stage
from foveal.engines.local_linear.solve import local_linear_solve
from foveal.engines.tile.launches import Launch
from foveal.engines.tile.parts import Task


@dataclass(frozen=True)
class Rows:
    """What the forward found for every query: float32 r, mean [N, Lq, H, D] and base-2 lse [N, H, Lq]."""

    r: Tensor
    mean: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Reached:
    """residual over its limit, and iterations int32, [N, H, Lq]."""

    ratio: Tensor
    count: Tensor


@dataclass(frozen=True)
class Solver:
    """ridge float32 [H]; see LocalLinear for the rest."""

    ridge: Tensor
    tolerance: float
    max_iterations: int


def moments(task: Task, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Mean keys float32 [N, Lq, H, D] and base-2 lse [N, H, Lq] of q [N, Lq, H, D], k [N, Lk, Hkv, D]."""
    chosen = stage("moments", task, q, v)
    layout = chosen.layout
    mean = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = mean.new_empty(q.shape[0], q.shape[2], q.shape[1])
    arguments = (
        q, mean, lse, None, layout.q_strides(q), layout.q_strides(mean), layout.q_grid,
        (k, layout.k_strides(k), layout.k_grid), q.shape[2], q.shape[2] // k.shape[2],
        unit(task), layout.arguments,
    )  # fmt: skip
    Launch(local_linear_moments, chosen.queries(q), arguments, chosen.options)()
    return mean, lse


def solve(
    task: Task,
    solver: Solver,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mean: Tensor,
    lse: Tensor,
    b: Tensor | None = None,
) -> tuple[Tensor, Reached]:
    """x [N, Lq, H, D] with A x = b, float32; without b for the right side of the forward.

    In 16 bits a second launch solves again, more precisely, where the noise of the first was too large.
    """
    chosen = stage("solve", task, q, v)
    layout, heads = chosen.layout, q.shape[2]
    programs = chosen.queries(q)
    x, residual = torch.empty_like(mean), torch.empty_like(mean)
    direction = torch.empty_like(mean, dtype=q.dtype)
    reached = Reached(torch.empty_like(lse), torch.empty_like(lse, dtype=torch.int32))
    right = mean if b is None else b
    arguments = (
        q, right, mean, lse, solver.ridge, noise(k), x, residual, direction,
        reached.ratio, reached.count, (),
        layout.q_strides(q), layout.q_strides(right), layout.q_strides(mean), layout.q_grid,
        (k, layout.k_strides(k), layout.k_grid), heads, heads // k.shape[2],
        unit(task), float(solver.tolerance), solver.max_iterations, layout.arguments,
    )  # fmt: skip
    options = {**chosen.options, "ADJOINT": b is not None}
    Launch(local_linear_solve, programs, arguments, {**options, "AGAIN": False})()
    if q.dtype != torch.float32:
        again = {**options, **stage("solve", task, q, v, precise=True).options, "AGAIN": True}
        Launch(local_linear_solve, programs, arguments, again)()
    return x, reached


def noise(k: Tensor) -> Tensor:
    """The variance of a rounding to the dtype of k, relative to its number, times the mean square of k."""
    if k.dtype == torch.float32:
        return k.new_zeros(())
    rounding = 0.2 * torch.finfo(k.dtype).eps
    some = k[:, :: max(k.shape[1] // 256, 1)]
    square: Tensor = torch.linalg.vector_norm(some, dtype=torch.float32).square()
    return square * (rounding**2 / max(some.numel() // k.shape[3], 1))


LONG = 4.0
"""Length of r above which its rounding to 16 bits shows beside that of the weights."""


def output(task: Task, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """o [N, Lq, H, Dv]; tiles with a long r, which is not in the dtype of k, by a launch of their own."""
    o = q.new_empty(*q.shape[:3], v.shape[3])
    rounds = rows.r.dtype != q.dtype
    for precise in (False, True) if rounds else (False,):
        chosen = stage("output", task, q, v, precise)
        layout, heads = chosen.layout, q.shape[2]
        arguments = (
            q, rows.mean, rows.lse, rows.r, o, layout.q_strides(q), layout.q_strides(rows.mean),
            layout.q_strides(rows.r), layout.q_strides(o), layout.q_grid,
            (k, layout.k_strides(k), layout.k_grid), (v, layout.k_strides(v)),
            heads, heads // k.shape[2], unit(task), LONG if rounds else -1.0, None, None,
            layout.arguments,
        )  # fmt: skip
        Launch(local_linear_output, chosen.queries(q), arguments, chosen.options)()
    return o


def unit(task: Task) -> float:
    return float(task.score.scale * LOG2E)


def adjoint(
    task: Task, q: Tensor, k: Tensor, v: Tensor, do: Tensor, rows: Rows
) -> tuple[Tensor, Tensor]:
    """The right side -sum_j p_j a_j c_j [N, Lq, H, D] and sum_j p_j a_j [N, H, Lq], a_j = do.v_j."""
    chosen = stage("adjoint", task, q, v)
    layout, heads, mean = chosen.layout, q.shape[2], rows.mean
    b, average = torch.empty_like(mean), torch.empty_like(rows.lse)
    arguments = (
        q, do, mean, rows.lse, b, average, layout.q_strides(q), layout.q_strides(do),
        layout.q_strides(mean), layout.q_grid, (k, layout.k_strides(k), layout.k_grid),
        (v, layout.k_strides(v)), heads, heads // k.shape[2], unit(task), layout.arguments,
    )  # fmt: skip
    Launch(local_linear_adjoint, chosen.queries(q), arguments, chosen.options)()
    return b, average


def backward(
    task: Task,
    solver: Solver | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    o: Tensor,
    do: Tensor,
    dlse: Tensor,
    detached: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and what the score gets: dr [N, Lq, H, D] without a solver, else -y.r [N, H, Lq].

    dlse [N, H, Lq] by any strides, of the natural lse.
    """
    b, average = adjoint(task, q, k, v, do, rows)
    y = b
    if solver is not None:
        y, _ = solve(task, solver, q, k, v, rows.mean, rows.lse, b)
    chosen = stage("backward_q", task, q, v)
    layout, heads = chosen.layout, q.shape[2]
    dq = torch.empty_like(q)
    narrow_r, narrow_y = (
        torch.empty_like(rows.mean, dtype=q.dtype),
        torch.empty_like(b, dtype=q.dtype),
    )
    levels = rows.lse.new_empty(4, *rows.lse.shape)
    share = torch.empty_like(rows.lse)
    ridge = share if solver is None else solver.ridge
    groups = heads // k.shape[2]
    arguments = (
        q, do, o, rows.mean, rows.r, y, rows.lse, average, dlse, ridge,
        dq, narrow_r, narrow_y, levels, share, levels.stride(0),
        *(layout.q_strides(x) for x in (q, do, o, dq, y, rows.r)), dlse.stride(), layout.q_grid,
        (k, layout.k_strides(k), layout.k_grid), (v, layout.k_strides(v)), heads, groups,
        unit(task), float(task.score.scale), layout.arguments,
    )  # fmt: skip
    given = solver is None
    options = {**chosen.options, "GIVEN": given, "DETACHED": detached}
    Launch(local_linear_backward_q, chosen.queries(q), arguments, options)()

    chosen = stage("backward_kv", task, q, v)
    layout = chosen.layout
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    arguments = (
        q, do, narrow_r, narrow_y, levels, levels.stride(0), dk, dv,
        *(layout.q_strides(x) for x in (q, do, narrow_r)),
        *(layout.k_strides(x) for x in (dk, dv)), layout.q_grid,
        (k, layout.k_strides(k), layout.k_grid), (v, layout.k_strides(v)), heads, groups,
        unit(task), float(task.score.scale), layout.arguments,
    )  # fmt: skip
    Launch(
        local_linear_backward_kv, chosen.keys(k), arguments, {**chosen.options, "GIVEN": given}
    )()
    return dq, dk, dv, b if given else share
