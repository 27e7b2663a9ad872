"""Sequences cut in chunks, ordered so that the i-th chunks of all sequences lie together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._kept import kept


@dataclass(frozen=True, eq=False)
class Layout:
    """Sequences of `lengths` tokens in chunks of `size`, each from the start of its sequence.

    `order` lists the sequences by falling length; step i holds the i-th chunks of the first
    `counts[i]` of them.  `tokens` [chunks * size] are the tokens of the chunks, -1 behind the end
    of a sequence, and `places` [T] where each token lies; both None where all lengths are equal.
    """

    size: int
    lengths: tuple[int, ...]
    order: tuple[int, ...]
    counts: tuple[int, ...]
    tokens: Tensor | None
    places: Tensor | None

    def split(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[chunks, H, C, D] of x [T, H, D], padded with `fill`."""
        if self.tokens is None:
            count, length = len(self.lengths), self.lengths[0] if self.lengths else 0
            steps = len(self.counts)
            x = x.unflatten(0, (count, length))
            padding = steps * self.size - length
            x = F.pad(x, (0, 0, 0, 0, 0, padding), value=fill) if padding else x
            cut: Tensor = x.unflatten(1, (steps, self.size)).permute(1, 0, 3, 2, 4)
            return cut.reshape(steps * count, *cut.shape[2:])
        tokens = self.tokens.to(x.device)
        x = F.pad(x, (0, 0, 0, 0, 0, 1), value=fill)
        x = x.index_select(0, tokens.remainder(len(x)))
        rows: Tensor = x.unflatten(0, (-1, self.size))
        return rows.transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """[T, H, D] of x [chunks, H, C, D]."""
        if self.places is None:
            count, length = len(self.lengths), self.lengths[0] if self.lengths else 0
            x = x.unflatten(0, (len(self.counts), count)).permute(1, 0, 3, 2, 4)
            return x.flatten(1, 2)[:, :length].flatten(0, 1)
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.places.to(x.device))

    def sorted(self, states: Tensor) -> Tensor:
        """States [N, ...] of the sequences in `order`."""
        return states if self._in_order() else states[list(self.order)]

    def unsorted(self, states: Tensor) -> Tensor:
        """States in `order` back in the order of the sequences."""
        if self._in_order():
            return states
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return states[inverse]

    def _in_order(self) -> bool:
        return self.order == tuple(range(len(self.order)))


@kept(64)
def layout(lengths: tuple[int, ...], size: int) -> Layout:
    """The layout of sequences of these lengths in chunks of `size` tokens."""
    order = tuple(sorted(range(len(lengths)), key=lambda number: -lengths[number]))
    chunks = [-(-lengths[number] // size) for number in order]
    counts = tuple(sum(1 for n in chunks if n > step) for step in range(max(chunks, default=0)))
    if len(set(lengths)) <= 1:
        return Layout(size, lengths, order, counts, None, None)
    lasting = torch.tensor(lengths)
    starts = (lasting.cumsum(0) - lasting)[list(order)]
    lasting = lasting[list(order)]
    within = torch.arange(size)
    rows = [torch.empty(0, dtype=torch.int64)]
    for step, count in enumerate(counts):
        token = step * size + within
        inside = token < lasting[:count, None]
        rows.append(torch.where(inside, starts[:count, None] + token, -1).flatten())
    tokens = torch.cat(rows)
    places = torch.empty(sum(lengths), dtype=torch.int64)
    real = torch.nonzero(tokens >= 0).squeeze(-1)
    places[tokens[real]] = real
    return Layout(size, lengths, order, counts, tokens, places)
