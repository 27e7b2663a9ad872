"""Old pages on the host, the chosen ones of them and all new tokens on the device."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from foveal._errors import CacheError, OutOfPagesError
from foveal.caches.base import Cache, KVShape, Part, check_append
from foveal.caches.codec import Codec
from foveal.caches.paged import Paged
from foveal.caches.view import Columns, View

_PIECE = 256  # tokens of a prompt that come to the device at a time, at least


class Offloaded(Cache):
    """The newest `recent` tokens stay on the device; older ones live in pages on the host.

    `select` names the old pages that the next decodes read, per sequence or per key head; those that are
    not on the device yet are copied there, in place of the ones that were not named for longest.
    `prefetch` does the copying beside whatever else the device does.  `host_keys` are the old keys,
    for selectors that summarise them.  `fetched` counts the pages that the last call copied to the device,
    `fetched_bytes` and `stored_bytes` all bytes that ever went there and to the host.
    Options: max_tokens of a sequence on the host; slots, pages per sequence and head on the device;
    page_size tokens; recent tokens, at least; biased keeps a logarithmic weight per key.
    Limits: `keep` is refused: what is not selected is not read, and nothing is dropped.  A write that
    fails on the way has stored a first part of a long prompt, which `host_seen` counts.
    Equals: with all pages selected, `Paged`.
    Paper: RetrievalAttention (2409.10516), LouisKV (2510.11292), NOSA (2510.13602): their tier;
    `compose.RetrievalCache`, `compose.LouisCache` and `compose.NosaCache` choose the pages.
    """

    def __init__(
        self,
        shape: KVShape,
        *,
        max_tokens: int,
        slots: int,
        page_size: int = 64,
        recent: int = 256,
        biased: bool = False,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("slots", slots), ("page_size", page_size)):
            if isinstance(value, bool) or value < 1:
                raise CacheError(name, value, "an integer of at least 1 is needed")
        if isinstance(recent, bool) or recent < 0:
            raise CacheError("recent", recent, "an integer of at least 0 is needed")
        self.shape, self.page_size, self.slots, self.recent = shape, page_size, slots, recent
        self._most = -(-max_tokens // page_size)
        device = torch.device(shape.device)
        pinned = device.type == "cuda"
        self._room = recent + max(2 * page_size, _PIECE)
        room = -(-self._room // page_size) + 1
        self.near = Paged(shape, pages=shape.batch * room, page_size=page_size, biased=biased)
        size = (shape.batch, shape.kv_heads, self._most, page_size)
        kinds = [(shape.head_dim, shape.dtype), (shape.values, shape.dtype)]
        kinds += [(1, torch.float32)] * biased
        self._host = [
            torch.zeros(*size, dim, dtype=dtype, pin_memory=pinned) for dim, dtype in kinds
        ]
        units = shape.batch * shape.kv_heads
        self._columns = [
            torch.zeros(units * slots * page_size, dim, dtype=dtype, device=device)
            for dim, dtype in kinds
        ]
        self._positions = torch.zeros(units * slots * page_size, dtype=torch.int32, device=device)
        self._table = torch.zeros(
            shape.batch, shape.kv_heads, slots, dtype=torch.int32, device=device
        )
        self._far = torch.zeros(shape.batch, shape.kv_heads, dtype=torch.int32, device=device)
        self._host_far = [[0] * shape.kv_heads for _ in range(shape.batch)]
        self._pages = [0] * shape.batch
        # For every sequence and head: page on the host -> slot, the one named last at the end.
        self._there: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(units)]
        self._side = torch.cuda.Stream(device) if pinned else None
        self._page_bytes = page_size * sum(dim * dtype.itemsize for dim, dtype in kinds)
        self.fetched = self.fetched_bytes = self.stored_bytes = 0

    @property
    def host_keys(self) -> Tensor:
        """[batch, kv_heads, pages, page_size, head_dim]: old keys; nothing behind `host_pages`."""
        return self._host[0]

    @property
    def host_values(self) -> Tensor:
        """[batch, kv_heads, pages, page_size, value_dim]: old values."""
        return self._host[1]

    @property
    def lengths(self) -> Tensor:
        """int32 [batch, kv_heads]: tokens that a decode reads, chosen pages and new tokens."""
        return self._far + self.near.lengths

    @property
    def seen(self) -> Tensor:
        return self.near.seen

    @property
    def host_lengths(self) -> list[list[int]]:
        both = zip(self._host_far, self.near.host_lengths, strict=True)
        return [[n + near for n in far] for far, (near,) in both]

    @property
    def host_seen(self) -> list[int]:
        return self.near.host_seen

    @property
    def host_pages(self) -> list[int]:
        """Pages of every sequence on the host."""
        return list(self._pages)

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
        if last:
            raise CacheError("last", last, "the first rows are stored: roll those that are padded")
        if bias is not None and len(self._host) == 2:
            raise CacheError("bias", "a tensor", "a cache built with biased=True is needed")
        given = [k.shape[1]] * self.shape.batch if counts is None else list(counts)
        for b, n in enumerate(given):
            old = self._old(self.near.host_lengths[b][0] + n)
            if self._pages[b] + old > self._most:
                raise OutOfPagesError(old, self._most - self._pages[b], self._most, self.page_size)
        place = 0
        while place < k.shape[1]:
            step = min(k.shape[1] - place, self._room - max(n for (n,) in self.near.host_lengths))
            rows = slice(place, place + step)
            part = [min(max(n - place, 0), step) for n in given]
            own = None if bias is None else bias[:, rows]
            self.near.append(k[:, rows], v[:, rows], counts=part, bias=own)
            place += step
            self._move()

    def _old(self, length: int) -> int:
        """Whole pages before the newest `recent` of `length` tokens."""
        return max(length - self.recent, 0) // self.page_size

    def _move(self) -> None:
        """Copies pages that are old to the host and gives their room back."""
        moved = [self._old(n) for (n,) in self.near.host_lengths]
        if not any(moved):
            return
        size = self.page_size
        for held, rows in zip(self._host, self._near_rows(), strict=True):
            for b, n in enumerate(moved):
                pages = rows[b, :, : n * size].unflatten(1, (n, size))
                held[b, :, self._pages[b] : self._pages[b] + n].copy_(pages)
        self._pages = [had + n for had, n in zip(self._pages, moved, strict=True)]
        self.stored_bytes += sum(moved) * self.shape.kv_heads * self._page_bytes
        self.near.drop_first([[n * size] for n in moved])

    def _near_rows(self) -> list[Tensor]:
        """Keys, values and weights of the new tokens, each [batch, kv_heads, L, width]."""
        rows = [x.transpose(1, 2) for x in self.near.dense()]
        view = self.near.view()
        if view.bias is None:
            return rows
        tokens = torch.arange(rows[0].shape[2], device=self._table.device)
        inside = tokens < view.lengths[..., None]
        slots = torch.where(inside, view.slots(tokens[None, None]), 0)
        return [*rows, view.bias[slots][..., None]]

    def select(self, pages: Tensor) -> None:
        """The old pages that decodes read from now on.

        Shapes: pages [batch, 1 or kv_heads, n] numbers of pages on the host, n <= slots, -1 for none.
        """
        lists = self._wanted(pages)
        self._fetch(lists)
        if self._side is not None:
            torch.cuda.current_stream(self._table.device).wait_stream(self._side)
        table = torch.zeros(self._table.shape, dtype=torch.int32)
        for unit, wanted in enumerate(lists):
            b, h = divmod(unit, self.shape.kv_heads)
            there = self._there[unit]
            slots = [unit * self.slots + there[page] for page in sorted(wanted)]
            table[b, h, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
            self._host_far[b][h] = len(slots) * self.page_size
        self._table.copy_(table)
        self._far.copy_(torch.tensor(self._host_far, dtype=torch.int32))

    def prefetch(self, pages: Tensor) -> None:
        """Copies old pages to the device beside its other work; `select` then finds them there.

        Shapes: as for `select`.
        Limits: what is read now stays; there must be slots for both.
        """
        lists = self._wanted(pages)
        for unit, wanted in enumerate(lists):
            b, h = divmod(unit, self.shape.kv_heads)
            read = self._host_far[b][h] // self.page_size
            newest = list(self._there[unit])[len(self._there[unit]) - read :]
            together = len({*newest, *wanted})
            if together > self.slots:
                raise OutOfPagesError(
                    together - read, self.slots - read, self.slots, self.page_size
                )
            lists[unit] = [*wanted, *(page for page in newest if page not in wanted)]
        self._fetch(lists)

    def _wanted(self, pages: Tensor) -> list[list[int]]:
        heads = self.shape.kv_heads
        if (
            pages.dim() != 3
            or pages.shape[0] != self.shape.batch
            or pages.shape[1] not in (1, heads)
        ):
            raise CacheError(
                "pages", list(pages.shape), f"[{self.shape.batch}, 1 or {heads}, n] is needed"
            )
        lists = [
            [page for page in row if page >= 0]
            for rows in pages.expand(-1, heads, -1).tolist()
            for row in rows
        ]
        for unit, row in enumerate(lists):
            most = self._pages[unit // heads]
            if len(row) > self.slots or len(set(row)) < len(row) or any(p >= most for p in row):
                raise CacheError(
                    "pages",
                    row,
                    f"at most {self.slots} different pages below {most} are needed",
                )
        return lists

    def _fetch(self, lists: Sequence[Sequence[int]]) -> None:
        """Brings pages to the device, each in a free slot or that of the page named longest ago."""
        source: list[tuple[int, int, int]] = []
        target: list[int] = []
        for unit, wanted in enumerate(lists):
            there = self._there[unit]
            for page in wanted:
                if page in there:
                    there.move_to_end(page)
            for page in wanted:
                if page in there:
                    continue
                if len(there) < self.slots:
                    slot = len(there)
                else:
                    _, slot = there.popitem(last=False)
                there[page] = slot
                source.append((*divmod(unit, self.shape.kv_heads), page))
                target.append(unit * self.slots + slot)
        self.fetched = len(source)
        self.fetched_bytes += len(source) * self._page_bytes
        if not source:
            return
        if self._side is None:
            self._copy(source, target)
            return
        self._side.wait_stream(torch.cuda.current_stream(self._table.device))
        with torch.cuda.stream(self._side):
            self._copy(source, target)

    def _copy(self, source: Sequence[tuple[int, int, int]], target: Sequence[int]) -> None:
        b, h, page = torch.tensor(source).T
        device = self._table.device
        slots = torch.tensor(target).to(device, non_blocking=True)
        for held, column in zip(self._host, self._columns, strict=True):
            rows = held[b, h, page]
            rows = rows.pin_memory() if self._side is not None else rows
            pages = column.view(-1, self.page_size, column.shape[1])
            pages.index_copy_(0, slots, rows.to(device, non_blocking=True))
        first = (page * self.page_size).to(torch.int32)[:, None]
        places = first + torch.arange(self.page_size, dtype=torch.int32)
        self._positions.view(-1, self.page_size).index_copy_(0, slots, places.to(device))

    def prepare(self, tokens: int = 1) -> None:
        self._move()
        self.near.prepare(tokens)

    def free(self, sequences: Sequence[int] | None = None) -> None:
        self.near.free(sequences)
        chosen = range(self.shape.batch) if sequences is None else sequences
        for b in chosen:
            self._pages[b] = 0
            self._host_far[b] = [0] * self.shape.kv_heads
            for h in range(self.shape.kv_heads):
                self._there[b * self.shape.kv_heads + h].clear()
        self._far.copy_(torch.tensor(self._host_far, dtype=torch.int32))

    def keep(self, indices: Tensor) -> None:
        raise CacheError("indices", "an eviction", "select() instead: nothing is dropped here")

    def dense(self) -> tuple[Tensor, Tensor]:
        """All tokens, those on the host too."""
        device = self._table.device
        found = []
        for held, near in zip(self._host, self.near.dense(), strict=False):
            rows = []
            for b, n in enumerate(self._pages):
                old = held[b, :, :n].flatten(1, 2).transpose(0, 1).to(device)
                rows.append(torch.cat((old, near[b, : self.near.host_lengths[b][0]])))
            found.append(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        return found[0], found[1]

    def bytes(self) -> int:
        """Bytes on the device: all slots, and the new tokens."""
        return self.near.bytes() + sum(x.nbytes for x in (*self._columns, self._positions))

    def host_bytes(self) -> int:
        """Bytes of the pages in use on the host."""
        return sum(self._pages) * self.shape.kv_heads * self._page_bytes

    def capacity_bytes(self) -> int:
        """Bytes taken from the device."""
        own = (*self._columns, self._positions, self._table)
        return self.near.capacity_bytes() + sum(x.nbytes for x in own)

    def parts(self) -> tuple[Part, ...]:
        codecs = (
            Codec(self.shape.head_dim, self.shape.dtype),
            Codec(self.shape.values, self.shape.dtype),
        )
        seen, near = self.near.seen, self.near.view()
        far = View(
            lengths=self._far,
            host_lengths=self._host_far,
            seen=seen,
            page_table=self._table,
            page_size=self.page_size,
            steps=(self.page_size, 0, 1),
            kv_heads=self.shape.kv_heads,
            keys=Columns(codecs[0], (self._columns[0],)),
            values=Columns(codecs[1], (self._columns[1],)),
            value_dim=self.shape.values,
            bias=self._columns[2].view(-1) if len(self._columns) > 2 else None,
            positions=self._positions,
            after=self.near.lengths[:, 0],
        )
        return Part(far), Part(dataclasses.replace(near, seen=seen))
