"""Forward and backward of one list of tiles, as products of plain matrices.

A tile holds complete rows, so one softmax is exact and the backward computes it again.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from foveal.engines.common.once import once_differentiable
from foveal.engines.entmax.cpu_scores import EntmaxScorer
from foveal.engines.tile.cpu_fused import fused_attention, fuses
from foveal.engines.tile.cpu_scores import Chunk, Scorer, chunks
from foveal.engines.tile.parts import Task
from foveal.engines.tile.reference import visible_product
from foveal.engines.tile.stacks import Stack, stacks
from foveal.engines.tile.walk import Sweep, walk
from foveal.engines.tile.workers import Scratch, in_order

_SCORERS = {"tile": Scorer, "entmax": EntmaxScorer}


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

        def work(item: tuple[Chunk, Sweep], scratch: Scratch) -> None:
            chunk, sweep = item
            scorer = _SCORERS[task.score.engine](task, chunk, local, careful, with_lse, scratch)
            q_s = sweep.queries(chunk.of_tensor(q), scratch, "q")
            k_s, v_s = (sweep.keys(chunk.of_tensor(x), scratch, n) for x, n in ((k, "k"), (v, "v")))
            o_c, lse_c = chunk.of_tensor(o), chunk.of_tensor(lse)
            o_s = sweep.results(o_c, scratch, "o")
            lse_s = sweep.results(lse_c, scratch, "lse")
            _sweep_forward(scorer, sweep, (q_s, k_s, v_s), (o_s, lse_s))
            sweep.store(o_c, o_s)
            sweep.store(lse_c, lse_s)

        parts = chunks(q, _widest(sweeps), len(task.q_tokens))
        in_order(list(itertools.product(parts, sweeps)), work)
        lse = lse.squeeze(-1)
        ctx.task, ctx.careful = task, careful
        ctx.save_for_backward(q, k, v, o, lse, *parameters)
        if not task.with_lse:
            ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable("cpu")
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

        def work(
            item: tuple[Chunk, Sweep], scratch: Scratch
        ) -> tuple[Tensor, Tensor, list[Tensor]]:
            chunk, sweep = item
            with_lse = task.score.sink is not None
            scorer = _SCORERS[task.score.engine](task, chunk, local, ctx.careful, with_lse, scratch)
            q_s, do_s, dlse_s = (
                sweep.queries(chunk.of_tensor(x), scratch, name)
                for x, name in ((q, "q"), (do, "do"), (dlse, "dlse"))
            )
            by_key = [
                sweep.keys(chunk.of_tensor(x), scratch, name) for x, name in ((k, "k"), (v, "v"))
            ]
            d_own = [torch.zeros_like(p) for p in local]
            dq_c = chunk.of_tensor(dq)
            dq_s = sweep.results(dq_c, scratch, "dq")
            dk_s, dv_s = _sweep_backward(scorer, sweep, (q_s, do_s, dlse_s), by_key, dq_s, d_own)
            sweep.store(dq_c, dq_s)
            return dk_s, dv_s, d_own

        def finish(item: tuple[Chunk, Sweep], result: tuple[Tensor, Tensor, list[Tensor]]) -> None:
            (chunk, sweep), (dk_s, dv_s, d_own) = item, result
            sweep.add_keys(chunk.of_tensor(dk), dk_s)
            sweep.add_keys(chunk.of_tensor(dv), dv_s)
            for total, part in zip(d_local, d_own, strict=True):
                total.add_(part)

        parts = chunks(q, _widest(sweeps), len(task.q_tokens))
        in_order(list(itertools.product(parts, sweeps)), work, finish)
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
    scorer: Scorer,
    sweep: Sweep,
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
) -> None:
    """Writes o [M, G, R, Dv] and lse [M, G, R, 1] of q [M, G, R, D] on k and v [M, C, D].

    lse is written only if the scorer computes it.
    """
    (q, k, v), (o, lse) = inputs, results
    fused = fuses(scorer, q, v)
    for stack in stacks(sweep.tiles, scorer.chunk):
        if stack.columns.width == 0:
            _nothing_seen(scorer, stack, o, lse)
            continue
        if fused:
            fused_attention(scorer, stack, q, k, v, o)
            continue
        cut = (stack.of_queries(q), stack.of_keys_transposed(k), stack.of_keys(v))
        for tile, q_t, k_t, v_t, o_t in zip(stack.tiles, *cut, stack.outputs(o), strict=True):
            weights = scorer.weights(tile, q_t, k_t)
            if weights.lse is not None:
                lse[:, :, tile.rows, 0] = weights.lse
            _product_into(o_t, weights.matrices, v_t, weights.hidden)


def _nothing_seen(scorer: Scorer, stack: Stack, o: Tensor, lse: Tensor) -> None:
    sink = scorer.sink()
    for tile in stack.tiles:
        o[:, :, tile.rows] = 0.0
        lse[:, :, tile.rows, 0] = -torch.inf if sink is None else sink


def _sweep_backward(
    scorer: Scorer,
    sweep: Sweep,
    by_query: tuple[Tensor, Tensor, Tensor],
    by_key: list[Tensor],
    dq: Tensor,
    d_parameters: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Writes dq [M, G, R, D], adds to the gradients of the parameters, returns dk and dv [M, C, D]."""
    (q, do, dlse), (k, v) = by_query, by_key
    take, scale = scorer.scratch.take, scorer.task.score.scale
    dk, dv = (take(n, x.shape, x.dtype).zero_() for x, n in ((k, "dk"), (v, "dv")))
    for stack in stacks(sweep.tiles, scorer.chunk):
        if stack.columns.width == 0:
            for tile in stack.tiles:
                dq[:, :, tile.rows] = 0.0
            continue
        rows = (stack.of_queries(q), stack.of_queries(do), stack.outputs(dq))
        columns = (stack.of_keys(k), stack.of_keys_transposed(k), stack.of_keys_transposed(v))
        sums = (stack.adders(dk), stack.adders(dv))
        for tile, q_t, do_t, dq_t, k_t, kt_t, vt_t, add_dk, add_dv in zip(
            stack.tiles, *rows, *columns, *sums, strict=True
        ):
            weights = scorer.weights(tile, q_t, kt_t)
            add_dv(weights.matrices.mT, do_t)
            products = torch.bmm(
                do_t, vt_t, out=take("ds", (*do_t.shape[:2], vt_t.shape[2]), q.dtype)
            )
            ds = scorer.score_gradient(weights, products, dlse[:, :, tile.rows])
            for index in range(len(scorer.task.score.terms)):
                d_parameters[index] += scorer.bias_gradient(index, ds, tile)
            if weights.slope is not None:
                ds.mul_(weights.slope)
            _product_into(dq_t, products, k_t, weights.hidden, scale)
            add_dk(products.mT, q_t, alpha=scale)
    return dk, dv


def _product_into(
    out: Tensor, matrices: Tensor, values: Tensor, hidden: Tensor | None, alpha: float = 1.0
) -> None:
    """out = alpha matrices [M, G rows, columns] @ values [M, columns, D], out as by `Stack.outputs`."""
    if hidden is not None:
        product = visible_product(matrices, values, ~hidden.flatten(1, 2))
        torch.mul(product.view(out.shape), alpha, out=out)
    elif out.dim() == 3:
        torch.baddbmm(out, matrices, values, beta=0, alpha=alpha, out=out)
    else:
        torch.mul(torch.bmm(matrices, values).view(out.shape), alpha, out=out)


def _widest(sweeps: tuple[Sweep, ...]) -> int:
    """Elements of the largest score matrix."""
    return max((sweep.widest for sweep in sweeps), default=1)
