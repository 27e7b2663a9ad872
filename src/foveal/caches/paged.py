"""Tokens in pages of equal size, taken from one pool as sequences grow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from foveal._capture import capturing
from foveal._errors import CacheError, DeviceError
from foveal.caches.base import Cache, KVShape, Part, check_append, check_shape
from foveal.caches.checks import (
    need_places,
    need_whole,
    number_rows,
    sequence_numbers,
    whole_numbers,
)
from foveal.caches.codec import Codec
from foveal.caches.pool import PagePool
from foveal.caches.view import Columns, View, slots_of


class Paged(Cache):
    """Pages of `page_size` tokens; a sequence owns the pages that its table names.

    Options: pages in the pool; page_size of 1 to any number of tokens; per_head gives every key head
    its own table, pages of one head and lengths, so that heads may keep different tokens; max_tokens a
    sequence may hold, default all that the pool holds; biased keeps a logarithmic weight per key.
    Limits: a request for more pages than are free raises OutOfPagesError and changes nothing.
    Equals: any page size gives the results of one contiguous row, bit for bit in the reference.
    Paper: PagedAttention (2309.06180); per-head pages: none that we know.
    """

    def __init__(
        self,
        shape: KVShape,
        *,
        pages: int,
        page_size: int = 16,
        per_head: bool = False,
        max_tokens: int | None = None,
        biased: bool = False,
    ) -> None:
        check_shape(shape)
        codecs = Codec(shape.head_dim, shape.dtype), Codec(shape.values, shape.dtype)
        self._build(shape, codecs, pages, page_size, per_head, max_tokens, biased)

    def _build(
        self,
        shape: KVShape,
        codecs: tuple[Codec, Codec | None],
        pages: int,
        page_size: int,
        per_head: bool,
        max_tokens: int | None,
        biased: bool,
    ) -> None:
        need_whole(1, pages=pages, page_size=page_size)
        if max_tokens is not None:
            need_whole(1, max_tokens=max_tokens)
        per_head = per_head and shape.kv_heads > 1
        self.shape, self.page_size, self._codecs = shape, page_size, codecs
        self._heads = shape.kv_heads if per_head else 1
        held = 1 if per_head else shape.kv_heads
        columns = [column for codec in codecs if codec for column in codec.columns]
        if biased:
            columns.append((1, torch.float32))
        device = torch.device(shape.device)
        self._pool = self._new_pool(columns, pages, held, page_size, device)
        self._biased = biased
        most = pages * page_size if max_tokens is None else max_tokens
        width = min(-(-most // page_size), pages)
        self._most = width * page_size if max_tokens is None else max_tokens
        size = (shape.batch, self._heads)
        self._table = torch.zeros(*size, width, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(size, dtype=torch.int32, device=device)
        self._seen = torch.zeros(shape.batch, dtype=torch.int32, device=device)
        self._positions: Tensor | None = None
        self._view: View | None = None
        self._host_lengths = [[0] * self._heads for _ in range(shape.batch)]
        self._host_seen = [0] * shape.batch
        self._croppable = [0] * shape.batch
        self._owned: list[list[list[int]]] = [
            [[] for _ in range(self._heads)] for _ in range(shape.batch)
        ]

    def _new_pool(
        self,
        columns: Sequence[tuple[int, torch.dtype]],
        pages: int,
        heads: int,
        page_size: int,
        device: torch.device,
    ) -> PagePool:
        return PagePool(columns, pages, heads, page_size, device)

    @property
    def lengths(self) -> Tensor:
        return self._lengths

    @property
    def seen(self) -> Tensor:
        return self._seen

    @property
    def host_lengths(self) -> list[list[int]]:
        return [list(row) for row in self._host_lengths]

    @property
    def host_seen(self) -> list[int]:
        return list(self._host_seen)

    @property
    def page_table(self) -> Tensor:
        """int32 [batch, 1 or kv_heads, pages]; entries behind the length of a sequence mean nothing."""
        return self._table

    @property
    def free_pages(self) -> int:
        """Pages that nobody owns."""
        return self._pool.free

    @property
    def max_tokens(self) -> int:
        """Tokens that a sequence may hold."""
        return self._most

    @property
    def positions(self) -> Tensor | None:
        """int32 [batch, 1 or kv_heads, L]: where stored tokens stood in their sequence, -1 behind the
        length; None while every sequence holds its newest tokens without a gap."""
        if self._positions is None:
            return None
        slots = self._stored_slots()[:, : self._heads]
        return torch.where(slots != self._pool.nowhere, self._positions[slots], -1)

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
        if (bias is not None) and not self._biased:
            raise CacheError("bias", "a tensor", "a cache built with biased=True is needed")
        tokens = k.shape[1]
        grown = [tokens] * self.shape.batch if counts is None else [int(n) for n in counts]
        captured = capturing(k)
        if captured and counts is not None:
            raise CacheError("counts", "a list", "none is needed while a CUDA graph is captured")
        if not captured:
            self.reserve(grown)
        self._write(k, v, bias, None if counts is None else grown, last)
        if not captured:
            self._count(grown)

    def _write(
        self, k: Tensor, v: Tensor, bias: Tensor | None, counts: list[int] | None, last: bool
    ) -> None:
        """Writes new rows behind the stored ones and moves the lengths on the device."""
        tokens, device = k.shape[1], k.device
        step = torch.arange(tokens, device=device, dtype=torch.int32).expand(self.shape.batch, -1)
        moved = torch.full_like(self._seen, tokens)
        if counts is not None:
            moved = torch.tensor(counts, dtype=torch.int32, device="cpu")
            moved = moved.to(device, non_blocking=True)
            if last:
                step = step - (tokens - moved)[:, None]
        places = self._lengths[:, :, None] + step[:, None]
        slots = self._slots(places.clamp(0, self._table.shape[2] * self.page_size - 1))
        if counts is not None:
            valid = (step >= 0) & (step < moved[:, None])
            slots = torch.where(valid[:, None], slots, self._pool.nowhere)
        rows = self._encoded(k.transpose(1, 2), v.transpose(1, 2))
        if self._biased:
            given = (
                k.new_zeros(k.shape[:2]).float()[:, None] if bias is None else bias.transpose(1, 2)
            )
            rows = (*rows, given.float().expand(-1, self.shape.kv_heads, -1)[..., None])
        self._pool.put(slots, rows)
        if self._positions is not None:
            positions = (self._seen[:, None] + step)[:, None].expand_as(slots)
            self._positions[slots.flatten()] = positions.flatten()
        self._lengths += moved[:, None]
        self._seen += moved

    def _encoded(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Columns of rows [B, Hkv, n, D]."""
        keys, values = self._codecs
        return (*keys.encode(k), *(values.encode(v) if values else ()))

    def _count(self, grown: Sequence[int]) -> None:
        for b, n in enumerate(grown):
            self._host_lengths[b] = [length + n for length in self._host_lengths[b]]
            self._host_seen[b] += n
            self._croppable[b] += n

    def prepare(self, tokens: int = 1) -> None:
        need_whole(0, tokens=tokens)
        grown = [tokens] * self.shape.batch
        self.reserve(grown)
        self._count(grown)

    def reserve(self, tokens: Sequence[int]) -> None:
        """Takes the pages that `tokens[b]` more tokens of every sequence b will need."""
        tokens = whole_numbers("tokens", tokens, self.shape.batch)
        if min(tokens) < 0:
            raise CacheError("tokens", tokens, "at least 0 of each sequence is needed")
        wanted: list[tuple[int, int, int]] = []
        copied: list[tuple[int, int, int]] = []
        left: Counter[int] = Counter()  # owners that go over to a copy of a page
        for b, n in enumerate(tokens):
            for h, length in enumerate(self._host_lengths[b]):
                if not n:
                    continue
                if length + n > self._most:
                    raise CacheError(
                        "max_tokens",
                        f"{length + n} tokens of sequence {b}",
                        f"at most {self._most} fit",
                    )
                owned = self._owned[b][h]
                if length % self.page_size:
                    page = owned[length // self.page_size]
                    if self._pool.references(page) - left[page] > 1:
                        left[page] += 1
                        copied.append((b, h, length // self.page_size))
                more = -(-(length + n) // self.page_size) - len(owned)
                if more > 0:
                    wanted.append((b, h, more))
        taken = self._pool.take(len(copied) + sum(more for _, _, more in wanted))
        changes: list[tuple[int, int, int, int]] = []
        if copied:
            fresh = [taken.pop() for _ in copied]
            self._copy_pages([self._owned[b][h][j] for b, h, j in copied], fresh)
            for (b, h, j), page in zip(copied, fresh, strict=True):
                self._pool.give([self._owned[b][h][j]])
                self._owned[b][h][j] = page
                changes.append((b, h, j, page))
        for b, h, more in wanted:
            for _ in range(more):
                page = taken.pop()
                changes.append((b, h, len(self._owned[b][h]), page))
                self._owned[b][h].append(page)
        self._change_table(changes)

    def _copy_pages(self, source: list[int], target: list[int]) -> None:
        others = () if self._positions is None else (self._positions,)
        self._pool.copy(source, target, *others)

    def _change_table(self, changes: list[tuple[int, int, int, int]]) -> None:
        if not changes:
            return
        width = self._table.shape[2]
        flat = [((b * self._heads + h) * width + j, page) for b, h, j, page in changes]
        both = torch.tensor(flat, dtype=torch.int64, device="cpu")
        both = both.to(self._table.device, non_blocking=True)
        self._table.view(-1)[both[:, 0]] = both[:, 1].int()

    def _rewrite_tables(self, sequences: Sequence[int]) -> None:
        self._change_table(
            [
                (b, h, j, page)
                for b in sequences
                for h in range(self._heads)
                for j, page in enumerate(self._owned[b][h])
            ]
        )

    def _upload(self) -> None:
        """The lengths of the host onto the device."""
        self._lengths.copy_(torch.tensor(self._host_lengths, dtype=torch.int32, device="cpu"))
        self._seen.copy_(torch.tensor(self._host_seen, dtype=torch.int32, device="cpu"))

    def free(self, sequences: Sequence[int] | None = None) -> None:
        chosen = range(self.shape.batch) if sequences is None else self._checked(sequences)
        for b in chosen:
            for h in range(self._heads):
                self._pool.give(self._owned[b][h])
                self._owned[b][h] = []
            self._host_lengths[b] = [0] * self._heads
            self._host_seen[b] = self._croppable[b] = 0
        self._upload()

    def _checked(self, sequences: object) -> list[int]:
        return sequence_numbers("sequences", sequences, self.shape.batch)

    def keep(self, indices: Tensor) -> None:
        need_places(indices=indices)
        if indices.dim() != 3 or indices.shape[0] != self.shape.batch:
            raise CacheError(
                "indices",
                list(indices.shape),
                f"[{self.shape.batch}, {self._heads} or 1, n] is needed",
            )
        if indices.shape[1] not in (1, self._heads):
            raise CacheError(
                "indices",
                list(indices.shape),
                f"one list for all heads or {self._heads} lists are needed: only a cache with "
                "per_head=True holds other tokens for every head",
            )
        if indices.device != self._lengths.device and indices.device.type == "meta":
            raise DeviceError("indices", indices.device, f"{self._lengths.device} is needed")
        indices = indices.to(self._lengths.device).long()
        counts = (indices >= 0).sum(-1).expand(-1, self._heads).tolist()
        most = indices.amax(-1).expand(-1, self._heads).tolist() if indices.shape[2] else counts
        for b, row in enumerate(self._host_lengths):
            for h, length in enumerate(row):
                if counts[b][h] > length or (counts[b][h] and most[b][h] >= length):
                    raise CacheError(
                        "indices",
                        f"{counts[b][h]} places up to {most[b][h]} of sequence {b}",
                        f"places below its length {length}, each once, are needed",
                    )
        before, after = indices[..., :-1], indices[..., 1:]
        if not ((after < 0) | ((before >= 0) & (after > before))).all():
            needed = "places in ascending order, each once, -1 behind the last, are needed"
            raise CacheError("indices", "places in another order", needed)
        if counts == self._host_lengths:
            return
        if self._positions is None:
            self._start_positions()
        self._own_pages(range(self.shape.batch))
        assert self._positions is not None
        source = self._slots(indices.clamp_min(0))
        source = torch.where(indices >= 0, source, self._pool.nowhere)
        rows, positions = self._pool.get(source), self._positions[source]
        target = self._slots(self._tokens(indices.shape[2]))
        target = torch.where(indices >= 0, target, self._pool.nowhere)
        self._pool.put(target, rows)
        self._positions[target.flatten()] = positions.flatten()
        self._host_lengths[:] = [[int(n) for n in row] for row in counts]
        self._croppable = [0] * self.shape.batch
        self._release_behind()
        self._upload()

    def rewrite(self, indices: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> None:
        """Overwrites stored tokens, such as by what they were merged into.

        Shapes: indices [batch, 1 or kv_heads, n] places of stored tokens, -1 for none; k
        [batch, n, kv_heads, head_dim], v [batch, n, kv_heads, value_dim], bias [batch, n, 1 or kv_heads].
        """
        need_places(indices=indices)
        check_append(self.shape, k, v, None, bias)
        self._own_pages(range(self.shape.batch))
        indices = indices.to(self._lengths.device).long()
        slots = torch.where(indices >= 0, self._slots(indices.clamp_min(0)), self._pool.nowhere)
        rows = self._encoded(k.transpose(1, 2), v.transpose(1, 2))
        if self._biased and bias is not None:
            weights = bias.transpose(1, 2).float().expand(-1, self.shape.kv_heads, -1)
            rows = (*rows, weights[..., None])
        self._pool.put(slots, rows)

    def _own_pages(self, sequences: Sequence[int]) -> None:
        """Copies pages that other sequences share, before they are written to."""
        shared: list[tuple[int, int, int]] = []
        left: Counter[int] = Counter()
        for b in sequences:
            for h in range(self._heads):
                for j, page in enumerate(self._owned[b][h]):
                    if self._pool.references(page) - left[page] > 1:
                        left[page] += 1
                        shared.append((b, h, j))
        if not shared:
            return
        source = [self._owned[b][h][j] for b, h, j in shared]
        fresh = self._pool.take(len(shared))
        self._copy_pages(source, fresh)
        for (b, h, j), page in zip(shared, fresh, strict=True):
            self._pool.give([self._owned[b][h][j]])
            self._owned[b][h][j] = page
        self._rewrite_tables(sequences)

    def pass_by(self, sequence: int, tokens: int) -> None:
        """Counts tokens of a sequence as seen that were never stored here, before those that are."""
        self._host_seen[sequence] += tokens
        self._upload()

    def _release_behind(self) -> None:
        """Gives back pages behind the lengths."""
        for b, row in enumerate(self._host_lengths):
            for h, length in enumerate(row):
                held = -(-length // self.page_size)
                self._pool.give(self._owned[b][h][held:])
                del self._owned[b][h][held:]

    def trim(self, window: int) -> None:
        """Gives back the pages at the front that hold none of the newest `window` tokens.

        For layers with a sliding window; lengths fall by whole pages, no token moves.
        """
        need_whole(0, window=window)
        self.drop_first([[max(length - window, 0) for length in row] for row in self._host_lengths])

    def drop_first(self, tokens: Sequence[Sequence[int]]) -> None:
        """Gives back the pages that hold only the first tokens[b][h] tokens."""
        dropped = number_rows("tokens", tokens, self.shape.batch, self._heads)
        changed = []
        for b, row in enumerate(self._host_lengths):
            for h, length in enumerate(row):
                pages = min(max(dropped[b][h], 0), length) // self.page_size
                if pages:
                    self._pool.give(self._owned[b][h][:pages])
                    del self._owned[b][h][:pages]
                    row[h] = length - pages * self.page_size
                    changed.append(b)
            self._croppable[b] = min(self._croppable[b], min(row))
        if changed:
            self._rewrite_tables(sorted(set(changed)))
            self._upload()

    def crop(self, seen: int | Sequence[int]) -> None:
        """Forgets the newest tokens: sequence b has then seen `seen[b]` (or `seen`) tokens, if it had more.

        Limits: not beyond the last eviction.
        """
        batch = self.shape.batch
        wanted = [seen] * batch if isinstance(seen, int) else whole_numbers("seen", seen, batch)
        dropped = [max(had - n, 0) for had, n in zip(self._host_seen, wanted, strict=True)]
        for b, (n, most) in enumerate(zip(dropped, self._croppable, strict=True)):
            if n > most:
                raise CacheError(
                    "seen",
                    wanted[b],
                    f"sequence {b} can go back {most} tokens, to its last eviction",
                )
        for b, n in enumerate(dropped):
            self._host_lengths[b] = [length - n for length in self._host_lengths[b]]
            self._host_seen[b] -= n
            self._croppable[b] -= n
        self._release_behind()
        self._upload()

    def fork(self, source: int, targets: Sequence[int]) -> None:
        """Targets become what source is and share its pages; a page is copied when one of them writes."""
        need_whole(0, source=source)
        chosen = self._checked([source, *whole_numbers("targets", targets)])
        index = list(range(self.shape.batch))
        for b in chosen[1:]:
            index[b] = chosen[0]
        self.reorder(index)

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Sequence b becomes what sequence index[b] was (beam search); pages are shared."""
        order = sequence_numbers("index", index, self.shape.batch)
        if len(order) != self.shape.batch:
            raise CacheError("index", order, f"{self.shape.batch} numbers are needed")
        before = self._owned
        for b in order:
            for pages in before[b]:
                self._pool.share(pages)
        self._owned = [[list(pages) for pages in before[b]] for b in order]
        for row in before:
            for pages in row:
                self._pool.give(pages)
        self._host_lengths[:] = [list(self._host_lengths[b]) for b in order]
        self._host_seen = [self._host_seen[b] for b in order]
        self._croppable = [self._croppable[b] for b in order]
        self._rewrite_tables(range(self.shape.batch))
        self._upload()

    def dense(self) -> tuple[Tensor, Tensor]:
        view, slots = self.view(), self._stored_slots()
        stored = (slots != self._pool.nowhere)[..., None]
        k = view.keys.read(slots, self.shape.dtype).masked_fill(~stored, 0)
        if view.values is None:
            return k.transpose(1, 2), k[..., : self.shape.values].transpose(1, 2)
        v = view.values.read(slots, self.shape.dtype).masked_fill(~stored, 0)
        return k.transpose(1, 2), v.transpose(1, 2)

    def bytes(self) -> int:
        owned = {page for row in self._owned for pages in row for page in pages}
        entries = sum(len(pages) for row in self._owned for pages in row)
        return len(owned) * self._page_bytes() + 4 * entries

    def capacity_bytes(self) -> int:
        return (self._pool.pages + 1) * self._page_bytes() + 4 * self._table.numel()

    def _page_bytes(self) -> int:
        positions = 4 * self._pool.rows_per_page if self._positions is not None else 0
        return self._pool.page_bytes + positions

    def parts(self) -> tuple[Part, ...]:
        return (Part(self.view()),)

    def view(self) -> View:
        """The store as the decode engine reads it; what it holds changes in place."""
        if self._view is not None:
            return self._view
        keys, values = self._codecs
        columns = self._pool.columns
        split = len(keys.columns)
        end = split + len(values.columns if values else ())
        self._view = View(
            lengths=self._lengths,
            host_lengths=self._host_lengths,
            seen=self._seen,
            page_table=self._table,
            page_size=self.page_size,
            steps=self._pool.steps,
            kv_heads=self.shape.kv_heads,
            keys=Columns(keys, tuple(columns[:split])),
            values=Columns(values, tuple(columns[split:end])) if values else None,
            value_dim=values.dim if values else self.shape.values,
            bias=columns[-1].view(-1) if self._biased else None,
            positions=self._positions,
        )
        return self._view

    def _longest(self) -> int:
        return max(max(row) for row in self._host_lengths)

    def _tokens(self, count: int) -> Tensor:
        return torch.arange(count, device=self._table.device)[None, None]

    def _slots(self, tokens: Tensor) -> Tensor:
        return slots_of(self._table, tokens, self.page_size, self._pool.steps, self.shape.kv_heads)

    def _stored_slots(self) -> Tensor:
        """int64 [B, Hkv, L] slots of all stored tokens, `nowhere` behind the length of each sequence."""
        tokens = self._tokens(self._longest())
        return torch.where(
            tokens < self._lengths[..., None], self._slots(tokens), self._pool.nowhere
        )

    def _start_positions(self) -> None:
        """Writes down where the stored tokens stand, before gaps come between them."""
        self._view = None
        self._positions = torch.zeros(
            self._pool.slots, dtype=torch.int32, device=self._table.device
        )
        tokens = self._tokens(self._longest())
        first = self._seen[:, None, None] - self._lengths[..., None]
        slots = self._stored_slots()
        self._positions[slots.flatten()] = (first + tokens).int().expand_as(slots).flatten()
