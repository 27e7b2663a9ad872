"""Which pairs each pattern holds, token by token in plain Python, written from the papers' rules.

Nothing here shares code with the library: these functions judge it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Grid = tuple[int, ...]


def mask_of(Lq: int, Lk: int, keys_of: Callable[[int], Sequence[int]]) -> Tensor:
    """bool [Lq, Lk]; `keys_of` gets the position of a query, aligned to the last key."""
    mask = torch.zeros(Lq, Lk, dtype=torch.bool)
    for query in range(Lq):
        for key in keys_of(query + Lk - Lq):
            mask[query, key] = True
    return mask


def place(position: int, grid: Grid) -> tuple[int, ...]:
    """Coordinates of a raster position."""
    coordinates = []
    for length in reversed(grid):
        coordinates.append(position % length)
        position //= length
    return tuple(reversed(coordinates))


def product_mask(grid: Grid, keys_of_axis: Callable[[int, int], Sequence[int]]) -> Tensor:
    """bool [L, L]: a query sees the product of the sets keys_of_axis(axis, coordinate)."""
    tokens = list(itertools.product(*(range(length) for length in grid)))
    index = {token: number for number, token in enumerate(tokens)}
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for number, token in enumerate(tokens):
        sets = [keys_of_axis(axis, i) for axis, i in enumerate(token)]
        for key in itertools.product(*sets):
            mask[number, index[key]] = True
    return mask


def neighborhood_keys(
    L: int, i: int, window: int, stride: int, dilation: int, causal: bool, border: str
) -> list[int]:
    """Keys of token i on an axis of length L: dilation class, leader of the group, window."""
    mates = list(range(i % dilation, L, dilation))
    own = mates.index(i)
    group = own - own % stride
    last = len(mates) - 1
    if causal:
        leader = min(group + stride - 1, last)
        return [mates[x] for x in range(max(0, leader - window + 1), own + 1)]
    leader = min(group + stride // 2, last)
    start = leader - window // 2
    if border == "shift":
        start = max(0, min(start, len(mates) - window))
        return [mates[x] for x in range(start, start + window)]
    if border == "clip":
        return [mates[x] for x in range(start, start + window) if 0 <= x <= last]
    return [mates[x % len(mates)] for x in range(start, start + window)]


def inverse_neighborhood(L: int, x: int, window: int, stride: int, causal: bool) -> range:
    """Queries of one dilation class of length L that see its key x (border shift)."""
    if causal:
        end = L if x + window - 1 >= L - 1 else (x + window) // stride * stride
        return range(x, min(end, L))
    first = 0
    if x >= window:
        first = math.ceil((x - (window - 1 - window // 2) - stride // 2) / stride) * stride
    end = L
    if x < L - window:
        end = (x + window // 2 - stride // 2 + stride) // stride * stride
    return range(first, min(end, L))


def sliding_keys(Lk: int, i: int, left: int, right: int, sink_tokens: int) -> list[int]:
    return [j for j in range(Lk) if j <= i + right and (j >= i - left or j < sink_tokens)]


def partition_keys(L: int, i: int, size: int, shift: int, before: int, after: int) -> list[int]:
    """Keys of token i when the axis is cut at shift, shift + size, shift + 2 size, ..."""
    start = shift
    while start > i:
        start -= size
    while start + size <= i:
        start += size
    return [j for j in range(start - before, start + size + after) if 0 <= j < L]


def strided_keys(Lk: int, i: int, stride: int, causal: bool) -> list[int]:
    return [j for j in range(Lk) if (i - j) % stride == 0 and (j <= i or not causal)]


def fixed_keys(Lk: int, i: int, stride: int, summary: int) -> list[int]:
    return [
        j
        for j in range(Lk)
        if j <= i and (j // stride == i // stride or j % stride in range(stride - summary, stride))
    ]
