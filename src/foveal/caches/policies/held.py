"""The tokens that one layer holds under a policy: what it decided on, and what came since."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import CacheError
from foveal.caches.policies.base import Decision, Merge
from foveal.caches.policies.payload import Eight, Payload, Sparse, Whole
from foveal.compose import merge
from foveal.patterns import Causal, Dense
from foveal.scores import KeyBias, Score


@dataclass(frozen=True)
class Piece:
    """Some tokens of every sequence and head, kept alike, in order of time.

    k and v hold the rows of all heads one behind the other, [sum of counts, D]; counts[b][h] rows
    belong to head h of sequence b.  positions int32 [sum of counts].  idle: not attended to; host: in
    the memory of the host.
    """

    k: Payload
    v: Payload
    positions: Tensor
    counts: tuple[tuple[int, ...], ...]
    idle: bool = False
    host: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of keys, values and positions."""
        return self.k.bytes() + self.v.bytes() + self.positions.numel() * 4

    def runs(self) -> list[tuple[int, int, int, int]]:
        """(sequence, head, first row, row behind the last) of every head."""
        found, start = [], 0
        for b, row in enumerate(self.counts):
            for h, count in enumerate(row):
                found.append((b, h, start, start + count))
                start += count
        return found

    def attend(self, q: Tensor, score: Score) -> tuple[Tensor, Tensor]:
        """o [B, Lq, Hq, Dv] and lse [B, Lq, Hq] of every query on all tokens of the piece."""
        B, Lq, Hq, _ = q.shape
        heads = len(self.counts[0])
        sizes = {count for row in self.counts for count in row}
        if len(sizes) == 1:
            n = sizes.pop()
            k, v = (
                x.dense(0, B * heads * n).view(B, heads, n, -1).transpose(1, 2)
                for x in (self.k, self.v)
            )
            return attend(q, k, v, Dense(), score, return_lse=True)
        parts = q.unflatten(2, (heads, -1))
        width = self.v.dense(0, 0).shape[-1]
        o = q.new_zeros(B, Lq, heads, Hq // heads, width)
        lse = torch.full(o.shape[:-1], -torch.inf, device=q.device)
        lse = lse.double() if q.dtype == torch.float64 else lse
        for b, h, start, stop in self.runs():
            if stop > start:
                k, v = (x.dense(start, stop)[None, :, None] for x in (self.k, self.v))
                o[b : b + 1, :, h], lse[b : b + 1, :, h] = attend(
                    parts[b : b + 1, :, h], k, v, Dense(), score, return_lse=True
                )
        return o.flatten(2, 3), lse.flatten(2, 3)


@dataclass
class Held:
    """Keys and values of one layer: pieces that a policy made, and the tail that came since.

    Shapes: tail_k, tail_v [B, T, Hkv, .]; tail_real bool [B, T], False at padding.
    `seen` counts the tokens ever appended, padding included.
    """

    pieces: list[Piece] = field(default_factory=list)
    tail_k: Tensor | None = None
    tail_v: Tensor | None = None
    tail_real: Tensor | None = None
    seen: int = 0
    memo: Tensor | None = None

    @property
    def tail(self) -> int:
        """Tokens appended since the policy acted."""
        return 0 if self.tail_k is None else self.tail_k.shape[1]

    @property
    def stored(self) -> int:
        """Tokens of the head that holds most."""
        if not self.pieces:
            return self.tail
        rows = [torch.tensor(piece.counts) for piece in self.pieces]
        return int(torch.stack(rows).sum(0).max()) + self.tail

    def bytes(self) -> int:
        """Bytes of keys, values, scales, bitmaps and positions, without what lies on the host."""
        own = sum(piece.bytes for piece in self.pieces if not piece.host)
        return own + sum(
            x.numel() * x.element_size() for x in (self.tail_k, self.tail_v) if x is not None
        )

    def host_bytes(self) -> int:
        """Bytes of what lies on the host."""
        return sum(piece.bytes for piece in self.pieces if piece.host)

    def append(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        """Stores new tokens k [B, L, Hkv, D], v [B, L, Hkv, Dv]; real bool [B, L], all by default."""
        if real is None:
            real = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
        old = (self.tail_k, self.tail_v, self.tail_real)
        joined = [
            new if before is None else torch.cat([before, new], dim=1)
            for before, new in zip(old, (k, v, real), strict=True)
        ]
        self.tail_k, self.tail_v, self.tail_real = joined
        self.seen += k.shape[1]

    def attend(self, q: Tensor, score: Score, sink: Tensor | None = None) -> Tensor:
        """o [B, Lq, Hq, Dv] of the queries of the newest Lq tokens; those of a tail see no later one."""
        found = [piece.attend(q, score) for piece in self.pieces if not piece.idle]
        if self.tail_k is not None:
            found.append(self._near(q, score))
        o, lse = merge([o for o, _ in found], [lse for _, lse in found])
        if sink is not None:
            share = torch.exp(lse - torch.logaddexp(lse, sink.to(lse.dtype)))
            o = (o * share[..., None]).to(o.dtype)
        return o

    def _near(self, q: Tensor, score: Score) -> tuple[Tensor, Tensor]:
        """Attention to the tail."""
        assert self.tail_k is not None
        assert self.tail_v is not None
        assert self.tail_real is not None
        if not bool(self.tail_real.all()):
            hidden = torch.zeros(self.tail_real.shape, device=q.device)
            score = score + KeyBias(hidden.masked_fill_(~self.tail_real, -torch.inf)[:, None])
        return attend(q, self.tail_k, self.tail_v, Causal(), score, return_lse=True)

    def everything(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k [B, L, Hkv, D], v, real bool [B, Hkv, L] and positions int64 [B, Hkv, L], by time."""
        rows = self._rows()
        counts = torch.tensor([[len(place) for _, _, place in row] for row in rows])
        longest = int(counts.max())
        shape = (len(rows), len(rows[0]), longest)
        some_k, some_v, some_place = rows[0][0]
        k = some_k.new_zeros(*shape, some_k.shape[-1])
        v = some_v.new_zeros(*shape, some_v.shape[-1])
        positions = torch.full(shape, -1, device=some_place.device)
        for b, row in enumerate(rows):
            for h, (own_k, own_v, place) in enumerate(row):
                order, n = place.argsort(), len(place)
                k[b, h, :n], v[b, h, :n] = own_k[order], own_v[order]
                positions[b, h, :n] = place[order]
        real = torch.arange(longest) < counts[..., None]
        return k.transpose(1, 2), v.transpose(1, 2), real.to(k.device), positions

    def _rows(self) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
        """k, v and positions of every sequence and head, in any order."""
        if self.tail_k is not None:
            device = self.tail_k.device
            B, _, heads, _ = self.tail_k.shape
        else:
            device = next(
                (x.positions.device for x in self.pieces if not x.host), torch.device("cpu")
            )
            B, heads = len(self.pieces[0].counts), len(self.pieces[0].counts[0])
        found: list[list[list[tuple[Tensor, Tensor, Tensor]]]] = [
            [[] for _ in range(heads)] for _ in range(B)
        ]
        for piece in self.pieces:
            for b, h, start, stop in piece.runs():
                place = piece.positions[start:stop].long()
                own = (piece.k.dense(start, stop), piece.v.dense(start, stop), place)
                found[b][h].append(tuple(x.to(device) for x in own))  # type: ignore[arg-type]
        if self.tail_k is not None and self.tail_v is not None and self.tail_real is not None:
            first = self.seen - self.tail
            for b in range(B):
                own_rows = self.tail_real[b].nonzero()[:, 0]
                for h in range(heads):
                    k, v = self.tail_k[b, own_rows, h], self.tail_v[b, own_rows, h]
                    found[b][h].append((k, v, first + own_rows))
        return [
            [tuple(torch.cat(x) for x in zip(*parts, strict=True)) for parts in row]  # type: ignore[misc]
            for row in found
        ]

    def settle(self, decision: Decision) -> None:
        """Makes what was decided true: what is not kept is freed."""
        k, v, real, positions = self.everything()
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # [B, Hkv, L, D]
        if decision.merge is not None:
            k, v = (_merged(x, decision.merge) for x in (k, v))
        keep = decision.keep & real
        reduced = torch.zeros_like(keep) if decision.reduced is None else decision.reduced & keep
        idle = torch.zeros_like(keep) if decision.idle is None else decision.idle & keep
        pieces = []
        for mask, form, resting in (
            (keep & ~reduced & ~idle, Whole, False),
            (reduced & ~idle, _form(decision), False),
            (idle, Whole, True),
        ):
            if bool(mask.any()):
                pieces.append(
                    _piece(k, v, positions, mask, form, resting, resting and decision.host)
                )
        self.pieces = pieces
        self.memo = None if decision.memo is None else _shorter(decision.memo, keep)
        self.tail_k = self.tail_v = self.tail_real = None

    def crop(self, count: int) -> None:
        """Drops the newest `count` tokens; CacheError where the policy has acted on them."""
        if count > self.tail:
            raise CacheError(
                "crop",
                count,
                f"at most the {self.tail} tokens since the policy acted can be dropped",
            )
        if count:
            assert self.tail_k is not None
            stop = self.tail - count
            self.tail_k, self.tail_v, self.tail_real = (
                None if x is None else x[:, :stop].clone()
                for x in (self.tail_k, self.tail_v, self.tail_real)
            )
            self.seen -= count

    def reorder(self, index: Tensor) -> None:
        """Sequence b becomes what index[b] was; index int64 [any B]."""
        chosen = index.tolist()
        self.pieces = [_reordered(piece, chosen) for piece in self.pieces]
        self.memo = None if self.memo is None else self.memo[index.to(self.memo.device)]
        if self.tail_k is not None:
            self.tail_k, self.tail_v, self.tail_real = (
                None if x is None else x[index.to(x.device)]
                for x in (self.tail_k, self.tail_v, self.tail_real)
            )


def _form(decision: Decision) -> Callable[[Tensor], Payload]:
    if decision.sparsity > 0:
        return lambda x: Sparse.of(x, decision.sparsity)
    return Eight.of


def _piece(
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    mask: Tensor,
    form: Callable[[Tensor], Payload],
    idle: bool,
    host: bool,
) -> Piece:
    counts = tuple(tuple(row) for row in mask.sum(-1).tolist())
    place = torch.device("cpu") if host else k.device
    own_k, own_v = (form(x[mask].to(place)) for x in (k, v))
    return Piece(own_k, own_v, positions[mask].to(place, torch.int32), counts, idle, host)


def _shorter(memo: Tensor, keep: Tensor) -> Tensor:
    """The notes of the tokens that stay, [B, Hkv, most], -1 behind a head's last."""
    order = (~keep).to(torch.uint8).argsort(dim=-1, stable=True)
    notes = memo.masked_fill(~keep, -1).gather(-1, order)
    return notes[..., : int(keep.sum(-1).max())]


def _merged(x: Tensor, change: Merge) -> Tensor:
    """x [B, Hkv, L, D] with every owner the weighted sum of what it owns."""
    owner = change.owner[..., None].expand_as(x)
    weighted = x.to(torch.promote_types(x.dtype, torch.float32)) * change.weights[..., None]
    return torch.zeros_like(weighted).scatter_add_(2, owner, weighted).to(x.dtype)


def _reordered(piece: Piece, chosen: list[int]) -> Piece:
    starts: dict[int, list[Tensor]] = {}
    for b, _h, start, stop in piece.runs():
        starts.setdefault(b, []).append(torch.arange(start, stop))
    rows = torch.cat([run for b in chosen for run in starts[b]])
    rows = rows.to(piece.positions.device)
    return Piece(
        piece.k.select(rows),
        piece.v.select(rows),
        piece.positions[rows],
        tuple(piece.counts[b] for b in chosen),
        piece.idle,
        piece.host,
    )
