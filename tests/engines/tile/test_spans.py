"""Intervals of sequences against the definition of the pattern."""

from __future__ import annotations

import pytest
import torch

import foveal as fv
from foveal.engines.tile.launch import bits
from foveal.engines.tile.spans import spans
from foveal.patterns.base import Extent
from foveal.patterns.documents import Packed
from foveal.patterns.rectangle import Rectangle

GLOBAL = Rectangle((0, 5), (0, 60)) | Rectangle((0, 60), (0, 5))
PATTERNS = [
    (fv.Sliding(7, sink_tokens=3), 60, 60),
    (fv.Sliding(7, 4, sink_tokens=3), 40, 60),
    (fv.Sliding(6, 6) | GLOBAL, 60, 60),
    (Packed(fv.Causal(), (20, 0, 11, 29)) | Rectangle((20, 60), (0, 20)), 60, 60),
    (Packed(fv.Causal(), (20, 1, 10, 29)) | Rectangle((31, 60), (0, 31)), 60, 60),
    ((fv.Sliding(3, 3) | Rectangle((0, 60), (0, 5))) & fv.Causal(), 60, 60),
    (fv.Sliding(2) | Rectangle((50, 60), (10, 20)), 60, 60),
]


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize(("pattern", "Lq", "Lk"), PATTERNS, ids=str)
def test_two_intervals_hold_what_is_seen(
    pattern: fv.Pattern, Lq: int, Lk: int, by_key: bool
) -> None:
    mask = pattern.dense_mask(Lq, Lk)
    mask = mask.mT if by_key else mask
    found = spans(pattern, Extent((Lq,), (Lk,)), by_key)
    assert found is not None
    first, first_stop, second, second_stop = (x[:, None] for x in found)
    other = torch.arange(mask.shape[1])
    near = (other >= first) & (other < first_stop)
    assert torch.equal(near | ((other >= second) & (other < second_stop)), mask)


@pytest.mark.parametrize(
    "pattern",
    [
        fv.Sliding(3) | fv.Strided(7),
        fv.Sliding(2) | Rectangle((0, 60), (5, 9)) | Rectangle((0, 60), (20, 30)),
    ],
    ids=str,
)
def test_more_intervals_are_left_to_bits(pattern: fv.Pattern) -> None:
    assert spans(pattern, Extent((60,), (60,)), False) is None


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("tiles", [(16, 64), (64, 16), (32, 32)])
def test_bits_hold_what_is_seen(tiles: tuple[int, int], by_key: bool) -> None:
    pattern, Lq, Lk = fv.Sliding(3) | fv.Strided(7), 70, 100
    words, marks = bits(pattern, Extent((Lq,), (Lk,)), *tiles, by_key)
    states, mask = pattern.tile_map(Extent((Lq,), (Lk,)), *tiles), pattern.dense_mask(Lq, Lk)
    for i, j in torch.nonzero(states == 1).tolist():
        tile = mask[i * tiles[0] :, j * tiles[1] :][: tiles[0], : tiles[1]]
        own = words[marks[j, i] if by_key else marks[i, j]]
        seen = ((own[:, :, None] >> torch.arange(32)) & 1).flatten(1).bool()
        tile = tile.mT if by_key else tile
        assert torch.equal(seen[: tile.shape[0], : tile.shape[1]], tile)
