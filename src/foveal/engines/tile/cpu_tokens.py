"""Attention along lists of key blocks per token in plain PyTorch, on any device: time and memory follow
the lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.engines.tile.token_lists import TokenLists

# Elements of the keys that are gathered at once: they live in the second-level cache.
_GATHERED = 1 << 19


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: TokenLists, scale: float
) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] and natural lse [B, Hq, Lq] of float32 or float64 tensors."""
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    for own in _matrices(lists, q, k, v):
        for tokens in own.chunks():
            ids, seen = own.listed(tokens)
            k_t, v_t = own.gather(own.keys, ids, seen), own.gather(own.values, ids, seen)
            s = q[own.n, tokens, own.queries] @ k_t.mT * scale  # [tokens, G, keys]
            s.masked_fill_(~seen[:, None], -torch.inf)
            level = torch.logsumexp(s, -1)
            weights = torch.exp(s - torch.where(level == -torch.inf, 0.0, level)[..., None])
            o[own.n, tokens, own.queries] = weights @ v_t
            lse[own.n, own.queries, tokens] = level.T
    return o, lse


def backward(
    tensors: tuple[Tensor, ...], lists: TokenLists, scale: float, do: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; tensors are q, k, v, o and natural lse; dlse [B, Hq, Lq]."""
    q, k, v, o, lse = tensors
    shift = (o * do).sum(-1)  # [B, Lq, Hq]
    if dlse is not None:
        shift = shift - dlse.transpose(1, 2)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    for own in _matrices(lists, q, k, v):
        dk_own, dv_own = torch.zeros_like(own.keys), torch.zeros_like(own.values)
        for tokens in own.chunks():
            ids, seen = own.listed(tokens)
            k_t, v_t = own.gather(own.keys, ids, seen), own.gather(own.values, ids, seen)
            q_t, do_t = q[own.n, tokens, own.queries], do[own.n, tokens, own.queries]
            level = lse[own.n, own.queries, tokens].T[..., None]
            s = (q_t @ k_t.mT * scale).masked_fill_(~seen[:, None], -torch.inf)
            p = torch.exp(s - torch.where(level == -torch.inf, 0.0, level))
            ds = do_t @ v_t.mT - shift[own.n, tokens, own.queries][..., None]
            ds = (p * ds).masked_fill_(~seen[:, None], 0.0).mul_(scale)
            dq[own.n, tokens, own.queries] = ds @ k_t
            own.add(dv_own, ids, p.mT @ do_t)
            own.add(dk_own, ids, ds.mT @ q_t)
        own.scatter(dk, dk_own)
        own.scatter(dv, dv_own)
    return dq, dk, dv


@dataclass(frozen=True)
class _Matrices:
    """One key head: its keys and values block after block [blocks, block, .]."""

    lists: TokenLists
    n: int
    h: int
    groups: int
    keys: Tensor
    values: Tensor
    place: Tensor  # [blocks, block] of each key in the sequence
    inside: Tensor  # [blocks, block]
    finite: bool

    @property
    def queries(self) -> slice:
        return slice(self.h * self.groups, (self.h + 1) * self.groups)

    def chunks(self) -> Iterator[slice]:
        indices = self.lists.indices
        width = max(indices.shape[3] * self.lists.block * self.keys.shape[2], 1)
        step = max(1, _GATHERED // width)
        for first in range(0, indices.shape[2], step):
            yield slice(first, min(first + step, indices.shape[2]))

    def listed(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """Blocks of the lists of some tokens, 0 where there is none, and which keys are seen."""
        lists = self.lists
        own = lists.indices[self.n if len(lists.indices) > 1 else 0, self.h, tokens]
        ids = own.clamp(min=0)
        seen = self.inside[ids] & (own >= 0)[..., None]
        if lists.causal:
            position = torch.arange(tokens.start, tokens.stop, device=own.device) + lists.shift
            seen &= self.place[ids] <= position[:, None, None]
        return ids, seen.flatten(1)

    def gather(self, blocks: Tensor, ids: Tensor, seen: Tensor) -> Tensor:
        """[tokens, keys, D]; zeros in place of what is not seen if a number is not finite."""
        found = blocks.index_select(0, ids.flatten()).view(*seen.shape, blocks.shape[2])
        return found if self.finite else torch.where(seen[..., None], found, 0.0)

    def add(self, total: Tensor, ids: Tensor, part: Tensor) -> None:
        total.index_add_(0, ids.flatten(), part.view(-1, *total.shape[1:]))

    def scatter(self, total: Tensor, blocks: Tensor) -> None:
        place = self.place.clamp(max=max(total.shape[1] - 1, 0))
        blocks = torch.where(self.inside[..., None], blocks, 0.0)
        total[self.n, :, self.h].index_add_(0, place.flatten(), blocks.flatten(0, 1))


def _matrices(lists: TokenLists, q: Tensor, k: Tensor, v: Tensor) -> Iterator[_Matrices]:
    within = torch.arange(lists.block, dtype=torch.int32, device=k.device)
    place = lists.starts[:, None] + within
    inside = place < lists.stops[:, None]
    index = place.clamp(max=max(k.shape[1] - 1, 0))
    finite = bool((k.sum() + v.sum()).isfinite())
    for n in range(k.shape[0]):
        for h in range(k.shape[2]):
            keys, values = k[n, :, h][index], v[n, :, h][index]
            groups = q.shape[2] // k.shape[2]
            yield _Matrices(lists, n, h, groups, keys, values, place, inside, finite)
