"""Old pages on the host, the chosen ones of them and all new tokens on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from foveal._errors import CacheError, OutOfPagesError
from foveal.caches.base import Cache, KVShape, Part, check_append, check_shape
from foveal.caches.checks import need_places, need_whole, sequence_numbers, whole_numbers
from foveal.caches.codec import Codec
from foveal.caches.paged import Paged
from foveal.caches.slots import Slots
from foveal.caches.view import Columns, View

_PIECE = 256  # tokens of a prompt that come to the device at a time, at least


class Offloaded(Cache):
    """The newest `recent` tokens stay on the device; older ones live in pages on the host.

    `select` names the old pages that the next decodes read, per sequence or per key head; those that are
    not on the device yet are copied there, in place of the ones that were not named for longest.
    `prefetch` does the copying beside whatever else the device does.  `host_keys` are the old keys,
    for selectors that summarise them.  `fetched` counts the pages that the last call copied to the device,
    `fetched_bytes` and `stored_bytes` all bytes that ever went there and to the host.  `grow` makes room for
    longer sequences, `crop` takes the newest tokens back, `reorder` exchanges sequences.
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
        check_shape(shape)
        need_whole(1, max_tokens=max_tokens, slots=slots, page_size=page_size)
        need_whole(0, recent=recent)
        self.shape, self.page_size, self.recent = shape, page_size, recent
        self._most = -(-max_tokens // page_size)
        device = torch.device(shape.device)
        self._room = recent + max(2 * page_size, _PIECE)
        room = -(-self._room // page_size) + 1
        self.near = Paged(shape, pages=shape.batch * room, page_size=page_size, biased=biased)
        self._kinds = [(shape.head_dim, shape.dtype), (shape.values, shape.dtype)]
        self._kinds += [(1, torch.float32)] * biased
        self._host = self._host_rows()
        self._pages = [0] * shape.batch
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._page_bytes = page_size * sum(dim * dtype.itemsize for dim, dtype in self._kinds)
        self.fetched = self.fetched_bytes = self.stored_bytes = 0
        self._take_slots(slots)

    def _host_rows(self) -> list[Tensor]:
        """Empty rows on the host: keys, values, weights, each [batch, kv_heads, pages, page, width]."""
        size = (self.shape.batch, self.shape.kv_heads, self._most, self.page_size)
        pinned = torch.device(self.shape.device).type == "cuda"
        return [
            torch.zeros(*size, dim, dtype=dtype, device="cpu", pin_memory=pinned)
            for dim, dtype in self._kinds
        ]

    def _take_slots(self, slots: int) -> None:
        """Empty slots on the device for pages of the host."""
        batch, heads, device = self.shape.batch, self.shape.kv_heads, self.shape.device
        rows = batch * heads * slots * self.page_size
        self.slots = slots
        self._columns = [
            torch.zeros(rows, dim, dtype=dtype, device=device) for dim, dtype in self._kinds
        ]
        self._positions = torch.zeros(rows, dtype=torch.int32, device=device)
        self._table = torch.zeros(batch, heads, slots, dtype=torch.int32, device=device)
        self._far = torch.zeros(batch, heads, dtype=torch.int32, device=device)
        self._host_far = [[0] * heads for _ in range(batch)]
        self._there = Slots(batch * heads, slots, self._most)
        # Pages that decodes read, of every sequence and head, -1 for none.
        self._read = torch.zeros(batch * heads, 0, dtype=torch.int64, device="cpu")

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
        given = [k.shape[1]] * self.shape.batch if counts is None else [int(n) for n in counts]
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
        wanted = self._wanted(pages)
        self._fetch(wanted)
        if self._side is not None:
            torch.cuda.current_stream(self._table.device).wait_stream(self._side)
        self._read, named = wanted, wanted >= 0
        first = torch.arange(len(wanted), device="cpu")[:, None] * self.slots
        table = torch.zeros(self._table.shape, dtype=torch.int32, device="cpu")
        places = torch.where(named, first + self._there.slots_of(wanted), 0)
        table.flatten(0, 1)[:, : wanted.shape[1]] = places
        self._table.copy_(table)
        tokens = named.sum(1) * self.page_size
        self._host_far = tokens.view(self.shape.batch, -1).tolist()
        self._upload_far()

    def _upload_far(self) -> None:
        self._far.copy_(torch.tensor(self._host_far, dtype=torch.int32, device="cpu"))

    def prefetch(self, pages: Tensor) -> None:
        """Copies old pages to the device beside its other work; `select` then finds them there.

        Shapes: as for `select`.
        Limits: what is read now stays; there must be slots for both.
        """
        wanted = self._wanted(pages)
        marks = torch.zeros(len(wanted), self._most + 1, dtype=torch.bool, device="cpu")
        marks.scatter_(1, torch.where(wanted < 0, self._most, wanted), True)
        stays = torch.where(marks.gather(1, self._read.clamp(min=0)), -1, self._read)
        read = (self._read >= 0).sum(1)
        together = (wanted >= 0).sum(1) + (stays >= 0).sum(1)
        if (together > self.slots).any():
            unit = int(together.argmax())
            more, left = int(together[unit] - read[unit]), self.slots - int(read[unit])
            raise OutOfPagesError(more, left, self.slots, self.page_size)
        self._fetch(torch.cat((wanted, stays), dim=1))

    def _wanted(self, pages: Tensor) -> Tensor:
        """int64 [batch kv_heads, n] on the host: ascending, -1 behind them."""
        heads = self.shape.kv_heads
        need_places(pages=pages)
        if (
            pages.dim() != 3
            or pages.shape[0] != self.shape.batch
            or pages.shape[1] not in (1, heads)
        ):
            raise CacheError(
                "pages", list(pages.shape), f"[{self.shape.batch}, 1 or {heads}, n] is needed"
            )
        rows = pages.to("cpu", torch.int64).expand(-1, heads, -1).flatten(0, 1)
        none = torch.iinfo(torch.int64).max
        ordered = torch.where(rows < 0, none, rows).sort(dim=1).values
        named = ordered < none
        count = named.sum(1)
        most = torch.tensor(self._pages, device="cpu").repeat_interleave(heads)[:, None]
        wrong = (named & (ordered >= most)).any(1) | (count > self.slots)
        wrong |= (named[:, 1:] & (ordered[:, 1:] == ordered[:, :-1])).any(1)
        if wrong.any():
            unit = int(wrong.nonzero()[0])
            raise CacheError(
                "pages",
                [page for page in rows[unit].tolist() if page >= 0],
                f"at most {self.slots} different pages below {int(most[unit])} are needed",
            )
        return torch.where(named, ordered, -1)[:, : int(count.max())]

    def _fetch(self, wanted: Tensor) -> None:
        """Brings pages to the device, those that are not there."""
        unit, page, slot = self._there.place(wanted)
        self.fetched = len(unit)
        self.fetched_bytes += self.fetched * self._page_bytes
        if not self.fetched:
            return
        if self._side is None:
            self._copy(unit, page, slot)
            return
        self._side.wait_stream(torch.cuda.current_stream(self._table.device))
        with torch.cuda.stream(self._side):
            self._copy(unit, page, slot)

    def _copy(self, unit: Tensor, page: Tensor, slot: Tensor) -> None:
        slots = self._uploaded(unit * self.slots + slot)
        for held, column in zip(self._host, self._columns, strict=True):
            pages = column.view(-1, self.page_size, column.shape[1])
            pages.index_copy_(0, slots, self._uploaded(held.flatten(0, 1)[unit, page]))
        first = (page * self.page_size).to(torch.int32)[:, None]
        places = first + torch.arange(self.page_size, dtype=torch.int32, device="cpu")
        self._positions.view(-1, self.page_size).index_copy_(0, slots, self._uploaded(places))

    def _uploaded(self, x: Tensor) -> Tensor:
        """On the device; the host does not wait for it, as it would where x is not pinned."""
        x = x if self._side is None else x.pin_memory()
        return x.to(self._table.device, non_blocking=True)

    def prepare(self, tokens: int = 1) -> None:
        self._move()
        self.near.prepare(tokens)

    def free(self, sequences: Sequence[int] | None = None) -> None:
        self.near.free(sequences)
        for b in range(self.shape.batch) if sequences is None else sequences:
            self._pages[b] = 0
            self._leave(b)
        self._upload_far()

    def _leave(self, sequence: int) -> None:
        """A sequence has no page on the device any more."""
        heads = self.shape.kv_heads
        self._host_far[sequence] = [0] * heads
        units = slice(sequence * heads, (sequence + 1) * heads)
        self._there.clear(units)
        self._read[units] = -1

    def grow(self, max_tokens: int) -> None:
        """Makes room on the host for sequences of `max_tokens` tokens; what is there is copied once."""
        need_whole(1, max_tokens=max_tokens)
        had, self._most = self._most, max(-(-max_tokens // self.page_size), self._most)
        if self._most > had:
            self._there.grow(self._most)
            rows = self._host_rows()
            for new, old in zip(rows, self._host, strict=True):
                new[:, :, :had] = old
            self._host = rows

    def crop(self, seen: int | Sequence[int]) -> None:
        """Forgets the newest tokens: sequence b has then seen `seen[b]` (or `seen`) tokens, if it had more.

        Pages that are new again come back from the host; what was chosen there is fetched again.
        """
        batch = self.shape.batch
        wanted = [seen] * batch if isinstance(seen, int) else whole_numbers("seen", seen, batch)
        if min(wanted) < 0:
            raise CacheError("seen", seen, "at least 0 is needed")
        for b, (had, n) in enumerate(zip(self.host_seen, wanted, strict=True)):
            pages = max(n - self.recent, 0) // self.page_size
            if n < had and pages < self._pages[b]:
                self._bring_back(b, n, pages)
        self.near.crop(wanted)
        self._upload_far()

    def _bring_back(self, sequence: int, seen: int, pages: int) -> None:
        """A sequence as it was at `seen` tokens, when `pages` of it were on the host."""
        here = seen - pages * self.page_size
        rows = []
        for held, near in zip(self._host, self._near_rows(), strict=True):
            old = held[sequence, :, pages : self._pages[sequence]].flatten(1, 2).to(near.device)
            joined = torch.cat((old, near[sequence]), dim=1)[:, :here].transpose(0, 1)
            rows.append(joined.expand(self.shape.batch, *joined.shape))
        counts = [0] * self.shape.batch
        counts[sequence] = here
        self.near.free([sequence])
        self.near.append(rows[0], rows[1], counts=counts, bias=_weights(rows))
        self.near.pass_by(sequence, pages * self.page_size)
        self._pages[sequence] = pages
        self._leave(sequence)

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Sequence b becomes what sequence index[b] was (beam search): its pages on the host are copied."""
        order = sequence_numbers("index", index, self.shape.batch)
        self.near.reorder(order)
        moved = [b for b, source in enumerate(order) if b != source]
        source = [order[b] for b in moved]
        for rows in self._by_sequence():
            rows[moved] = rows[source]
        self._pages = [self._pages[b] for b in order]
        for b in moved:
            self._leave(b)
        self._upload_far()

    def _by_sequence(self) -> list[Tensor]:
        """What is kept of every sequence beside its new tokens, each [batch, ...]."""
        return [*self._host, *self._summaries()]

    def _summaries(self) -> list[Tensor]:
        """What is kept on the device of old tokens, each [batch, ...]."""
        return []

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
        """Bytes on the device: all slots, the new tokens, and what is kept there of old ones."""
        slots = sum(x.nbytes for x in (*self._columns, self._positions))
        return self.near.bytes() + slots + self.summary_bytes()

    def summary_bytes(self) -> int:
        """Bytes on the device by which old pages are chosen; they grow with the sequences."""
        return 0

    def host_bytes(self) -> int:
        """Bytes of the pages in use on the host."""
        return sum(self._pages) * self.shape.kv_heads * self._page_bytes

    def capacity_bytes(self) -> int:
        """Bytes taken from the device."""
        own = (*self._columns, self._positions, self._table, *self._summaries())
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


def _weights(rows: Sequence[Tensor]) -> Tensor | None:
    """The third kind of rows, [batch, L, heads], where a cache keeps it."""
    return rows[2][..., 0] if len(rows) > 2 else None
