"""What sizes of the tile kernels mean, whichever kernel they are of, and what is known of them."""

from __future__ import annotations

import math
from pathlib import Path

from foveal.search.prior import Known, read_known
from foveal.search.space import Point
from foveal.tuning.tables import BACKWARD_KV

_RECORDED = Path(__file__).with_name("tile_known.jsonl")


def traits(stage: str, point: Point) -> tuple[float, ...]:
    """The tile that a program owns, the tile that it walks over, warps, stages, and the product per warp.

    See `Space.traits`.  A program of BACKWARD_KV owns keys, others own queries.
    """
    queries, keys, warps, stages = (
        int(point[name]) for name in ("queries", "keys", "warps", "stages")
    )
    own, other = (keys, queries) if stage == BACKWARD_KV else (queries, keys)
    return (
        math.log2(own) / 3,
        math.log2(other) / 3,
        math.log2(warps) / 1.5,
        stages / 2.25,
        math.log2(own * other / warps) / 3,
    )


def known() -> list[Known]:
    """What `benchmarks/search_landscapes_h100.jsonl` holds, by `scripts/search_race.py known`."""
    return read_known(_RECORDED)
