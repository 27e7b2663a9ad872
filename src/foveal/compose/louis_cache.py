"""LouisKV one token at a time: pages on the host, chosen anew where the queries turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._arguments import finite
from foveal._errors import CacheError, ShapeError
from foveal._host import on_host
from foveal.caches.base import KVShape, check_shape
from foveal.caches.checks import need_whole, sequence_numbers
from foveal.caches.offloaded import Offloaded
from foveal.compose.decode_selected import check_step
from foveal.scores.softmax import Softmax

Noted = tuple[Tensor | None, tuple[list[int] | None, ...], tuple[int, ...]]


class LouisCache(Offloaded):
    """The newest keys on the device; pages of the others are fetched at semantic borders alone.

    A border of a key head is a query whose cosine with that of its last border is below `alike`, mean over
    its query heads.  There it chooses the `pages` old pages of largest q . (mean key); they, and what
    became old since, are read until the next one.  A head whose slots are full chooses anew as well.
    Options: max_tokens of a sequence on the host; alike, a cosine; pages per choice, of `page` tokens;
    window, the newest tokens, at least; slots on the device per key head, by default twice the pages.
    Cost of a step: between borders nothing is fetched but a page when one became old; at a border, at
    most `pages` per key head.  Mean keys stay on the device, 1 / page of the keys.
    Limits: one query per sequence and step.
    Equals: the rows of the system "louis_kv" whose queries are those of the steps, while the slots suffice;
    with as many pages as there are, `Paged`.
    Paper: LouisKV (2510.11292).
    """

    def __init__(
        self,
        shape: KVShape,
        *,
        max_tokens: int,
        alike: float = 0.7,
        pages: int = 16,
        page: int = 32,
        window: int = 64,
        slots: int | None = None,
    ) -> None:
        check_shape(shape)
        need_whole(1, pages=pages, page=page)
        need_whole(0, window=window)
        if not finite(alike):
            raise CacheError("alike", alike, "a number is needed")
        slots = 2 * pages if slots is None else slots
        need_whole(1, slots=slots)
        if slots < pages:
            raise CacheError("slots", slots, f"at least {pages}, the pages of a choice, are needed")
        super().__init__(shape, max_tokens=max_tokens, slots=slots, page_size=page, recent=window)
        self.alike, self.pages = alike, pages
        size = (shape.batch, shape.kv_heads, self._most, shape.head_dim)
        self.means = torch.zeros(*size, dtype=shape.dtype, device=shape.device)
        units = shape.batch * shape.kv_heads
        self._chosen: list[list[int] | None] = [None] * units
        self._since = [0] * units
        self._border: Tensor | None = None

    def free(self, sequences: Sequence[int] | None = None) -> None:
        super().free(sequences)
        heads = self.shape.kv_heads
        for b in range(self.shape.batch) if sequences is None else sequences:
            self._chosen[b * heads : (b + 1) * heads] = [None] * heads

    def grow(self, max_tokens: int) -> None:
        super().grow(max_tokens)
        self.means = F.pad(self.means, (0, 0, 0, self._most - self.means.shape[2]))

    def crop(self, seen: int | Sequence[int]) -> None:
        super().crop(seen)
        for unit, chosen in enumerate(self._chosen):
            most = self._pages[unit // self.shape.kv_heads]
            self._since[unit] = min(self._since[unit], most)
            if chosen is not None:
                self._chosen[unit] = [page for page in chosen if page < most]

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        order = sequence_numbers("index", index, self.shape.batch)
        super().reorder(order)
        units = [b * self.shape.kv_heads + h for b in order for h in range(self.shape.kv_heads)]
        self._chosen = [self._chosen[unit] for unit in units]
        self._since = [self._since[unit] for unit in units]
        if self._border is not None:
            self._border = self._border[order]

    def summary_bytes(self) -> int:
        row = self.shape.head_dim * self.means.element_size()
        return sum(self._pages) * self.shape.kv_heads * row

    def _summaries(self) -> list[Tensor]:
        return [self.means]

    def noted(self) -> Noted:
        """What the steps so far left behind for the next one; nothing changes it."""
        return self._border, tuple(self._chosen), tuple(self._since)

    def recall(self, noted: Noted) -> None:
        """Takes steps back; `crop` does so with their tokens."""
        self._border, chosen, since = noted
        self._chosen, self._since = list(chosen), list(since)

    def _move(self) -> None:
        before = self.host_pages
        super()._move()
        for b, (old, new) in enumerate(zip(before, self._pages, strict=True)):
            if new > old:
                self.means[b, :, old:new] = self.host_keys[b, :, old:new].mean(2).to(self.means)

    @on_host
    def decode(self, q: Tensor, score: Softmax = Softmax()) -> Tensor:
        """o [batch, 1, Hq, value_dim] of the newest token, q [batch, 1, Hq, head_dim]."""
        from foveal._decode import decode

        check_step(q, score)
        if q.shape[0] != self.shape.batch or q.shape[2] % self.shape.kv_heads:
            needed = f"{self.shape.batch} rows of heads that {self.shape.kv_heads} divides"
            raise ShapeError("q", list(q.shape), f"{needed} are needed")
        rows = q[:, 0].detach().unflatten(1, (self.shape.kv_heads, -1))
        chooses = self._borders(rows)
        lists = self._named()
        if any(chooses):
            best = self._best(rows)
            for unit, anew in enumerate(chooses):
                if anew:
                    b = unit // self.shape.kv_heads
                    self._chosen[unit] = [page for page in best[unit] if page < self._pages[b]]
                    self._since[unit] = self._pages[b]
            lists = self._named()
        longest = max(map(len, lists))
        padded = [row + [-1] * (longest - len(row)) for row in lists]
        table = torch.tensor(padded, device="cpu")
        self.select(table.view(self.shape.batch, self.shape.kv_heads, longest))
        return decode(q, self, score)

    def _named(self) -> list[list[int]]:
        """The pages that every head reads: those chosen, and those that became old since."""
        heads = self.shape.kv_heads
        return [
            [*(chosen or ()), *range(since, self._pages[unit // heads])]
            for unit, (chosen, since) in enumerate(zip(self._chosen, self._since, strict=True))
        ]

    def _borders(self, rows: Tensor) -> list[bool]:
        """Whether each head of each sequence chooses now; remembers the queries of those that do."""
        unit = F.normalize(rows, dim=-1)
        if self._border is None:
            self._border = torch.zeros_like(unit)
        turned = ((unit * self._border).sum(-1).mean(-1) < self.alike).flatten().tolist()
        named = self._named()
        chooses = [
            chosen is None or turn or len(pages) > self.slots
            for chosen, turn, pages in zip(self._chosen, turned, named, strict=True)
        ]
        anew = torch.tensor(chooses, device=rows.device).view(*rows.shape[:2], 1, 1)
        self._border = torch.where(anew, unit, self._border)
        return chooses

    def _best(self, rows: Tensor) -> list[list[int]]:
        """The best old pages of every head of every sequence; numbers behind the last where too few."""
        most = max(self._pages)
        s = (rows @ self.means[:, :, :most].mT).sum(2)
        old = torch.tensor(self._pages, device=s.device)[:, None, None]
        s = s.masked_fill(torch.arange(most, device=s.device) >= old, -torch.inf)
        found = s.topk(min(self.pages, most), dim=-1)
        kept = torch.where(found.values > -torch.inf, found.indices, self._most)
        lists: list[list[int]] = kept.flatten(0, 1).tolist()
        return lists
