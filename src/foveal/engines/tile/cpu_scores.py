"""The weights of one tile: products, cap, additive terms, mask, softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.engines.tile.parts import Task
from foveal.engines.tile.walk import Tile
from foveal.engines.tile.workers import Scratch

# Score matrices of one tile kept together: about the second-level cache of a current core.
_WORKSPACE_BYTES = 2 << 20


@dataclass(frozen=True)
class Chunk:
    """Some of the N x Hkv matrices: whole batches, or heads of one batch."""

    batches: slice
    heads: slice
    kv_heads: int
    groups: int
    batch: int
    sub_problems: int

    def of_tensor(self, x: Tensor) -> Tensor:
        """View [n, heads, ...] of x [N, Hkv, ...]"""
        return x[self.batches, self.heads]

    def of_broadcast(self, x: Tensor) -> Tensor:
        """[M, ...] of x [N or 1, Hkv or 1, ...]"""
        batches = self.batches.stop - self.batches.start
        heads = self.heads.stop - self.heads.start
        x = x[self.batches] if x.shape[0] > 1 else x
        x = x[:, self.heads] if x.shape[1] > 1 else x
        return x.expand(batches, heads, *x.shape[2:]).flatten(0, 1)

    def of_values(self, values: Tensor) -> Tensor:
        """[M or 1, G or 1, q, k] of values [B or 1, P or 1, Hq or 1, q, k]"""
        B, P, heads = values.shape[:3]
        if heads > 1:
            values = values.unflatten(2, (self.kv_heads, self.groups))
        else:
            values = values[:, :, :, None]
        if B * P > 1:
            values = values.expand(self.batch, self.sub_problems, *values.shape[2:])
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
        shape = [max(pair) for pair in zip(values.shape[:4], (*index.shape[:3], 1), strict=True)]
        return values.expand(*shape, -1).gather(-1, index.expand(*shape, -1))


def chunks(q: Tensor, widest: int, sub_problems: int) -> Iterator[Chunk]:
    """Cuts N x Hkv so that the scores of the widest tile (elements of one matrix) stay in cache."""
    N, kv_heads, groups = q.shape[:3]
    shape = (kv_heads, groups, N // sub_problems, sub_problems)
    room = max(1, _WORKSPACE_BYTES // max(widest * groups * q.element_size(), 1))
    if room >= kv_heads:
        step = room // kv_heads
        for n in range(0, N, step):
            yield Chunk(slice(n, min(n + step, N)), slice(0, kv_heads), *shape)
        return
    for n in range(N):
        for h in range(0, kv_heads, room):
            yield Chunk(slice(n, n + 1), slice(h, min(h + room, kv_heads)), *shape)


@dataclass
class Weights:
    """Softmax weights of one tile [M, G, rows, columns], and what the backward needs beside them.

    `slope` is the derivative of the soft cap; `hidden` is set only where hidden pairs must be kept
    out of products by hand, because k or v hold NaN or inf; `lse` [M, G, rows] only when asked for.
    """

    values: Tensor
    slope: Tensor | None = None
    hidden: Tensor | None = None
    lse: Tensor | None = None

    @property
    def matrices(self) -> Tensor:
        """[M, G rows, columns]"""
        return self.values.flatten(1, 2)


@dataclass(frozen=True)
class Scorer:
    """Turns products into weights, chunk by chunk.

    `parameters` are those of the score in the precision of the computation; `careful` keeps NaN and
    inf of hidden keys out; `with_lse` also yields the log-sum-exp of every row.
    """

    task: Task
    chunk: Chunk
    parameters: tuple[Tensor, ...]
    careful: bool
    with_lse: bool
    scratch: Scratch

    def weights(self, tile: Tile, q: Tensor, k: Tensor) -> Weights:
        """Weights of q [M, G rows, D] on k [M, D, columns]; they live in the scratch."""
        score = self.task.score
        shape = (q.shape[0], q.shape[1], k.shape[2])
        products = self.scratch.take("scores", shape, q.dtype)
        torch.baddbmm(products, q, k, beta=0, alpha=score.scale, out=products)
        slope = None
        if (cap := score.soft_cap) is not None:
            products.div_(cap).tanh_()
            slope = 1 - products * products
            products.mul_(cap)
        scores = products.view(len(q), -1, tile.height, k.shape[2])
        for index, parameter in enumerate(self.parameters[: len(score.terms)]):
            scores += self._bias(index, parameter, tile)
        hidden = self._hide(tile, scores)
        blind = self._blind_rows(tile, scores)
        largest = scores.amax(-1) if self.with_lse else None
        torch.softmax(scores, dim=-1, out=scores)
        if blind is not None:
            scores.masked_fill_(blind, 0.0)
        lse = None
        if largest is not None:
            lse = largest - scores.amax(-1).log()
            if blind is not None:
                lse = lse.masked_fill(blind.squeeze(-1), -torch.inf)
            if (sink := self.sink()) is not None:
                total = torch.logaddexp(lse, sink)
                scores.mul_(torch.exp(lse - total)[..., None])
                lse = total
        slope = None if slope is None else slope.view(scores.shape)
        return Weights(scores, slope, hidden, lse)

    def score_gradient(self, weights: Weights, products: Tensor, dlse: Tensor) -> Tensor:
        """Gradient of the scores [M, G, rows, columns], written over products = do v^T.

        dS = P (dP - sum_j P dP) + P dlse: lse moves with every score of its row by its weight.
        """
        ds = products.view(weights.values.shape)
        if weights.hidden is not None:
            ds.masked_fill_(weights.hidden, 0.0)
        torch.ops.aten._softmax_backward_data.out(ds, weights.values, -1, ds.dtype, grad_input=ds)
        if self.task.with_lse:
            ds.addcmul_(weights.values, dlse)
        if weights.hidden is not None:
            ds.masked_fill_(weights.hidden, 0.0)
        return ds

    def bias_gradient(self, index: int, ds: Tensor, tile: Tile) -> Tensor:
        """Gradient of a term's parameter, given that of the scores of a tile [M, G, rows, columns]."""
        with torch.enable_grad():
            leaf = self.parameters[index].detach().requires_grad_()
            values = self._bias(index, leaf, tile)
            return torch.autograd.grad(values, leaf, ds.sum_to_size(values.shape))[0]

    def _bias(self, index: int, parameter: Tensor, tile: Tile) -> Tensor:
        """Values of one additive term on a tile.  [M or 1, G or 1, rows, columns]"""
        task, term = self.task, self.task.score.terms[index]
        rows, columns = tile.tokens()
        q_tokens = task.q_tokens[:, rows]
        if isinstance(tile.columns, Tensor):
            whole = term.values(parameter, q_tokens, task.k_tokens, task.geometry)
            values = self.chunk.listed_values(whole, columns)
        else:
            k_tokens = task.k_tokens[:, columns]
            values = term.values(parameter, q_tokens, k_tokens, task.geometry)
        return self.chunk.of_values(values)

    def sink(self) -> Tensor | None:
        """Sink logits of the chunk's heads.  [M, G, 1]"""
        if self.task.score.sink is None:
            return None
        per_head = self.parameters[-1].view(1, self.chunk.kv_heads, self.chunk.groups, 1)
        return self.chunk.of_broadcast(per_head)

    def _hide(self, tile: Tile, scores: Tensor) -> Tensor | None:
        if tile.mask is None:
            return None
        if not self.careful:
            for columns, additive in tile.mask.additive_pieces:
                scores[..., columns].add_(self.fit(additive))
            return None
        all_hidden = torch.zeros_like(scores, dtype=torch.bool)
        for columns, hidden in tile.mask.pieces:
            all_hidden[..., columns] = self.fit(hidden)
        scores.masked_fill_(all_hidden, -torch.inf)
        return all_hidden

    def _blind_rows(self, tile: Tile, scores: Tensor) -> Tensor | None:
        """Rows without a key of finite score, or None when there are none.  [..., rows, 1]"""
        if self.task.score.terms or self.careful:
            blind = scores.amax(-1, keepdim=True) == -torch.inf
            return blind if bool(blind.any()) else None
        if tile.mask is None or tile.mask.blind is None:
            return None
        return self.fit(tile.mask.blind)

    def fit(self, mask: Tensor) -> Tensor:
        """A mask of the tile against [M, G, rows, columns]."""
        return mask if mask.dim() == 2 else self.chunk.of_broadcast(mask)[:, None]
