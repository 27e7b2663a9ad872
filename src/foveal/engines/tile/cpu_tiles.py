"""Forward and backward of one list of tiles, as products of plain matrices.

A tile holds complete rows, so one softmax is exact and the backward computes it again.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.engines.tile.cpu_scores import Chunk, Scorer, Workspace, chunks
from foveal.engines.tile.parts import Task
from foveal.engines.tile.reference import visible_product
from foveal.engines.tile.walk import Listed, Runs, Sweep, Tile, walk
from foveal.engines.tile.workers import in_order


class TiledAttention(torch.autograd.Function):
    """o, lse of heads-first q [N, Hkv, G, Lq, D], k and v [N, Hkv, Lk, D], stored in any order.

    lse [N, Hkv, G, Lq] is unwritten unless the task asks for it or the score has a sink.
    """

    @staticmethod
    def forward(
        ctx: Any, task: Task, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        # A sum is finite unless a member is not (or it overflows, which only costs time).
        careful = not bool((q.sum() + k.sum() + v.sum()).isfinite())
        with_lse = task.with_lse or task.score.sink is not None
        o = _like_queries(q, v.shape[-1])
        lse = _like_queries(q, 1)
        local = tuple(p.to(q.dtype) for p in parameters)
        sweeps = walk(task.pattern, task.extent, q.shape[:3].numel())

        def work(item: tuple[Chunk, Sweep]) -> None:
            chunk, sweep = item
            scorer = Scorer(task, chunk, local, careful, with_lse, Workspace(q))
            q_c, k_c, v_c, o_c, lse_c = (chunk.of_tensor(x) for x in (q, k, v, o, lse))
            q_s = sweep.queries(q_c) * task.score.scale
            k_s, v_s = sweep.keys(k_c), sweep.keys(v_c)
            o_s, lse_s = _sweep_forward(scorer, sweep, q_s, k_s, v_s)
            sweep.store_queries(o_c, o_s)
            sweep.store_queries(lse_c, lse_s)

        parts = chunks(q, _widest(sweeps), len(task.q_tokens))
        for _ in in_order(list(itertools.product(parts, sweeps)), work):
            pass
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
        dq, dk, dv = _like_queries(q, q.shape[-1]), _zeros_like_keys(k), _zeros_like_keys(v)
        d_local = [torch.zeros_like(p) for p in local]
        if task.with_lse:
            dlse = dlse.masked_fill(lse == -torch.inf, 0.0)[..., None]
        else:
            dlse = _like_queries(q, 1).zero_()
        sweeps = walk(task.pattern, task.extent, q.shape[:3].numel())

        def work(item: tuple[Chunk, Sweep]) -> tuple[Tensor, Tensor, list[Tensor]]:
            chunk, sweep = item
            with_lse = task.score.sink is not None
            scorer = Scorer(task, chunk, local, ctx.careful, with_lse, Workspace(q))
            q_s, do_s, dlse_s = (sweep.queries(chunk.of_tensor(x)) for x in (q, do, dlse))
            by_key = [sweep.keys(chunk.of_tensor(x)) for x in (k, v)]
            d_own = [torch.zeros_like(p) for p in local]
            dq_s, dk_s, dv_s = _sweep_backward(
                scorer, sweep, (q_s * task.score.scale, do_s, dlse_s), by_key, d_own
            )
            sweep.store_queries(chunk.of_tensor(dq), dq_s.mul_(task.score.scale))
            return dk_s, dv_s, d_own

        parts = chunks(q, _widest(sweeps), len(task.q_tokens))
        items = list(itertools.product(parts, sweeps))
        for (chunk, sweep), (dk_s, dv_s, d_own) in zip(items, in_order(items, work), strict=True):
            sweep.add_keys(chunk.of_tensor(dk), dk_s)
            sweep.add_keys(chunk.of_tensor(dv), dv_s)
            for total, part in zip(d_local, d_own, strict=True):
                total.add_(part)
        if task.score.sink is not None:
            # dsink = sum over rows of (dlse - do.o) exp(sink - lse)
            sink = local[-1].view(1, *q.shape[1:3], 1)
            pull = dlse.squeeze(-1) - (do * o).sum(-1)
            d_local[-1] += (torch.exp(sink - lse) * pull).sum((0, 3)).flatten()
        d_parameters = (d.to(p.dtype) for d, p in zip(d_local, parameters, strict=True))
        return (None, dq, dk, dv, *d_parameters)


def _like_queries(q: Tensor, width: int) -> Tensor:
    """Unwritten [N, Hkv, G, Lq, width] stored token by token, as results are returned."""
    N, kv_heads, groups, Lq = q.shape[:4]
    return q.new_empty(N, Lq, kv_heads, groups, width).permute(0, 2, 3, 1, 4)


def _zeros_like_keys(k: Tensor) -> Tensor:
    """Zeros [N, Hkv, Lk, D] stored token by token."""
    return k.new_zeros(k.shape[0], k.shape[2], k.shape[1], k.shape[3]).transpose(1, 2)


def _sweep_forward(
    scorer: Scorer, sweep: Sweep, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """o [M, G, R, Dv] and lse [M, G, R, 1] of q [M, G, R, D] on k and v [M, C, D]."""
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(*q.shape[:3], 1)
    for tile in sweep.tiles:
        columns, rows = _columns(tile, scorer.chunk), tile.rows
        if columns.width == 0:
            sink = scorer.sink()
            o[:, :, rows] = 0.0
            lse[:, :, rows, 0] = -torch.inf if sink is None else sink
            continue
        weights = scorer.weights(tile, _rows(q, rows), columns.take(k))
        if weights.lse is not None:
            lse[:, :, rows, 0] = weights.lse
        _product_into(o[:, :, rows], weights.matrices, columns.take(v), weights.hidden)
    return o, lse


def _sweep_backward(
    scorer: Scorer,
    sweep: Sweep,
    by_query: tuple[Tensor, Tensor, Tensor],
    by_key: list[Tensor],
    d_parameters: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [M, G, R, D], dk and dv [M, C, D] of scaled q, do, dlse and k, v; adds to those of the parameters.

    dq is the gradient of the scaled q.
    """
    (q, do, dlse), (k, v) = by_query, by_key
    products, parts = Workspace(q), Workspace(q)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for tile in sweep.tiles:
        columns, rows = _columns(tile, scorer.chunk), tile.rows
        if columns.width == 0:
            dq[:, :, rows] = 0.0
            continue
        q_t, do_t, k_t = _rows(q, rows), _rows(do, rows), columns.take(k)
        weights = scorer.weights(tile, q_t, k_t)
        part = parts.matrices(v.shape[0], columns.width, v.shape[2])
        columns.add(dv, torch.bmm(weights.matrices.transpose(1, 2), do_t, out=part))
        ds = products.matrices(q_t.shape[0], q_t.shape[1], columns.width)
        torch.bmm(do_t, columns.take(v).transpose(1, 2), out=ds)
        ds = ds.view(weights.values.shape)
        if weights.hidden is not None:
            ds.masked_fill_(weights.hidden, 0.0)
        # dS = P (dP - sum_j P dP) + P dlse: lse moves with every score of its row by its weight.
        torch.ops.aten._softmax_backward_data.out(ds, weights.values, -1, ds.dtype, grad_input=ds)
        if scorer.task.with_lse:
            ds.addcmul_(weights.values, dlse[:, :, rows])
        if weights.hidden is not None:
            ds.masked_fill_(weights.hidden, 0.0)
        for index in range(len(scorer.task.score.terms)):
            d_parameters[index] += scorer.bias_gradient(index, ds, tile)
        if weights.slope is not None:
            ds.mul_(weights.slope)
        _product_into(dq[:, :, rows], ds.flatten(1, 2), k_t, weights.hidden)
        part = parts.matrices(k.shape[0], columns.width, k.shape[2])
        columns.add(dk, torch.bmm(ds.flatten(1, 2).transpose(1, 2), q_t, out=part))
    return dq, dk, dv


def _product_into(out: Tensor, matrices: Tensor, values: Tensor, hidden: Tensor | None) -> None:
    """out [M, G, rows, D] = matrices [M, G rows, columns] @ values [M, columns, D]"""
    if hidden is not None:
        out.copy_(visible_product(matrices, values, ~hidden.flatten(1, 2)).view(out.shape))
    elif out.shape[1] == 1:
        torch.bmm(matrices, values, out=out[:, 0])
    else:
        out.copy_(torch.bmm(matrices, values).view(out.shape))


def _rows(x: Tensor, rows: slice) -> Tensor:
    """[M, G rows, D] of x [M, G, R, D]"""
    return x[:, 0, rows] if x.shape[1] == 1 else x[:, :, rows].flatten(1, 2)


def _columns(tile: Tile, chunk: Chunk) -> Runs | Listed:
    if isinstance(tile.columns, Tensor):
        return Listed(chunk.of_broadcast(tile.columns))
    return tile.columns


def _widest(sweeps: tuple[Sweep, ...]) -> int:
    """Elements of the largest score matrix."""
    return max((sweep.widest for sweep in sweeps), default=1)
