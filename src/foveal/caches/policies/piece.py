"""What a layer holds under a policy, as caches that the decode engine reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveal._errors import CacheError
from foveal.caches.base import Cache, KVShape, Part
from foveal.caches.codec import Codec
from foveal.caches.view import Columns, View


class Rows(Cache):
    """Rows of keys and values as they lie in memory; nothing is appended and nothing leaves."""

    def __init__(self, shape: KVShape, view: View) -> None:
        self.shape, self._view = shape, view

    @property
    def lengths(self) -> Tensor:
        return self._view.lengths

    @property
    def seen(self) -> Tensor:
        return self._view.seen

    @property
    def host_lengths(self) -> list[list[int]]:
        return self._view.host_lengths

    @property
    def host_seen(self) -> list[int]:
        return [max(row) for row in self._view.host_lengths]

    def append(self, k: Tensor, v: Tensor, **options: Any) -> None:
        raise CacheError("k", "new tokens", "a cache that takes them is needed")

    def prepare(self, tokens: int = 1) -> None:
        raise CacheError("tokens", tokens, "a cache that takes them is needed")

    def free(self, sequences: Sequence[int] | None = None) -> None:
        raise CacheError("sequences", sequences, "the rows themselves must be let go of")

    def keep(self, indices: Tensor) -> None:
        raise CacheError("indices", "an eviction", "another decision of the policy is needed")

    def dense(self) -> tuple[Tensor, Tensor]:
        longest = torch.arange(max(self.host_seen), device=self.shape.device)
        stored = (longest < self._view.lengths[..., None]).expand(-1, self.shape.kv_heads, -1)
        slots = torch.where(stored, self._view.slots(longest[None, None]), 0)
        k, v = (x.read(slots, self.shape.dtype) for x in self.columns)
        k, v = (x.masked_fill(~stored[..., None], 0).transpose(1, 2) for x in (k, v))
        return k, v

    @property
    def columns(self) -> tuple[Columns, Columns]:
        """Keys and values as they are kept."""
        assert self._view.values is not None
        return self._view.keys, self._view.values

    def bytes(self) -> int:
        tensors = (x for columns in self.columns for x in columns.tensors)
        return sum(x.numel() * x.element_size() for x in tensors)

    def capacity_bytes(self) -> int:
        return self.bytes()

    def parts(self) -> tuple[Part, ...]:
        return (Part(self._view),)


def tail(k: Tensor, v: Tensor) -> Rows:
    """Tokens k [B, T, Hkv, D], v [B, T, Hkv, Dv] as they came, in place."""
    B, T, heads, _ = k.shape
    shape = KVShape(B, heads, k.shape[3], v.shape[3], dtype=k.dtype, device=k.device)
    keys, values = (
        Columns(Codec(x.shape[-1], x.dtype), (x.reshape(-1, x.shape[-1]),)) for x in (k, v)
    )
    first = torch.arange(B, dtype=torch.int32, device=k.device) * (T * heads)
    length = torch.full((B,), T, dtype=torch.int32, device=k.device)
    view = View(
        lengths=length[:, None],
        host_lengths=[[T]] * B,
        seen=length,
        page_table=first[:, None, None],
        page_size=max(T, 1),
        steps=(1, 1, heads),
        kv_heads=heads,
        keys=keys,
        values=values,
        value_dim=v.shape[3],
        guarded=True,
    )
    return Rows(shape, view)


class Piece(Rows):
    """Some tokens of every sequence and head, kept alike, in order of time.

    The rows of a head are one run, the runs of all heads one piece of memory without room between them:
    counts[b][h] rows for head h of sequence b, as `codecs` keep keys and values.
    positions int32 [sum of counts].  idle: not attended to; host: in the memory of the host.
    """

    def __init__(
        self,
        shape: KVShape,
        counts: Sequence[Sequence[int]],
        keys: Columns,
        values: Columns,
        positions: Tensor,
        *,
        idle: bool = False,
        host: bool = False,
    ) -> None:
        self.counts = tuple(tuple(row) for row in counts)
        self.positions, self.idle, self.host = positions, idle, host
        super().__init__(shape, _view(shape, self.counts, keys, values))

    @classmethod
    def of(
        cls,
        mask: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        codecs: tuple[Codec, Codec],
        *,
        idle: bool = False,
        host: bool = False,
    ) -> Piece:
        """The tokens marked in `mask` [B, Hkv, L] of k [B, Hkv, L, D], v [B, Hkv, L, Dv], positions."""
        device = torch.device("cpu") if host else k.device
        B, heads, _, head_dim = k.shape
        shape = KVShape(B, heads, head_dim, v.shape[3], dtype=k.dtype, device=device)
        keys, values = (
            Columns(codec, codec.encode(x[mask].to(device)))
            for codec, x in zip(codecs, (k, v), strict=True)
        )
        places = positions[mask].to(device, torch.int32)
        return cls(shape, mask.sum(-1).tolist(), keys, values, places, idle=idle, host=host)

    def select(self, sequences: Sequence[int]) -> Piece:
        """The sequences named, in this order; one may be named several times."""
        runs = self.runs()
        heads = self.shape.kv_heads
        chosen = [run for b in sequences for run in runs[b * heads : (b + 1) * heads]]
        rows = torch.cat([torch.arange(start, stop) for _, _, start, stop in chosen])
        rows = rows.to(self.positions.device)
        keys, values = (
            Columns(x.codec, tuple(column[rows] for column in x.tensors)) for x in self.columns
        )
        shape = dataclasses.replace(self.shape, batch=len(sequences))
        counts = [self.counts[b] for b in sequences]
        own = {"idle": self.idle, "host": self.host}
        return Piece(shape, counts, keys, values, self.positions[rows], **own)

    def runs(self) -> list[tuple[int, int, int, int]]:
        """(sequence, head, first row, row behind the last) of every head."""
        found, start = [], 0
        for b, row in enumerate(self.counts):
            for h, count in enumerate(row):
                found.append((b, h, start, start + count))
                start += count
        return found

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """k [stop - start, D] and v [stop - start, Dv] of these rows."""
        slots = torch.arange(start, stop, device=self.positions.device)
        k, v = (x.read(slots, self.shape.dtype) for x in self.columns)
        return k, v

    def bytes(self) -> int:
        """Bytes of keys, values, scales, bitmaps and positions."""
        return super().bytes() + self.positions.numel() * self.positions.element_size()


def _view(
    shape: KVShape, counts: tuple[tuple[int, ...], ...], keys: Columns, values: Columns
) -> View:
    lengths = torch.tensor(counts, dtype=torch.int32)
    ends = lengths.flatten().cumsum(0).view_as(lengths)
    longest = lengths.amax(-1)
    device = shape.device
    return View(
        lengths=lengths.to(device),
        host_lengths=[list(row) for row in counts],
        seen=longest.to(device, torch.int32),
        page_table=(ends - lengths)[..., None].to(device, torch.int32),
        page_size=max(int(longest.max()), 1),
        steps=(1, 0, 1),
        kv_heads=shape.kv_heads,
        keys=keys,
        values=values,
        value_dim=shape.values,
        guarded=True,
    )
