"""The tokens that one layer holds under a policy: what it decided on, and what came since."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._decode import decode
from foveal._errors import CacheError
from foveal.caches.bitmap import BitmapCodec
from foveal.caches.codec import Codec
from foveal.caches.policies.base import Decision, Merge
from foveal.caches.policies.piece import Piece, tail
from foveal.caches.quantised import ScaledCodec
from foveal.compose import merge
from foveal.patterns import Causal, Dense
from foveal.scores import KeyBias, Score

# Queries up to which a call is a step of generation, not a piece of a prompt.
_FEW = 16


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
    def batch(self) -> int:
        """Sequences, 0 before the first token."""
        if self.tail_k is not None:
            return self.tail_k.shape[0]
        return len(self.pieces[0].counts) if self.pieces else 0

    @property
    def stored(self) -> int:
        """Tokens of the head that holds most."""
        if not self.pieces:
            return self.tail
        rows = [torch.tensor(piece.counts) for piece in self.pieces]
        return int(torch.stack(rows).sum(0).max()) + self.tail

    def bytes(self) -> int:
        """Bytes of keys, values, scales, bitmaps and positions, without what lies on the host."""
        own = sum(piece.bytes() for piece in self.pieces if not piece.host)
        return own + sum(
            x.numel() * x.element_size() for x in (self.tail_k, self.tail_v) if x is not None
        )

    def host_bytes(self) -> int:
        """Bytes of what lies on the host."""
        return sum(piece.bytes() for piece in self.pieces if piece.host)

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
        found = [
            decode(q, piece, score, pattern=Dense(), return_lse=True)
            for piece in self.pieces
            if not piece.idle
        ]
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
        if q.shape[1] > _FEW:
            return attend(q, self.tail_k, self.tail_v, Causal(), score, return_lse=True)
        return decode(q, tail(self.tail_k, self.tail_v), score, return_lse=True)

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
                own = (*piece.rows(start, stop), place)
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
        plain = Codec(k.shape[-1], k.dtype), Codec(v.shape[-1], v.dtype)
        less = _smaller(plain[0], decision.sparsity), _smaller(plain[1], decision.sparsity)
        kinds = (
            (keep & ~reduced & ~idle, plain, False),
            (reduced & ~idle, less, False),
            (idle, plain, True),
        )
        self.pieces = [
            Piece.of(mask, k, v, positions, codecs, idle=rests, host=rests and decision.host)
            for mask, codecs, rests in kinds
            if bool(mask.any())
        ]
        self.memo = None if decision.memo is None else _shorter(decision.memo, keep)
        self.tail_k = self.tail_v = self.tail_real = None

    def crop(self, count: int) -> None:
        """Drops the newest `count` tokens; CacheError where the policy has acted on them."""
        if count > self.tail:
            raise CacheError(
                "crop",
                count,
                f"at most the {self.tail} tokens since the policy acted can be dropped; assisted "
                "decoding, which takes tokens back, needs a budget that holds the text",
            )
        if count:
            assert self.tail_k is not None
            stop = self.tail - count
            self.tail_k, self.tail_v, self.tail_real = (
                x[:, :stop].clone() if x is not None and (stop or not self.pieces) else None
                for x in (self.tail_k, self.tail_v, self.tail_real)
            )
            self.seen -= count

    def earlier(self, count: int) -> Held:
        """What was held before the newest `count` tokens, on which the policy has not acted."""
        found = dataclasses.replace(self, pieces=list(self.pieces))
        found.crop(count)
        return found

    def reorder(self, index: Tensor) -> None:
        """Sequence b becomes what index[b] was; index int64 [any B]."""
        chosen = index.tolist()
        self.pieces = [piece.select(chosen) for piece in self.pieces]
        self.memo = None if self.memo is None else self.memo[index.to(self.memo.device)]
        if self.tail_k is not None:
            self.tail_k, self.tail_v, self.tail_real = (
                None if x is None else x[index.to(x.device)]
                for x in (self.tail_k, self.tail_v, self.tail_real)
            )


def _smaller(codec: Codec, sparsity: float) -> Codec:
    """How the rows of reduced tokens are kept: in 8 bits, or without a share of their elements."""
    if sparsity == 0:
        return ScaledCodec(codec.dim, codec.dtype, "fp8")
    # 0.29 x 100 is 28.999999999999996 in float64, and 29 is meant.
    kept = codec.dim - math.floor(round(sparsity * codec.dim, 9))
    return BitmapCodec(codec.dim, codec.dtype, kept)


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
