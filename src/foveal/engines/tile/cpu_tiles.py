"""Forward and backward of one list of tiles, as products of plain matrices.

A tile holds complete rows, so one softmax is exact and the backward computes it again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.engines.tile.cpu_scores import Chunk, Scorer, Weights, Workspace, chunks
from foveal.engines.tile.parts import Task
from foveal.engines.tile.reference import visible_product
from foveal.engines.tile.walk import Listed, Runs, Sweep, Tile, walk


class TiledAttention(torch.autograd.Function):
    """o, lse of heads-first q [N, Hkv, G, Lq, D] (scaled), k and v [N, Hkv, Lk, D].

    lse [N, Hkv, G, Lq] is unwritten unless the task asks for it or the score has a sink.
    """

    @staticmethod
    def forward(
        ctx: Any, task: Task, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        # A sum is finite unless a member is not (or it overflows, which only costs time).
        careful = not bool((k.sum() + v.sum()).isfinite())
        with_lse = task.with_lse or task.score.sink is not None
        o = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_empty(*q.shape[:-1], 1)
        local = tuple(p.to(q.dtype) for p in parameters)
        workspace = Workspace(q)
        sweeps = tuple(walk(task.pattern, task.extent, q.shape[:3].numel()))
        for chunk in chunks(q, _widest(sweeps), len(task.q_tokens)):
            scorer = Scorer(task, chunk, local, careful, with_lse, workspace)
            q_c, k_c, v_c, o_c, lse_c = (chunk.of_tensor(x) for x in (q, k, v, o, lse))
            for sweep in sweeps:
                o_s, lse_s = sweep.query_buffer(o_c), sweep.query_buffer(lse_c)
                _sweep_forward(
                    scorer, sweep, sweep.queries(q_c), sweep.keys(k_c), sweep.keys(v_c), o_s, lse_s
                )
                sweep.store_queries(o_c, o_s)
                sweep.store_queries(lse_c, lse_s)
        lse = lse.squeeze(-1)
        ctx.task, ctx.careful = task, careful
        ctx.save_for_backward(q, k, v, o, lse, *parameters)
        if not task.with_lse:
            ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        task: Task = ctx.task
        q, k, v, o, lse, *parameters = ctx.saved_tensors
        local = tuple(p.to(q.dtype) for p in parameters)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_local = [torch.zeros_like(p) for p in local]
        # dS = P (dP - shift): the gradient through lse enters as a shift of every row.
        shift = (do * o).sum(-1, keepdim=True)
        if task.with_lse:
            shift -= dlse.masked_fill(lse == -torch.inf, 0.0)[..., None]
        do = do.contiguous()
        workspace, second = Workspace(q), Workspace(q)
        sweeps = tuple(walk(task.pattern, task.extent, q.shape[:3].numel()))
        for chunk in chunks(q, _widest(sweeps), len(task.q_tokens)):
            scorer = Scorer(task, chunk, local, ctx.careful, task.score.sink is not None, workspace)
            by_query = [chunk.of_tensor(x) for x in (q, do, shift)]
            by_key = [chunk.of_tensor(x) for x in (k, v)]
            dq_c, dk_c, dv_c = (chunk.of_tensor(x) for x in (dq, dk, dv))
            if (sink := scorer.sink()) is not None:
                share = torch.exp(sink - chunk.of_tensor(lse))
                chunk.add_per_head(d_local[-1], -(share * by_query[2].squeeze(-1)).sum(-1))
            for sweep in sweeps:
                dq_s = sweep.query_buffer(dq_c)
                dk_s, dv_s = sweep.key_buffer(dk_c), sweep.key_buffer(dv_c)
                _sweep_backward(
                    scorer,
                    sweep,
                    [sweep.queries(x) for x in by_query],
                    [sweep.keys(x) for x in by_key],
                    [dq_s, dk_s, dv_s],
                    d_local,
                    second,
                )
                sweep.store_queries(dq_c, dq_s)
                sweep.add_keys(dk_c, dk_s)
                sweep.add_keys(dv_c, dv_s)
        d_parameters = (d.to(p.dtype) for d, p in zip(d_local, parameters, strict=True))
        return (None, dq, dk, dv, *d_parameters)


def _sweep_forward(
    scorer: Scorer, sweep: Sweep, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor
) -> None:
    """Writes o [M, G, R, Dv] and lse [M, G, R, 1] of q [M, G, R, D] on k and v [M, C, D]."""
    for tile in sweep.tiles:
        columns, rows = _columns(tile, scorer.chunk), tile.rows
        if columns.width == 0:
            sink = scorer.sink()
            o[:, :, rows] = 0.0
            lse[:, :, rows, 0] = -torch.inf if sink is None else sink
            continue
        weights = scorer.weights(tile, q[:, :, rows].flatten(1, 2), columns.take(k))
        if weights.lse is not None:
            lse[:, :, rows, 0] = weights.lse
        _product_into(o[:, :, rows], weights.matrices, columns.take(v), weights)


def _sweep_backward(
    scorer: Scorer,
    sweep: Sweep,
    by_query: list[Tensor],
    by_key: list[Tensor],
    gradients: list[Tensor],
    d_parameters: list[Tensor],
    workspace: Workspace,
) -> None:
    """Writes dq, adds to dk, dv and the gradients of the parameters.

    by_query: q, do, shift [M, G, R, .]; by_key: k, v [M, C, .]; gradients: dq, dk, dv.
    """
    (q, do, shift), (k, v), (dq, dk, dv) = by_query, by_key, gradients
    for tile in sweep.tiles:
        columns, rows = _columns(tile, scorer.chunk), tile.rows
        if columns.width == 0:
            dq[:, :, rows] = 0.0
            continue
        q_t, do_t, k_t = q[:, :, rows].flatten(1, 2), do[:, :, rows].flatten(1, 2), columns.take(k)
        weights = scorer.weights(tile, q_t, k_t)
        columns.add_product(dv, weights.matrices.transpose(1, 2), do_t)
        ds = workspace.matrices(*q_t.shape[:2], columns.width)
        torch.bmm(do_t, columns.take(v).transpose(1, 2), out=ds)
        ds = ds.view(weights.values.shape).sub_(shift[:, :, rows]).mul_(weights.values)
        if weights.hidden is not None:
            ds.masked_fill_(weights.hidden, 0.0)
        for index in range(len(scorer.task.score.terms)):
            d_parameters[index] += scorer.bias_gradient(index, ds, tile)
        if weights.slope is not None:
            ds.mul_(weights.slope)
        _product_into(dq[:, :, rows], ds.flatten(1, 2), k_t, weights)
        columns.add_product(dk, ds.flatten(1, 2).transpose(1, 2), q_t)


def _product_into(out: Tensor, matrices: Tensor, values: Tensor, weights: Weights) -> None:
    """out [M, G, rows, D] = matrices [M, G rows, columns] @ values [M, columns, D]"""
    if weights.hidden is not None:
        visible = ~weights.hidden.flatten(1, 2)
        out.copy_(visible_product(matrices, values, visible).view(out.shape))
    elif out.shape[1] == 1:
        torch.bmm(matrices, values, out=out[:, 0])
    else:
        out.copy_(torch.bmm(matrices, values).view(out.shape))


def _columns(tile: Tile, chunk: Chunk) -> Runs | Listed:
    return tile.runs or Listed(chunk.of_broadcast(tile.k_tokens))


def _widest(sweeps: tuple[Sweep, ...]) -> int:
    """Elements of the largest score matrix."""
    return max((len(t.q_tokens) * t.k_tokens.shape[-1] for s in sweeps for t in s.tiles), default=1)
