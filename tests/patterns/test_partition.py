import random

import pytest
import torch

from foveal import Extent, Partition
from foveal.testing import check_pattern
from tests import pattern_rules as rules


def draw(source: torch.Generator, rank: int) -> tuple[Partition, list[tuple[int, ...]]]:
    chance = random.Random(int(torch.randint(0, 2**31, (), generator=source)))
    axes = []
    for _ in range(rank):
        size = chance.randint(1, 7)
        margins = (chance.randint(0, 5), chance.randint(0, 5)) if chance.random() < 0.4 else (0, 0)
        axes.append((size, chance.randrange(size), *margins))
    return Partition(*(tuple(values) for values in zip(*axes, strict=True))), axes


@pytest.mark.parametrize(("grid", "cases"), [((23,), 40), ((7, 9), 30), ((4, 5, 3), 15), ((1,), 3)])
def test_equals_the_rule(grid: tuple[int, ...], cases: int, source: torch.Generator) -> None:
    for _ in range(cases):
        pattern, axes = draw(source, len(grid))
        expected = rules.product_mask(
            grid,
            lambda axis, i, axes=axes: rules.partition_keys(grid[axis], i, *axes[axis]),
        )
        assert torch.equal(pattern.dense_mask(grid, grid), expected), pattern


@pytest.mark.parametrize(("Lq", "Lk"), [(5, 20), (20, 5), (1, 17), (17, 1), (9, 4)])
def test_queries_are_aligned_to_the_last_key(Lq: int, Lk: int) -> None:
    got = Partition(4, 1, 2, 3).dense_mask(Lq, Lk)
    expected = rules.mask_of(Lq, Lk, lambda i: rules.partition_keys(Lk, i, 4, 1, 2, 3))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_keeps_every_promise(rank: int, source: torch.Generator) -> None:
    for seed in range(8):
        check_pattern(draw(source, rank)[0], random_extents=2, seed=seed)


@pytest.mark.parametrize("pattern", [Partition(4), Partition(5, 2), Partition(4, 1, 2, 3)])
def test_keeps_every_promise_with_more_queries_than_keys(pattern: Partition) -> None:
    extents = [Extent((9,), (4,)), Extent((50,), (1,)), Extent((20,), (13,))]
    check_pattern(pattern, extents, random_extents=0)
