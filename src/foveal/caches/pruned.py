"""Old tokens keep their largest entries only; the newest stay whole."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from foveal._arguments import finite
from foveal._errors import CacheError
from foveal.caches.base import Cache, KVShape, Part, check_append, check_shape
from foveal.caches.bitmap import BitmapCodec
from foveal.caches.channels import ChannelCodec
from foveal.caches.checks import need_whole
from foveal.caches.paged import Paged

Storage = Literal["bitmap", "channels"]


class _Body(Paged):
    """Pages of pruned rows."""

    def __init__(
        self, shape: KVShape, kept: tuple[int, int], storage: Storage, pages: int, page_size: int
    ) -> None:
        codec = BitmapCodec if storage == "bitmap" else ChannelCodec
        keys = codec(shape.head_dim, shape.dtype, kept[0])
        values = codec(shape.values, shape.dtype, kept[1])
        self._build(shape, (keys, values), pages, page_size, False, None, False)


class Pruned(Cache):
    """Every key and value keeps its D - floor(sparsity D) largest entries, once it is old enough.

    Tokens are pruned in groups of `group` as soon as `recent` newer ones follow them; until then they
    are dense.  Training-free.
    Options: pages of 64 tokens for pruned rows; sparsity from 0 to below 1; recent and group tokens, group
    a multiple of 64; storage "bitmap" marks the channels of the entries that are kept with a bit per
    channel, "channels" names them with a byte per entry, which is larger and which a GPU spreads faster;
    None is "channels" on an NVIDIA GPU in bfloat16 and float16, where dimensions are multiples of 16 up
    to 256 and sparsity is at least 0.5.
    Cost: 2 (D - floor(s D)) + D / 8 bytes per row in place of 2 D, or 3 (D - floor(s D)): 0.375 or 0.47
    at s = 0.7 and D = 128.
    Limits: "bitmap" saves memory on a GPU and no time: it takes twice as long as whole rows, "channels" half
    as long.
    Equals: sparsity 0 is `Paged`, bit for bit in the reference.
    Paper: Mustafar (2505.22913); its code keeps one entry more per row and lays keys out by channel.
    """

    PAGE = 64

    def __init__(
        self,
        shape: KVShape,
        *,
        pages: int,
        sparsity: float = 0.7,
        recent: int = 32,
        group: int = 256,
        storage: Storage | None = None,
    ) -> None:
        check_shape(shape)
        if not finite(sparsity) or not 0 <= sparsity < 1:
            raise CacheError("sparsity", sparsity, "a number from 0 to below 1 is needed")
        need_whole(1, group=group)
        need_whole(0, recent=recent)
        if storage is None:
            storage = "channels" if _suits_channels(shape, sparsity) else "bitmap"
        if storage not in ("bitmap", "channels"):
            raise CacheError("storage", storage, '"bitmap" or "channels" is needed')
        if storage == "channels" and max(shape.head_dim, shape.values) > 256:
            raise CacheError("storage", storage, "dimensions of at most 256 are needed")
        if group % self.PAGE:
            raise CacheError("group", group, f"a multiple of {self.PAGE} is needed")
        self.shape, self.recent, self.group = shape, recent, group
        kept = tuple(max(d - math.floor(sparsity * d), 1) for d in (shape.head_dim, shape.values))
        self.body: Paged = _Body(shape, (kept[0], kept[1]), storage, pages, self.PAGE)
        room = -(-(recent + 2 * group) // self.PAGE) + 1
        self.tail = Paged(shape, pages=shape.batch * room, page_size=self.PAGE)
        self._room = recent + 2 * group

    @property
    def lengths(self) -> Tensor:
        return self.body.lengths + self.tail.lengths

    @property
    def seen(self) -> Tensor:
        return self.tail.seen

    @property
    def host_lengths(self) -> list[list[int]]:
        both = zip(self.body.host_lengths, self.tail.host_lengths, strict=True)
        return [[a[0] + b[0]] for a, b in both]

    @property
    def host_seen(self) -> list[int]:
        return self.tail.host_seen

    def append(
        self,
        k: Tensor,
        v: Tensor,
        *,
        counts: Sequence[int] | None = None,
        last: bool = False,
        bias: Tensor | None = None,
    ) -> None:
        check_append(self.shape, k, v, counts, bias)
        if bias is not None:
            raise CacheError("bias", "a tensor", "none is needed: pruned rows keep no weight")
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self.tail.append(k, v)
            return
        given = [k.shape[1]] * self.shape.batch if counts is None else list(counts)
        self._reserve(given)
        if last:
            k, v = (_first(x, [k.shape[1] - n for n in given]) for x in (k, v))
        place = 0
        while place < k.shape[1]:
            step = min(k.shape[1] - place, self._room - max(n for (n,) in self.tail.host_lengths))
            rows = slice(place, place + step)
            part = [min(max(n - place, 0), step) for n in given]
            self.tail.append(k[:, rows], v[:, rows], counts=part)
            place += step
            self._prune()

    def _reserve(self, given: list[int]) -> None:
        """Takes the pages of pruned rows beforehand: an append that fails changes nothing."""
        lengths = [a + n for (a,), n in zip(self.tail.host_lengths, given, strict=True)]
        self.body.reserve([self._old(n) for n in lengths])

    def _old(self, length: int) -> int:
        return max(length - self.recent, 0) // self.group * self.group

    def _prune(self) -> None:
        """Moves whole groups of old tokens from the tail to the body."""
        moved = [self._old(n) for (n,) in self.tail.host_lengths]
        if any(moved):
            k, v = self.tail.dense()
            self.body.append(k[:, : max(moved)], v[:, : max(moved)], counts=moved)
            self.tail.drop_first([[n] for n in moved])

    def prepare(self, tokens: int = 1) -> None:
        need_whole(0, tokens=tokens)
        self._reserve([tokens] * self.shape.batch)
        self._prune()
        self.tail.prepare(tokens)

    def free(self, sequences: Sequence[int] | None = None) -> None:
        self.body.free(sequences)
        self.tail.free(sequences)

    def keep(self, indices: Tensor) -> None:
        raise CacheError(
            "indices", "an eviction", "none is needed: pruning drops entries, not tokens"
        )

    def dense(self) -> tuple[Tensor, Tensor]:
        old, new = self.body.dense(), self.tail.dense()
        lengths = [n for (n,) in self.host_lengths]
        found = []
        for a, b in zip(old, new, strict=True):
            x = a.new_zeros(a.shape[0], max(lengths), *a.shape[2:])
            for i, ((n,), (m,)) in enumerate(
                zip(self.body.host_lengths, self.tail.host_lengths, strict=True)
            ):
                x[i, :n], x[i, n : n + m] = a[i, :n], b[i, :m]
            found.append(x)
        return found[0], found[1]

    def bytes(self) -> int:
        return self.body.bytes() + self.tail.bytes()

    def capacity_bytes(self) -> int:
        return self.body.capacity_bytes() + self.tail.capacity_bytes()

    def parts(self) -> tuple[Part, ...]:
        after = self.tail.lengths[:, 0]
        body = dataclasses.replace(
            self.body.view(), seen=self.tail.seen, after=after, behind=self.recent
        )
        return Part(body), Part(self.tail.view())


def _suits_channels(shape: KVShape, sparsity: float) -> bool:
    return (
        torch.device(shape.device).type == "cuda"
        and torch.version.hip is None
        and shape.dtype in (torch.bfloat16, torch.float16)
        and all(d % 16 == 0 and d <= 256 for d in (shape.head_dim, shape.values))
        and sparsity >= 0.5
    )


def _first(x: Tensor, skipped: list[int]) -> Tensor:
    """Rows [B, L, ...] moved so that row skipped[b] comes first."""
    return torch.stack([row.roll(-n, 0) for row, n in zip(x, skipped, strict=True)])
