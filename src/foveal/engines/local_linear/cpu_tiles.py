"""Forward and backward of one list of tiles.

A tile holds complete rows, so its weights are computed once and every iteration of its solve is two
products with the same keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveal.engines.common.once import once_differentiable
from foveal.engines.local_linear.iterate import conjugate_gradients
from foveal.engines.local_linear.solution import Solution
from foveal.engines.tile.cpu_scores import Chunk, Scorer, chunks
from foveal.engines.tile.parts import Task
from foveal.engines.tile.stacks import Adder, stacks
from foveal.engines.tile.walk import Sweep, Tile, walk
from foveal.engines.tile.workers import Scratch, in_order


@dataclass(frozen=True)
class Setting:
    """How to solve: limit of the residual, iterations; or `given`, where r comes with q.

    detached: the absolute penalty is a constant of the backward.
    """

    tolerance: float
    max_iterations: int
    detached: bool
    given: bool
    solution: Solution


class TiledLocalLinear(torch.autograd.Function):
    """o, lse of heads-first q [N, Hkv, G, Lq, D], k and v [N, Hkv, Lk, .]; ridge [Hq].

    With r given, q holds q and r side by side.  lse [N, Hkv, G, Lq].
    """

    @staticmethod
    def forward(
        ctx: Any, task: Task, setting: Setting, q: Tensor, k: Tensor, v: Tensor, ridge: Tensor
    ) -> tuple[Tensor, Tensor]:
        careful = not bool((q.sum() + k.sum() + v.sum()).isfinite())
        o, lse, r = (_like_queries(q, width) for width in (v.shape[-1], 1, k.shape[-1]))
        sweeps = walk(task.pattern, task.extent, q.shape[:3].numel())

        def work(item: tuple[Chunk, Sweep], scratch: Scratch) -> list[tuple[int, Tensor, Tensor]]:
            chunk, sweep = item
            scorer = Scorer(task, chunk, (), careful, True, scratch)
            q_s = sweep.queries(chunk.of_tensor(q), scratch, "q")
            k_s, v_s = (sweep.keys(chunk.of_tensor(x), scratch, n) for x, n in ((k, "k"), (v, "v")))
            into = [chunk.of_tensor(x) for x in (o, lse, r)]
            parts = [sweep.results(x, scratch, n) for x, n in zip(into, "olr", strict=True)]
            reached = []
            for place in _tiles(scorer, sweep, ridge, (k_s, v_s)):
                found = place.forward(setting, place.rows(q_s), parts)
                reached += [] if found is None else [found]
            for whole, part in zip(into, parts, strict=True):
                sweep.store(whole, part)
            return reached

        def finish(item: object, reached: list[tuple[int, Tensor, Tensor]]) -> None:
            for one in reached:
                setting.solution.add(*one)

        parts = chunks(q, 3 * _widest(sweeps), len(task.q_tokens))
        in_order(list(itertools.product(parts, sweeps)), work, finish)
        lse = lse.squeeze(-1)
        ctx.task, ctx.setting, ctx.careful = task, setting, careful
        ctx.save_for_backward(q, k, v, ridge, o, lse, r)
        if not task.with_lse:
            ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable("cpu")
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        task: Task = ctx.task
        setting: Setting = ctx.setting
        q, k, v, ridge, _, lse, r = ctx.saved_tensors
        dq, d_ridge = _like_queries(q, q.shape[-1]), _like_queries(q, 1)
        dk, dv = (_zeros_like_keys(x) for x in (k, v))
        dlse = dlse.masked_fill(~lse.isfinite(), 0.0) if task.with_lse else torch.zeros_like(lse)
        by_query = (q, r, do, dlse[..., None])
        sweeps = walk(task.pattern, task.extent, q.shape[:3].numel())

        def work(item: tuple[Chunk, Sweep], scratch: Scratch) -> tuple[Tensor, Tensor]:
            chunk, sweep = item
            scorer = Scorer(task, chunk, (), ctx.careful, False, scratch)
            queries = [
                sweep.queries(chunk.of_tensor(x), scratch, f"of query {i}")
                for i, x in enumerate(by_query)
            ]
            k_s, v_s = (sweep.keys(chunk.of_tensor(x), scratch, n) for x, n in ((k, "k"), (v, "v")))
            sums = [
                scratch.take(n, x.shape, x.dtype).zero_() for x, n in ((k_s, "dk"), (v_s, "dv"))
            ]
            into = [chunk.of_tensor(x) for x in (dq, d_ridge)]
            parts = [sweep.results(x, scratch, n) for x, n in zip(into, ("dq", "dr"), strict=True)]
            for place in _tiles(scorer, sweep, ridge, (k_s, v_s), sums):
                place.backward(setting, [place.rows(x) for x in queries], parts)
            for whole, part in zip(into, parts, strict=True):
                sweep.store(whole, part)
            return sums[0], sums[1]

        def finish(item: tuple[Chunk, Sweep], found: tuple[Tensor, Tensor]) -> None:
            chunk, sweep = item
            for total, part in zip((dk, dv), found, strict=True):
                sweep.add_keys(chunk.of_tensor(total), part)

        parts = chunks(q, 5 * _widest(sweeps), len(task.q_tokens))
        in_order(list(itertools.product(parts, sweeps)), work, finish)
        own = None if setting.given else d_ridge.sum((0, 3, 4)).flatten()
        return None, None, dq, dk, dv, own


def _like_queries(q: Tensor, width: int) -> Tensor:
    """Unwritten [N, Hkv, G, Lq, width] stored token by token, as results are returned."""
    N, kv_heads, groups, Lq = q.shape[:4]
    return q.new_empty(N, Lq, kv_heads, groups, width).permute(0, 2, 3, 1, 4)


def _zeros_like_keys(k: Tensor) -> Tensor:
    """Zeros [N, Hkv, Lk, D] stored token by token."""
    return k.new_zeros(k.shape[0], k.shape[2], k.shape[1], k.shape[3]).transpose(1, 2)


def _widest(sweeps: tuple[Sweep, ...]) -> int:
    return max((sweep.widest for sweep in sweeps), default=1)


def _tiles(
    scorer: Scorer,
    sweep: Sweep,
    ridge: Tensor,
    keys: tuple[Tensor, Tensor],
    sums: list[Tensor] | None = None,
) -> Iterator[_Place]:
    """Every tile of a sweep with its keys and values, and where the gradients of both are added."""
    for stack in stacks(sweep.tiles, scorer.chunk):
        own = [stack.of_keys(x) for x in keys]
        adders = [((),) * len(stack.tiles)] * 2 if sums is None else [stack.adders(x) for x in sums]
        for tile, k, v, add_k, add_v in zip(stack.tiles, *own, *adders, strict=True):
            yield _Place(scorer, tile, ridge, k, v, (add_k, add_v))


@dataclass(frozen=True)
class _Place:
    """One tile: keys k [M, columns, D] and v [M, columns, Dv]."""

    scorer: Scorer
    tile: Tile
    ridge: Tensor
    k: Tensor
    v: Tensor
    adders: tuple[Adder, Adder]

    def rows(self, x: Tensor) -> Tensor:
        """[M, G rows, D] of x [M, G, R, D]"""
        return x[:, :, self.tile.rows].flatten(1, 2)

    def _ridges(self) -> Tensor:
        """[M, G rows, 1]"""
        chunk = self.scorer.chunk
        per_head = chunk.of_broadcast(self.ridge.view(1, chunk.kv_heads, chunk.groups, 1))
        return per_head.expand(-1, -1, self.tile.height).flatten(1, 2)[..., None]

    def _put(self, whole: Tensor, rows: Tensor) -> None:
        """whole[:, :, tile] = rows for whole [M, G, R, D] and rows [M, G rows, D]."""
        target = whole[:, :, self.tile.rows]
        target.copy_(rows.view(target.shape))

    def forward(
        self, setting: Setting, q: Tensor, results: list[Tensor]
    ) -> tuple[int, Tensor, Tensor] | None:
        """Writes o, lse and r; returns iterations, residuals and their limits if it solved."""
        o, lse, r = results
        D = self.k.shape[2]
        if self.k.shape[1] == 0:
            for x, value in ((o, 0.0), (lse, -torch.inf), (r, 0.0)):
                x[:, :, self.tile.rows] = value
            return None
        seen = _Seen(self, q[..., :D])
        p, mean = seen.weights, seen.mean
        reached = None
        if setting.given:
            own = q[..., D:]
        else:
            b = mean - q[..., :D]
            ridge = self._ridges()
            limit = setting.tolerance * torch.minimum(
                2 * ridge.sqrt(), torch.linalg.vector_norm(b, dim=-1, keepdim=True)
            )
            own, residual, count = seen.solve(b, ridge, limit, setting.max_iterations)
            reached = count, residual, limit
        share = torch.bmm(own, seen.k.mT).sub_((own * mean).sum(-1, keepdim=True))
        values = torch.bmm(share.neg_().add_(1).mul_(p), seen.v)
        found = seen.mark(values)
        self._put(o, found)
        self._put(r, own)
        assert seen.lse is not None
        row_lse = seen.lse.flatten(1, 2)[..., None]
        bad = seen.bad_rows
        self._put(lse, row_lse if bad is None else row_lse.masked_fill(bad, torch.nan))
        return reached

    def backward(self, setting: Setting, by_query: list[Tensor], results: list[Tensor]) -> None:
        """Writes dq (dr beside it where r was given) and the share of each row in the gradient of the
        ridge, adds to dk and dv."""
        dq, d_ridge = results
        if self.k.shape[1] == 0:
            dq[:, :, self.tile.rows] = 0.0
            d_ridge[:, :, self.tile.rows] = 0.0
            return
        q, r, do, dlse = by_query
        D, scale = self.k.shape[2], self.scorer.task.score.scale
        q = q[..., :D]
        seen = _Seen(self, q)
        k, v, p, mean = seen.k, seen.v, seen.weights, seen.mean
        if seen.careful:
            q, r, do = (torch.where(x.isfinite(), x, 0.0) for x in (q, r, do))
        a = torch.bmm(do, v.mT)
        a = a - (p * a).sum(-1, keepdim=True)
        moved = torch.bmm(p * a, k)  # sum_j p a c, as sum_j p a = 0
        if setting.given:
            y = torch.zeros_like(r)
            penalty = dlse
        else:
            ridge = self._ridges()
            limit = setting.tolerance * torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
            y, _, _ = seen.solve(-moved, ridge, limit, setting.max_iterations)
            product = (y * r).sum(-1, keepdim=True)
            self._put(d_ridge, -product)
            penalty = dlse + ridge * product if setting.detached else dlse
        rho = torch.bmm(r, k.mT).sub_((r * mean).sum(-1, keepdim=True))
        upsilon = torch.bmm(y, k.mT).sub_((y * mean).sum(-1, keepdim=True))
        e = a - a * rho + upsilon * (1 - rho)
        score = p * (e - (p * e).sum(-1, keepdim=True) + penalty)
        d_own = torch.bmm(score, k).mul_(scale).sub_(y)
        self._put(dq, torch.cat([d_own, -moved], dim=-1) if setting.given else d_own)
        kept = p * (1 - rho)
        add_k, add_v = self.adders
        add_v(kept.mT, do)
        add_k(kept.mT, y)
        add_k((p * (a + upsilon)).mT, r, alpha=-1.0)
        add_k(score.mT, q, alpha=scale)


class _Seen:
    """Weights p [M, G rows, columns] of a tile, its mean key per row, and solves with both.

    Keys and values that are not finite are taken for 0; rows and entries that see them are marked.
    """

    def __init__(self, place: _Place, q: Tensor) -> None:
        self.k, self.v = place.k, place.v
        self.careful = place.scorer.careful
        self.bad_rows: Tensor | None = None
        bad_k = bad_v = None
        if self.careful:
            bad_k = ~self.k.isfinite().all(-1)
            bad_v = ~self.v.isfinite()
            self.k = self.k.masked_fill(bad_k[..., None], 0.0)
            self.v = self.v.masked_fill(bad_v, 0.0)
            bad_q = ~q.isfinite().all(-1, keepdim=True)
            q = q.masked_fill(bad_q, 0.0)
        found = place.scorer.weights(place.tile, q, self.k.mT)
        self.weights, self.lse = found.matrices, found.lse
        if bad_k is not None and bad_v is not None:
            visible = torch.ones_like(self.weights, dtype=torch.bool)
            if found.hidden is not None:
                visible = ~found.hidden.flatten(1, 2)
            self.bad_rows = (visible & bad_k[:, None]).any(-1, keepdim=True) | bad_q
            self._bad_entries = (visible.to(q.dtype) @ bad_v.to(q.dtype)) > 0
        self.mean = torch.bmm(self.weights, self.k)

    def mark(self, values: Tensor) -> Tensor:
        """NaN where a row sees what is not finite."""
        if self.bad_rows is None:
            return values
        return values.masked_fill(self.bad_rows | self._bad_entries, torch.nan)

    def solve(
        self, b: Tensor, ridge: Tensor, limit: Tensor, max_iterations: int
    ) -> tuple[Tensor, Tensor, int]:
        """x with (sum_j p c c^T + ridge I) x = b, residual norms, iterations."""

        def product(d: Tensor) -> Tensor:
            # Centred before it is weighted: what keys have in common would drown a small ridge.
            offset = -(d * self.mean).sum(-1, keepdim=True)
            along = torch.baddbmm(offset, d, self.k.mT).mul_(self.weights)
            total = along.sum(-1, keepdim=True)
            return torch.bmm(along, self.k).addcmul_(self.mean, total, value=-1).addcmul_(ridge, d)

        return conjugate_gradients(product, b, limit, max_iterations)
