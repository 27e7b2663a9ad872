"""Everything about a launch of the tile kernels that is known at compile time, as one value."""

from __future__ import annotations

import dataclasses
from typing import Any

Tile = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Spec:
    """Tiles in tokens per axis (x, y, z; axes that the grid lacks are 1), sizes, and hooks.

    route walks between them; head_dim and value_dim are padded on chip to powers of two of at least
    `columns`; precision is that of float32 products.
    """

    q_tile: Tile
    k_tile: Tile
    rank: int
    head_dim: int
    value_dim: int
    route: Any
    shape: Any
    first: Any
    second: Any
    precision: str
    columns: int = 32

    @property
    def head_pad(self) -> int:
        return max(self.columns, padded(self.head_dim))

    @property
    def value_pad(self) -> int:
        return max(self.columns, padded(self.value_dim))

    @property
    def cache_key(self) -> str:
        """What the compiler's disk cache must know."""
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        values = (*fields, self.head_pad, self.value_pad)
        return " ".join(str(getattr(value, "cache_key", value)) for value in values)


def padded(size: int) -> int:
    """Columns of a tensor of so many channels on chip."""
    return max(32, 1 << (size - 1).bit_length())
