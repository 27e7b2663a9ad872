"""Everything about a launch that is known at compile time, as one value."""

from __future__ import annotations

import dataclasses
from typing import Any

from foveal.engines.tile.spec import padded

Tile = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Spec:
    """Tiles in tokens per axis (x, y, z; axes that the grid lacks are 1), sizes, and the route between tiles.

    head_dim and value_dim are padded on chip to powers of two of at least `columns`; precision is that of
    float32 products; precise: what is not of the dtype of k enters products in pieces that are.
    """

    q_tile: Tile
    k_tile: Tile
    rank: int
    head_dim: int
    value_dim: int
    route: Any
    precision: str
    precise: bool
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
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return " ".join(str(getattr(value, "cache_key", value)) for value in values)
