"""Shapes of the boxes that the Hopper kernels walk, chosen by counting the boxes they would visit."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass

from foveal.engines.tile.lists import inverse
from foveal.patterns.base import Bounds, Extent, Pattern
from foveal.patterns.dense import Dense

Box = tuple[int, int, int]

# Bytes of keys and values of the heads that are walked together; they share the cache of 50 MB.
_SHARED_BYTES = 20_000_000
# As many where more heads are asked for.
_MOST_SHARED_BYTES = 40_000_000


# The last side of a box of fp32 numbers is 16 bytes at least.
_LAST_EXPONENT = 2

# Tokens of a work item of the backward in one kernel, and of the boxes it walks.
JOINT_KEYS, JOINT_QUERIES = 128, 64

# Queries that each key meets in the mean, from which on that backward pays with 128 columns.
_JOINT_QUERIES_MET = 2048


@dataclass(frozen=True)
class Walk:
    """Boxes of rows (one for each consumer) and of columns, and what the kernel may leave out.

    hides: some box holds a hidden pair.  skips: some consumer sees nothing of a box that the other
    needs.  persistent: each program takes work items in turn, which saves its start and lets loads run
    ahead, but balances nothing.  even: work items are about equally long.
    """

    rows: Box
    columns: Box
    stages: int
    hides: bool
    skips: bool
    consumers: int = 2
    persistent: bool = False
    even: bool = True


@dataclass(frozen=True)
class _Axis:
    """Boxes that one axis visits per consumer and per tile; whether all are whole, and even in number."""

    own: int
    both: int
    whole: bool
    even: bool


def forward_walk(pattern: Pattern, extent: Extent, head_dim: int) -> Walk:
    """Queries are the rows; head_dim is the larger of D and Dv."""
    if head_dim > 128:
        return _best_walk(pattern, extent, 64, 64, 2)
    if head_dim > 64:
        return _best_walk(pattern, extent, 64, 128, 2)
    return _best_walk(pattern, extent, 64, 128, 3, consumers=3)


def list_tiles(head_dim: int) -> tuple[int, int]:
    """Tiles of queries and of keys in lists of the forward."""
    return 128, 64 if head_dim > 128 else 128


def list_walk(q_tile: int, kv_tile: int, head_dim: int, hides: bool) -> Walk:
    """Along lists; head_dim is the larger of D and Dv."""
    stages = 2 if head_dim > 64 else 3
    return Walk((q_tile // 2, 1, 1), (kv_tile, 1, 1), stages, hides, skips=False)


def queries_walk(pattern: Pattern, extent: Extent, head_dim: int) -> Walk:
    """For dQ; queries are the rows."""
    return _best_walk(pattern, extent, 64, 64, 4, consumers=2 if head_dim > 64 else 3)


def keys_walk(pattern: Pattern, extent: Extent, head_dim: int) -> Walk:
    """For dK and dV; keys are the rows."""
    consumers = 2 if head_dim > 64 else 3
    return _best_walk(pattern, extent, 64, 64, 3, consumers=consumers, of_keys=True)


def joint_walk(pattern: Pattern, extent: Extent, head_dim: int, biased: bool = False) -> Walk:
    """For dQ, dK and dV at once; keys are the rows.  biased: by -inf behind the last key."""
    rows, columns = JOINT_KEYS // 2, JOINT_QUERIES
    stages = _joint_stages(head_dim)
    walk = _best_walk(pattern, extent, rows, columns, stages, consumers=2, of_keys=True)
    # Behind the last query are zeros, which add nothing, nor do keys of weight 0.
    hides = walk.hides and not (biased and isinstance(pattern, Dense))
    # Measured: with 128 columns programs that start anew are faster.
    persistent = walk.persistent and head_dim <= 64
    return dataclasses.replace(walk, hides=hides, skips=False, persistent=persistent)


@functools.lru_cache(maxsize=256)
def joint_pays(pattern: Pattern, extent: Extent, head_dim: int) -> bool:
    """Whether one kernel was measured to be faster than two.

    Up to 64 columns it was, everywhere.  Of 128 columns only where a tile of keys meets many boxes: not
    on windows of 1,024 tokens, nor on grids where some pairs of a box are hidden.
    """
    if head_dim <= 64:
        return True
    bounds = pattern.bounds(extent)
    assert bounds is not None, "refuses() lets separable patterns pass only"
    lower, upper = inverse(bounds)
    seen = math.prod(float((b - a).float().mean()) for a, b in zip(lower, upper, strict=True))
    grid = len(lower) > 1 and joint_walk(pattern, extent, head_dim).hides
    return seen >= _JOINT_QUERIES_MET and not grid


def joint_list_walk(hides: bool, head_dim: int) -> Walk:
    """As joint_walk, along lists of tiles of JOINT_KEYS keys and JOINT_QUERIES queries."""
    stages = _joint_stages(head_dim)
    return Walk((JOINT_KEYS // 2, 1, 1), (JOINT_QUERIES, 1, 1), stages, hides, False)


def _joint_stages(head_dim: int) -> int:
    # Up to 64 columns two programs share a processor.
    return 2 if head_dim <= 64 else 3


@functools.lru_cache(maxsize=256)
def _best_walk(
    pattern: Pattern,
    extent: Extent,
    rows: int,
    columns: int,
    stages: int,
    consumers: int = 2,
    of_keys: bool = False,
) -> Walk:
    bounds = pattern.bounds(extent)
    assert bounds is not None, "refuses() lets separable patterns pass only"
    if of_keys:
        bounds = Bounds(Extent(bounds.extent.kv_grid, bounds.extent.q_grid), *inverse(bounds))
    axes = len(bounds.lower)
    measured = functools.lru_cache(maxsize=None)(functools.partial(_axis, bounds))
    best: tuple[float, Walk] | None = None
    for row_box, column_box in itertools.product(_boxes(rows, axes), _boxes(columns, axes)):
        counts = [
            measured(a, row_box[a], column_box[a], consumers if a == 0 else 1) for a in range(axes)
        ]
        # A consumer that skips a box does not save all of its time: the other one runs alone.
        cost = math.prod(c.own for c in counts) + math.prod(c.both for c in counts)
        if best is None or cost < best[0]:
            whole = all(c.whole for c in counts)
            skips = counts[0].own < counts[0].both
            # Measured: it pays on sequences and images, not on volumes.
            even = all(c.even for c in counts)
            persistent = axes < 3 and even
            best = (
                cost,
                Walk(row_box, column_box, stages, not whole, skips, consumers, persistent, even),
            )
    assert best is not None
    return best[1]


def _boxes(tokens: int, axes: int) -> list[Box]:
    """Boxes of so many tokens whose sides are powers of two; axes that are not there have side 1."""
    exponent = tokens.bit_length() - 1
    sides = itertools.product(range(exponent + 1), repeat=axes - 1)
    boxes = []
    for first in sides:
        if sum(first) <= exponent - _LAST_EXPONENT:
            sizes = [1 << e for e in (*first, exponent - sum(first))]
            x, y, z = sizes + [1] * (3 - axes)
            boxes.append((x, y, z))
    return boxes


def _axis(bounds: Bounds, axis: int, row_side: int, column_side: int, consumers: int) -> _Axis:
    tile_side = consumers * row_side
    first_lo, last_lo, first_hi, last_hi = bounds.tile_ends(axis, tile_side)
    both = (-(-(last_hi - first_lo) // column_side)).clamp(min=1)
    whole = bool(
        (
            (first_lo == last_lo)
            & (first_hi == last_hi)
            & (last_hi - first_lo == both * column_side)
        ).all()
    )
    own_lo, _, _, own_hi = bounds.tile_ends(axis, row_side)
    tile = (own_lo.new_tensor(range(len(own_lo)))) // consumers
    start = first_lo[tile]
    begin = (own_lo - start) // column_side
    stop = -(-(own_hi - start) // column_side)
    own = (stop - begin).clamp(min=1)
    even = bool(both.max() <= 1.25 * both.float().mean())
    return _Axis(int(own.sum()), int(both[tile].sum()), whole, even)


@functools.lru_cache(maxsize=256)
def shared_heads(heads: int, groups: int, columns: int, head_dim: int, even: bool = True) -> int:
    """How many heads run together: a divisor of `heads` whose keys and values fit in the cache.

    Not `even`: one head alone would end with its longest items running after all others, so two share
    the cache where that is possible at all.
    """
    per_head = 4 * columns * head_dim
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    bytes_of = {n: -(-n // groups) * per_head for n in divisors}
    best = max((n for n in divisors if bytes_of[n] <= _SHARED_BYTES), default=1)
    if not even and best == 1 and len(divisors) > 1 and bytes_of[divisors[1]] <= _MOST_SHARED_BYTES:
        best = divisors[1]
    return best
