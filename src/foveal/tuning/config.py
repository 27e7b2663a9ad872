"""Sizes that a tile kernel is compiled with."""

from __future__ import annotations

from dataclasses import dataclass

_SIZES = (16, 32, 64, 128, 256)
_WARPS = (1, 2, 4, 8, 16)
_MOST_STAGES = 8


@dataclass(frozen=True)
class Config:
    """Tokens of a query tile and of a key tile, warps of a program, stages of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.queries}x{self.keys} warps {self.warps} stages {self.stages}"

    @staticmethod
    def parse(text: str) -> Config:
        """The inverse of `str`.  Raises ValueError for what no kernel can be compiled with."""
        tiles, _, rest = text.partition(" ")
        try:
            (queries, keys), words = tiles.split("x"), rest.split(" ")
            config = Config(int(queries), int(keys), int(words[1]), int(words[3]))
        except (ValueError, IndexError):
            raise ValueError(f"{text!r} does not name tile sizes") from None
        sizes_fit = config.queries in _SIZES and config.keys in _SIZES
        if not (sizes_fit and config.warps in _WARPS and 1 <= config.stages <= _MOST_STAGES):
            raise ValueError(f"{text!r} names sizes that no kernel is compiled with")
        return config
