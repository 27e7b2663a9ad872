"""Rows that are contiguous in addresses and get memory as they grow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foveal.caches.base import KVShape, check_shape
from foveal.caches.checks import need_whole
from foveal.caches.codec import Codec
from foveal.caches.paged import Paged
from foveal.caches.pool import PagePool
from foveal.caches.view import View
from foveal.caches.virtual_memory import VirtualRange, granule


class VirtualContiguous(Paged):
    """A row of `max_tokens` tokens per sequence, [batch, max_tokens, kv_heads, D], mapped on demand.

    On a GPU the addresses of all rows are reserved once and memory of the driver's granularity (2 MiB) is
    put behind them as sequences grow: no copy when they do, no page table, one base address for a CUDA graph.
    A freed row keeps its memory for the next sequence until `release`.  On the CPU the rows are allocated
    whole.
    Options: max_tokens of a sequence; ahead, tokens to map beyond those needed whenever memory is mapped.
    Cost: ceil(length / t) granules per sequence, for keys and values each, t = granule / (Hkv D itemsize).
    Limits: mapping is work of the host, some 0.1 ms a granule; CUDA only.
    Paper: vAttention (2405.04437), with the granularity of unchanged drivers.
    """

    def __init__(self, shape: KVShape, *, max_tokens: int, ahead: int = 0) -> None:
        need_whole(0, ahead=ahead)
        self.ahead = ahead
        check_shape(shape)
        need_whole(1, max_tokens=max_tokens)
        codecs = Codec(shape.head_dim, shape.dtype), Codec(shape.values, shape.dtype)
        self._build(shape, codecs, shape.batch, max_tokens, False, max_tokens, False)

    def _new_pool(
        self,
        columns: Sequence[tuple[int, torch.dtype]],
        pages: int,
        heads: int,
        page_size: int,
        device: torch.device,
    ) -> PagePool:
        self._rows = _RowPool(columns, pages, heads, page_size, device)
        return self._rows

    def reserve(self, tokens: Sequence[int]) -> None:
        super().reserve(tokens)
        for (length,), n, (pages,) in zip(self._host_lengths, tokens, self._owned, strict=True):
            for page in pages:
                self._rows.back(page, length + n, min(length + n + self.ahead, self._most))

    def release(self) -> None:
        """Takes the memory of rows that no sequence owns back from the device; waits for it."""
        self._rows.release()

    def mapped_bytes(self) -> int:
        """Bytes of memory behind all rows."""
        return self._rows.mapped

    def bytes(self) -> int:
        owned = {page for row in self._owned for pages in row for page in pages}
        return sum(self._rows.backed_bytes(page) for page in owned)

    def capacity_bytes(self) -> int:
        return self._rows.mapped

    def view(self) -> View:
        if self._view is None:
            self._view = dataclasses.replace(super().view(), guarded=True)
        return self._view


class _RowPool(PagePool):
    """Pages that are rows [page_size, heads] of a range of addresses, with memory behind their fronts."""

    def __init__(
        self,
        columns: Sequence[tuple[int, torch.dtype]],
        pages: int,
        heads: int,
        page_size: int,
        device: torch.device,
    ) -> None:
        self.pages, self.page_size, self._heads = pages, page_size, heads
        self._row_bytes = [width * dtype.itemsize for width, dtype in columns]
        piece = granule(device) if device.type == "cuda" else 1
        unit = math.lcm(*(piece // math.gcd(piece, n) for n in self._row_bytes))
        self.rows_per_page = -(-heads * page_size // unit) * unit
        self.slots = pages * self.rows_per_page + heads
        self.page_bytes = self.rows_per_page * sum(self._row_bytes)
        self._free = list(range(pages - 1, -1, -1))
        self._references = [0] * pages
        self._backed = [0] * pages
        self._ranges: list[VirtualRange] = []
        self.columns = []
        for (width, dtype), n in zip(columns, self._row_bytes, strict=False):
            if device.type != "cuda":
                self.columns.append(torch.zeros(self.slots, width, dtype=dtype, device=device))
                continue
            addresses = VirtualRange(self.slots * n, device)
            addresses.back(self.nowhere * n, self.slots * n)
            self._ranges.append(addresses)
            numbers = addresses.tensor(dtype)[: self.slots * width]
            self.columns.append(numbers.view(self.slots, width))

    @property
    def nowhere(self) -> int:
        return self.pages * self.rows_per_page

    @property
    def steps(self) -> tuple[int, int, int]:
        return self.rows_per_page, 1, self._heads

    @property
    def mapped(self) -> int:
        """Bytes of memory behind the rows."""
        if not self._ranges:
            return self.slots * sum(self._row_bytes)
        return sum(addresses.mapped for addresses in self._ranges)

    def backed_bytes(self, page: int) -> int:
        """Bytes of memory behind one row."""
        if not self._ranges:
            return self.page_bytes
        rows = self._backed[page] * self._heads
        pieces = ((rows * n, r.granule) for n, r in zip(self._row_bytes, self._ranges, strict=True))
        return sum(-(-count // piece) * piece for count, piece in pieces)

    def back(self, page: int, needed: int, wanted: int) -> None:
        """Puts memory behind the first `wanted` tokens of a row if `needed` of them have too little."""
        if needed <= self._backed[page]:
            return
        first = page * self.rows_per_page
        for addresses, n in zip(self._ranges, self._row_bytes, strict=False):
            addresses.back(first * n, (first + wanted * self._heads) * n)
        self._backed[page] = wanted

    def take(self, count: int) -> list[int]:
        self._free.sort(key=lambda page: self._backed[page])
        return super().take(count)

    def release(self) -> None:
        for page in self._free:
            start, stop = page * self.rows_per_page, (page + 1) * self.rows_per_page
            for addresses, n in zip(self._ranges, self._row_bytes, strict=False):
                addresses.release(start * n, stop * n)
            self._backed[page] = 0

    def copy(self, source: Sequence[int], target: Sequence[int], *others: Tensor) -> None:
        for old, new in zip(source, target, strict=True):
            tokens = self._backed[old] if self._ranges else self.page_size
            self.back(new, tokens, tokens)
            count = tokens * self._heads
            first, last = new * self.rows_per_page, old * self.rows_per_page
            for column in (*self.columns, *others):
                column[first : first + count] = column[last : last + count]
