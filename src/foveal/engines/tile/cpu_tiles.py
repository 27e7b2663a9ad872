"""Forward and backward of one list of tiles, as products of plain matrices.

A tile holds complete rows, so one softmax is exact and the backward recomputes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal.engines.tile.reference import visible_product
from foveal.engines.tile.walk import Listed, Runs, Sweep, Tile, walk
from foveal.patterns.base import Extent, Pattern
from foveal.scores.base import Geometry
from foveal.scores.normal import NormalForm

# Score matrices of one tile kept together: about the second-level cache of a current core.
_WORKSPACE_BYTES = 2 << 20


@dataclass(frozen=True)
class Task:
    """What to compute: P sub-problems of one pattern, and where their tokens stand in the whole."""

    pattern: Pattern
    extent: Extent
    q_tokens: Tensor  # [P, Lq]
    k_tokens: Tensor  # [P, Lk]
    score: NormalForm
    geometry: Geometry
    with_lse: bool

    def bias(self, index: int, parameter: Tensor, tile: Tile, chunk: Chunk) -> Tensor:
        """Values of one additive term for the rows and columns of a tile: [M or 1, G or 1, rows, columns]."""
        q_tokens = self.q_tokens[:, tile.q_tokens]
        term = self.score.terms[index]
        if tile.runs is not None:
            values = term.values(
                parameter, q_tokens, self.k_tokens[:, tile.k_tokens], self.geometry
            )
        else:
            whole = term.values(parameter, q_tokens, self.k_tokens, self.geometry)
            values = chunk.listed_values(whole, tile.k_tokens)
        return chunk.of_values(values)

    def bias_gradient(
        self, index: int, parameter: Tensor, ds: Tensor, tile: Tile, chunk: Chunk
    ) -> Tensor:
        """Gradient of the term's parameter, given that of the scores of a tile [M, G, rows, columns]."""
        with torch.enable_grad():
            leaf = parameter.detach().requires_grad_()
            values = self.bias(index, leaf, tile, chunk)
            return torch.autograd.grad(values, leaf, ds.sum_to_size(values.shape))[0]


@dataclass(frozen=True)
class Chunk:
    """Some of the N x Hkv matrices: whole batches, or heads of one batch."""

    batches: slice
    heads: slice
    kv_heads: int
    groups: int
    sub_problems: int

    def of_tensor(self, x: Tensor) -> Tensor:
        """[M, ...] view of x [N, Hkv, ...]"""
        return x[self.batches, self.heads].flatten(0, 1)

    def of_broadcast(self, x: Tensor) -> Tensor:
        """[M, ...] of x [N or 1, Hkv or 1, ...]"""
        batches = self.batches.stop - self.batches.start
        heads = self.heads.stop - self.heads.start
        x = x[self.batches] if x.shape[0] > 1 else x
        x = x[:, self.heads] if x.shape[1] > 1 else x
        return x.expand(batches, heads, *x.shape[2:]).flatten(0, 1)

    def add_per_head(self, total: Tensor, part: Tensor) -> None:
        """total [Hq] += part [M, G] summed over batches."""
        heads = self.heads.stop - self.heads.start
        per_head = part.view(-1, heads, self.groups).sum(0)
        total.view(self.kv_heads, self.groups)[self.heads] += per_head

    def of_values(self, values: Tensor) -> Tensor:
        """[M or 1, G or 1, q, k] of values [B or 1, P or 1, Hq or 1, q, k]"""
        B, P, heads = values.shape[:3]
        if heads > 1:
            values = values.unflatten(2, (self.kv_heads, self.groups))
        else:
            values = values[:, :, :, None]
        if B * P > 1:
            values = values.expand(B, self.sub_problems, *values.shape[2:])
        values = values.flatten(0, 1)
        if values.shape[0] == 1 and values.shape[1] == 1:
            return values[:, 0]
        return self.of_broadcast(values)

    def listed_values(self, values: Tensor, k_tokens: Tensor) -> Tensor:
        """Columns of values [B or 1, 1, Hq or 1, q, Lk] at k_tokens [B or 1, Hkv or 1, columns]."""
        if values.shape[-1] == 1:
            return values
        index = k_tokens
        if k_tokens.shape[1] == self.kv_heads:
            index = index.repeat_interleave(self.groups, dim=1)
        index = index[:, None, :, None]
        shape = torch.broadcast_shapes(values.shape[:-1], (*index.shape[:3], 1))
        return values.expand(*shape, -1).gather(-1, index.expand(*shape, -1))


def _chunks(q: Tensor, widest: int, sub_problems: int) -> Iterator[Chunk]:
    """Cuts N x Hkv so that the scores of the widest tile (elements of one matrix) stay in cache."""
    N, kv_heads, groups = q.shape[:3]
    room = max(1, _WORKSPACE_BYTES // max(widest * groups * q.element_size(), 1))
    if room >= kv_heads:
        step = room // kv_heads
        for n in range(0, N, step):
            yield Chunk(
                slice(n, min(n + step, N)), slice(0, kv_heads), kv_heads, groups, sub_problems
            )
        return
    for n in range(N):
        for h in range(0, kv_heads, room):
            stop = min(h + room, kv_heads)
            yield Chunk(slice(n, n + 1), slice(h, stop), kv_heads, groups, sub_problems)


class _Scores:
    """The weights of one tile, and what the backward needs of how they came about."""

    def __init__(
        self,
        task: Task,
        tile: Tile,
        chunk: Chunk,
        q: Tensor,
        k: Tensor,
        parameters: tuple[Tensor, ...],
        careful: bool,
    ) -> None:
        """q [M, G rows, D], k [M, columns, D]"""
        self.task, self.tile, self.chunk = task, tile, chunk
        rows = len(tile.q_tokens)
        products = torch.bmm(q, k.transpose(1, 2))
        self.slope: Tensor | None = None
        if (cap := task.score.soft_cap) is not None:
            capped = products.div_(cap).tanh_()
            self.slope = 1 - capped * capped
            products = capped * cap
        scores = products.view(len(q), -1, rows, products.shape[-1])  # [M, G, rows, columns]
        for index in range(len(task.score.terms)):
            scores += task.bias(index, parameters[index], tile, chunk)
        self.hidden: Tensor | None = None
        if tile.mask is not None:
            if careful:
                self.hidden = self._fit(tile.mask.hidden)
                scores.masked_fill_(self.hidden, -torch.inf)
            else:
                scores += self._fit(tile.mask.additive)
        self.raw = scores
        self.weights = torch.softmax(scores, dim=-1)
        self.blind = None
        if tile.mask is not None and tile.mask.blind is not None:
            self.blind = self._fit(tile.mask.blind)
            self.weights = self.weights.masked_fill(self.blind, 0.0)

    def _fit(self, mask: Tensor) -> Tensor:
        """A mask of the tile against [M, G, rows, columns]."""
        return mask if mask.dim() == 2 else self.chunk.of_broadcast(mask)[:, None]

    def lse(self, sink: Tensor | None) -> Tensor:
        """[M, G, rows]; the sink, if any, is counted and the weights are shrunk by its share."""
        largest = self.raw.amax(-1)
        lse = largest - self.weights.amax(-1).log()
        if self.blind is not None:
            lse = lse.masked_fill(self.blind.squeeze(-1), -torch.inf)
        if sink is None:
            return lse
        total = torch.logaddexp(lse, sink)
        self.weights = self.weights * torch.exp(lse - total)[..., None]
        return total


def _sink_of(task: Task, parameters: tuple[Tensor, ...], chunk: Chunk) -> Tensor | None:
    """[M, G, 1]"""
    if task.score.sink is None:
        return None
    per_head = parameters[-1].view(1, chunk.kv_heads, chunk.groups, 1)
    return chunk.of_broadcast(per_head)


def _columns(tile: Tile, chunk: Chunk) -> Runs | Listed:
    return tile.runs or Listed(chunk.of_broadcast(tile.k_tokens))


def _widest(sweeps: tuple[Sweep, ...]) -> int:
    return max((len(t.q_tokens) * t.k_tokens.shape[-1] for s in sweeps for t in s.tiles), default=1)


def _product(scores: _Scores, weights: Tensor, values: Tensor) -> Tensor:
    """weights [M, G, rows, columns] @ values [M, columns, D] -> [M, G rows, D]"""
    if scores.hidden is None:
        return torch.bmm(weights.flatten(1, 2), values)
    hidden = scores.hidden.expand(weights.shape).flatten(1, 2)
    return visible_product(weights.flatten(1, 2), values, ~hidden)


class TiledAttention(torch.autograd.Function):
    """o, lse of heads-first q [N, Hkv, G, Lq, D] (scaled), k and v [N, Hkv, Lk, D]."""

    @staticmethod
    def forward(
        ctx: Any, task: Task, q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        careful = not (bool(torch.isfinite(k).all()) and bool(torch.isfinite(v).all()))
        with_lse = task.with_lse or task.score.sink is not None
        o = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_empty(q.shape[:-1] if with_lse else (*q.shape[:3], 0))
        local = tuple(p.to(q.dtype) for p in parameters)
        sweeps = tuple(walk(task.pattern, task.extent, q.shape[:3].numel()))
        for chunk in _chunks(q, _widest(sweeps), len(task.q_tokens)):
            q_all, k_all, v_all, o_all = (chunk.of_tensor(x) for x in (q, k, v, o))
            lse_all = chunk.of_tensor(lse)[..., None]
            sink = _sink_of(task, local, chunk)
            for sweep in sweeps:
                q_s, k_s, v_s = sweep.queries(q_all), sweep.keys(k_all), sweep.keys(v_all)
                o_s = o_all if not sweep.q_box else q_s.new_empty(*q_s.shape[:-1], v.shape[-1])
                lse_s = lse_all if not sweep.q_box else q_s.new_empty(*q_s.shape[:-1], 1)
                for tile in sweep.tiles:
                    columns = _columns(tile, chunk)
                    rows = q_s[:, :, tile.rows]
                    if columns.width == 0:
                        o_s[:, :, tile.rows] = 0.0
                        if with_lse:
                            lse_s[:, :, tile.rows, 0] = -torch.inf if sink is None else sink
                        continue
                    scores = _Scores(
                        task, tile, chunk, rows.flatten(1, 2), columns.take(k_s), local, careful
                    )
                    if with_lse:
                        lse_s[:, :, tile.rows, 0] = scores.lse(sink)
                    product = _product(scores, scores.weights, columns.take(v_s))
                    o_s[:, :, tile.rows] = product.view(*rows.shape[:-1], v.shape[-1])
                sweep.store_queries(o_all, o_s)
                if with_lse:
                    sweep.store_queries(lse_all, lse_s)
        ctx.task, ctx.careful = task, careful
        ctx.save_for_backward(q, k, v, o, lse, *parameters)
        if not task.with_lse:
            ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        task: Task = ctx.task
        q, k, v, o, lse, *saved = ctx.saved_tensors
        local = tuple(p.to(q.dtype) for p in saved)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        d_parameters = [torch.zeros_like(p) for p in local]
        # dS = P * (dP - shift): the gradient through lse enters as a shift of every row.
        shift = (do * o).sum(-1)
        if task.with_lse:
            shift = shift - dlse.masked_fill(lse == -torch.inf, 0.0)
        do = do.contiguous()
        sweeps = tuple(walk(task.pattern, task.extent, q.shape[:3].numel()))
        for chunk in _chunks(q, _widest(sweeps), len(task.q_tokens)):
            q_all, k_all, v_all, do_all, dq_all, dk_all, dv_all = (
                chunk.of_tensor(x) for x in (q, k, v, do, dq, dk, dv)
            )
            shift_all = chunk.of_tensor(shift)[..., None]
            sink = _sink_of(task, local, chunk)
            if sink is not None:
                share = torch.exp(sink[..., None] - chunk.of_tensor(lse)[..., None])
                per_head = -(share * shift_all).sum((-1, -2))  # [M, G]
                chunk.add_per_head(d_parameters[-1], per_head)
            for sweep in sweeps:
                q_s, k_s, v_s, do_s, shift_s = (
                    sweep.queries(q_all),
                    sweep.keys(k_all),
                    sweep.keys(v_all),
                    sweep.queries(do_all),
                    sweep.queries(shift_all),
                )
                dq_s = dq_all if not sweep.q_box else torch.empty_like(q_s)
                dk_s = dk_all if not sweep.k_box else torch.zeros_like(k_s)
                dv_s = dv_all if not sweep.k_box else torch.zeros_like(v_s)
                for tile in sweep.tiles:
                    columns = _columns(tile, chunk)
                    if columns.width == 0:
                        dq_s[:, :, tile.rows] = 0.0
                        continue
                    q_t = q_s[:, :, tile.rows]
                    q_rows, k_t = q_t.flatten(1, 2), columns.take(k_s)
                    do_rows = do_s[:, :, tile.rows].flatten(1, 2)
                    scores = _Scores(task, tile, chunk, q_rows, k_t, local, ctx.careful)
                    if sink is not None:
                        scores.lse(sink)
                    weights = scores.weights
                    columns.add(dv_s, torch.bmm(weights.flatten(1, 2).transpose(1, 2), do_rows))
                    ds = torch.bmm(do_rows, columns.take(v_s).transpose(1, 2)).view(weights.shape)
                    ds.sub_(shift_s[:, :, tile.rows]).mul_(weights)
                    if scores.hidden is not None:
                        ds.masked_fill_(scores.hidden, 0.0)
                    for index in range(len(task.score.terms)):
                        d_parameters[index] += task.bias_gradient(
                            index, local[index], ds, tile, chunk
                        )
                    if scores.slope is not None:
                        ds.mul_(scores.slope.view(ds.shape))
                    dq_s[:, :, tile.rows] = _product(scores, ds, k_t).view(q_t.shape)
                    columns.add(dk_s, torch.bmm(ds.flatten(1, 2).transpose(1, 2), q_rows))
                if sweep.q_box:
                    sweep.store_queries(dq_all, dq_s)
                if sweep.k_box:
                    sweep.add_keys(dk_all, dk_s)
                    sweep.add_keys(dv_all, dv_s)
        d_saved = (d.to(p.dtype) for d, p in zip(d_parameters, saved, strict=True))
        return (None, dq, dk, dv, *d_saved)
