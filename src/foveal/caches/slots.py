"""Which pages of the host lie in which slots of the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Slots:
    """Slots of every unit (a sequence and a head), each empty or with one of the unit's pages.

    `place` finds room for pages in slots that are empty or hold what was named longest ago.  All tensors
    are on the host: page [units, slots] and slot [units, pages], -1 for none.
    """

    def __init__(self, units: int, slots: int, pages: int) -> None:
        self.page = _none(units, slots)
        self.slot = _none(units, pages)
        self._named = torch.zeros(units, slots, dtype=torch.int64, device="cpu")
        self._calls = 0

    def place(self, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit, page and new slot [n] of the pages that had none.

        Shapes: wanted int64 [units, m], different pages of each unit, at most as many as slots; -1 for none.
        """
        self._calls += 1
        own = self.slots_of(wanted)
        unit, column = (own >= 0).nonzero(as_tuple=True)
        self._named[unit, own[unit, column]] = self._calls
        missing = (wanted >= 0) & (own < 0)
        oldest = self._named.argsort(dim=1, stable=True)
        unit, column = missing.nonzero(as_tuple=True)
        slot = oldest[unit, (missing.cumsum(1) - 1)[unit, column]]
        page, before = wanted[unit, column], self.page[unit, slot]
        full = before >= 0
        self.slot[unit[full], before[full]] = -1
        self.slot[unit, page] = slot
        self.page[unit, slot] = page
        self._named[unit, slot] = self._calls
        return unit, page, slot

    def slots_of(self, pages: Tensor) -> Tensor:
        """The slot of each page [units, m], -1 for none."""
        return torch.where(pages < 0, -1, self.slot.gather(1, pages.clamp(min=0)))

    def clear(self, units: slice) -> None:
        """Their slots are empty."""
        self.page[units] = self.slot[units] = -1
        self._named[units] = 0

    def grow(self, pages: int) -> None:
        """Units have more pages."""
        more = _none(len(self.slot), pages - self.slot.shape[1])
        self.slot = torch.cat((self.slot, more), dim=1)


def _none(units: int, count: int) -> Tensor:
    return torch.full((units, count), -1, dtype=torch.int64, device="cpu")
