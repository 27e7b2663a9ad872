"""Slots of the device for pages of the host."""

from __future__ import annotations

import random

import torch

from foveal.caches.slots import Slots


def test_what_was_named_longest_ago_gives_way(own_seed: int) -> None:
    draw = random.Random(own_seed)
    units, slots, pages = 3, 6, 20
    there = Slots(units, slots, pages)
    named: list[dict[int, int]] = [{} for _ in range(units)]
    for call in range(60):
        if call == 30:
            there.grow(pages := 33)
        rows = [draw.sample(range(pages), draw.randrange(slots + 1)) for _ in range(units)]
        wanted = torch.tensor([row + [-1] * (slots - len(row)) for row in rows])
        before = [{int(p) for p in row if p >= 0} for row in there.page]
        unit, page, slot = there.place(wanted)
        new = sorted(zip(unit.tolist(), page.tolist(), strict=True))
        assert new == sorted((u, p) for u in range(units) for p in set(rows[u]) - before[u])
        assert (there.page[unit, slot] == page).all()
        for u, row in enumerate(rows):
            after = {int(p) for p in there.page[u] if p >= 0}
            gone = before[u] - after
            assert set(row) <= after
            assert len(gone) == max(len(before[u] | set(row)) - slots, 0)
            stayed = after & before[u] - set(row)
            newest = max((named[u][p] for p in gone), default=-1)
            assert newest <= min((named[u][p] for p in stayed), default=call)
            named[u].update(dict.fromkeys(row, call))
        for u in range(units):
            held = (there.slot[u] >= 0).nonzero().flatten()
            assert (there.page[u, there.slot[u, held]] == held).all()
            assert len(held) == int((there.page[u] >= 0).sum())


def test_cleared_units_are_empty() -> None:
    there = Slots(2, 3, 5)
    there.place(torch.tensor([[1, 2, 4], [0, 3, -1]]))
    there.clear(slice(0, 1))
    assert (there.page[0] < 0).all()
    assert (there.slot[0] < 0).all()
    assert there.slots_of(torch.tensor([[1], [3]])).tolist() == [[-1], [int(there.slot[1, 3])]]
    assert len(there.place(torch.tensor([[4], [3]]))[0]) == 1
