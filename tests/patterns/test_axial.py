import itertools

import pytest
import torch

from foveal import Axial, Extent
from foveal.testing import check_pattern


@pytest.mark.parametrize("grid", [(9,), (4, 5), (3, 1, 4), (1, 1, 1), (2, 3, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_rule(grid: tuple[int, ...], causal: bool) -> None:
    tokens = list(itertools.product(*(range(n) for n in grid)))
    for axis in range(-len(grid), len(grid)):
        own = axis % len(grid)
        expected = torch.tensor(
            [
                [
                    all(a == b for n, (a, b) in enumerate(zip(q, k, strict=True)) if n != own)
                    and (not causal or k[own] <= q[own])
                    for k in tokens
                ]
                for q in tokens
            ]
        )
        assert torch.equal(Axial(axis, causal).dense_mask(grid, grid), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axis", [0, -1])
def test_keeps_every_promise(axis: int, causal: bool, source: torch.Generator) -> None:
    grids = [(7,), (4, 5), (3, 4, 5), (1, 6)]
    check_pattern(Axial(axis, causal), grids, seed=source.initial_seed())


@pytest.mark.parametrize("causal", [False, True])
def test_keeps_every_promise_on_one_axis_with_few_queries(causal: bool) -> None:
    extents = [Extent((5,), (12,)), Extent((12,), (5,))]
    check_pattern(Axial(0, causal), extents, random_extents=0)
