"""The map of a picture never hides a visible pair, and counts what it shows."""

import pytest
import torch

import foveal as fv
from foveal.patterns.base import FULL, PARTIAL, SKIPPED
from foveal.probe.visits import tile_sides, tile_volume, visits

CASES = [
    (fv.Dense(), (30,)),
    (fv.Causal(), (41,)),
    (fv.Sliding(12, sink_tokens=2), (64,)),
    (fv.Sliding(8) | fv.Strided(8), (50,)),
    (fv.Strided(7), (61,)),
    (fv.Fixed(12, 3), (55,)),
    (fv.Partition(9, shift=4), (40,)),
    (fv.Partition(8, before=3, after=2), (40,)),
    (fv.Neighborhood(5, border="wrap"), (32,)),
    (fv.Neighborhood((5, 4), dilation=(2, 1)), (13, 11)),
    (fv.Neighborhood((4, 4), stride=(2, 4)), (12, 12)),
    (fv.Axial(0), (6, 9)),
    (fv.Neighborhood((2, 3, 3), causal=(True, False, False)), (3, 5, 6)),
]


@pytest.mark.parametrize(("pattern", "grid"), CASES, ids=lambda value: str(value))
def test_pairs_are_those_of_the_mask(pattern: fv.Pattern, grid: tuple[int, ...]) -> None:
    shown = visits(pattern, fv.Extent(grid, grid))
    assert shown.pairs == int(pattern.dense_mask(grid, grid).sum())
    assert shown.full + shown.partial + shown.skipped == shown.total


@pytest.mark.parametrize(("pattern", "grid"), CASES, ids=lambda value: str(value))
def test_states_agree_with_the_elements(pattern: fv.Pattern, grid: tuple[int, ...]) -> None:
    shown = visits(pattern, fv.Extent(grid, grid), with_elements=True)
    assert shown.elements is not None
    assert int(shown.elements.sum()) == shown.pairs
    for row, (top, bottom) in enumerate(zip(shown.q_edges, shown.q_edges[1:], strict=False)):
        for column, (left, right) in enumerate(zip(shown.k_edges, shown.k_edges[1:], strict=False)):
            tile = shown.elements[top:bottom, left:right]
            state = int(shown.states[row, column])
            if state == SKIPPED:
                assert not tile.any()
            elif state == FULL:
                assert tile.all()
            else:
                assert state == PARTIAL


def test_queries_may_be_fewer_than_keys() -> None:
    shown = visits(fv.Causal(), fv.Extent((10,), (50,)), with_elements=True)
    assert shown.elements is not None
    assert torch.equal(shown.elements, fv.Causal().dense_mask(10, 50))


def test_tiles_stay_few_enough_to_be_seen() -> None:
    for length in (1, 7, 64, 1000, 9216):
        assert -(-length // tile_volume(fv.Extent((length,), (length,)))) <= 40
    assert tile_sides((24, 24), 16) == (4, 4)
    assert tile_sides((32, 32), 32) == (8, 8)
    assert tile_sides((1, 100), 8) == (1, 8)
