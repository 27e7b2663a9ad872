"""A pool of pages: who owns how many of them, and their rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal._errors import OutOfPagesError


class PagePool:
    """Columns of rows, [slots, width] each, in pages of `heads` heads of `page_size` tokens.

    Slot (head * (pages + 1) + page) * page_size + token: pages taken one behind the other are one run of
    memory for each head.  One page more than `pages` takes what is written nowhere.
    """

    def __init__(
        self,
        columns: Sequence[tuple[int, torch.dtype]],
        pages: int,
        heads: int,
        page_size: int,
        device: torch.device,
    ) -> None:
        self.pages, self.page_size = pages, page_size
        self._heads, self.rows_per_page = heads, heads * page_size
        self.slots = (pages + 1) * self.rows_per_page
        self.columns = [
            torch.zeros(self.slots, width, dtype=dtype, device=device) for width, dtype in columns
        ]
        self.page_bytes = self.rows_per_page * sum(w * dtype.itemsize for w, dtype in columns)
        self._free = list(range(pages - 1, -1, -1))
        self._references = [0] * pages

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def nowhere(self) -> int:
        """The slot of rows that nobody reads."""
        return self.pages * self.page_size

    @property
    def steps(self) -> tuple[int, int, int]:
        """Slots from one page, head and token to the next."""
        head_step = (self.pages + 1) * self.page_size if self._heads > 1 else 0
        return self.page_size, head_step, 1

    def references(self, page: int) -> int:
        """How many sequences own a page."""
        return self._references[page]

    def take(self, count: int) -> list[int]:
        """Pages that nobody owned; raises OutOfPagesError without a change when there are too few."""
        if count > len(self._free):
            raise OutOfPagesError(count, len(self._free), self.pages, self.page_size)
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        return taken[::-1]

    def share(self, pages: Sequence[int]) -> None:
        """Each of the pages has one more owner."""
        for page in pages:
            self._references[page] += 1

    def give(self, pages: Sequence[int]) -> None:
        """Each of the pages has one owner less."""
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def put(self, slots: Tensor, rows: Sequence[Tensor]) -> None:
        """Writes columns [*slots, width] into slots."""
        flat = slots.flatten()
        for column, x in zip(self.columns, rows, strict=False):
            column.index_copy_(0, flat, x.reshape(-1, column.shape[1]).to(column.dtype))

    def get(self, slots: Tensor) -> tuple[Tensor, ...]:
        """Columns [*slots, width] of slots."""
        return tuple(column[slots] for column in self.columns)

    def copy(self, source: Sequence[int], target: Sequence[int], *others: Tensor) -> None:
        """Pages `target` become copies of pages `source`, in the columns and in `others` [slots, ...]."""
        for column in (*self.columns, *others):
            pages = column.view(self._heads, self.pages + 1, -1)
            pages[:, list(target)] = pages[:, list(source)]
