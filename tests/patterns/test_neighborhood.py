import functools
import random

import pytest
import torch

from foveal import Extent, Neighborhood
from foveal.testing import check_pattern
from tests import pattern_rules as rules


def draw_axis(chance: random.Random, longest: int) -> tuple:
    """Length, window, stride, dilation, causal, border of one axis, awkward ones included."""
    length = chance.randint(1, longest)
    dilation = min(chance.choice((1, 1, 2, 3)), length)
    window = chance.randint(1, length // dilation)
    stride = chance.randint(1, window)
    causal = chance.random() < 0.3
    border = chance.choice(("shift", "shift", "clip", "wrap"))
    if border == "wrap" and (causal or length % dilation):
        border = "clip"
    return length, window, stride, dilation, causal, border


def window_keys(length: int, options: list, i: int) -> list[int]:
    return rules.neighborhood_keys(length, i, *options)


@pytest.fixture
def chance(source: torch.Generator) -> random.Random:
    return random.Random(source.initial_seed())


@pytest.mark.parametrize(("rank", "longest", "cases"), [(1, 40, 200), (2, 9, 60), (3, 5, 30)])
def test_equals_the_index_rule(chance: random.Random, rank: int, longest: int, cases: int) -> None:
    for _ in range(cases):
        axes = [draw_axis(chance, longest) for _ in range(rank)]
        grid, *options = (tuple(values) for values in zip(*axes, strict=True))
        pattern = Neighborhood(*options)
        expected = rules.product_mask(
            grid, lambda a, i, axes=axes: rules.neighborhood_keys(axes[a][0], i, *axes[a][1:])
        )
        assert torch.equal(pattern.dense_mask(grid, grid), expected), (pattern, grid)


def test_one_axis_with_fewer_queries_equals_the_last_rows(chance: random.Random) -> None:
    for _ in range(60):
        length, *options = draw_axis(chance, 40)
        queries = chance.randint(1, length)
        pattern = Neighborhood(*options)
        got = pattern.dense_mask((queries,), (length,))
        keys = functools.partial(window_keys, length, options)
        expected = rules.mask_of(queries, length, keys)
        assert torch.equal(got, expected), (pattern, queries, length)


def test_inverse_rule_is_the_transpose(chance: random.Random) -> None:
    for _ in range(200):
        length, window, stride, _, causal, _ = draw_axis(chance, 40)
        if window > length:
            continue
        mask = Neighborhood(window, stride, causal=causal).dense_mask(length, length)
        for key in range(length):
            queries = rules.inverse_neighborhood(length, key, window, stride, causal)
            assert torch.nonzero(mask[:, key])[:, 0].tolist() == list(queries)


def test_published_rows() -> None:
    strided = Neighborhood(4, stride=4).dense_mask(14, 14)
    assert torch.nonzero(strided[12])[:, 0].tolist() == [10, 11, 12, 13]
    causal = Neighborhood(8, stride=3, causal=True).dense_mask(20, 20)
    assert causal.sum(-1).tolist() == [
        1, 2, 3, 4, 5, 6, 6, 7, 8, 6, 7, 8, 6, 7, 8, 6, 7, 8, 7, 8,
    ]  # fmt: skip


def test_a_token_that_is_not_causal_sees_the_whole_window(chance: random.Random) -> None:
    for _ in range(100):
        length, window, stride, dilation, _, _ = draw_axis(chance, 40)
        mask = Neighborhood(window, stride, dilation).dense_mask(length, length)
        assert bool((mask.sum(-1) == window).all())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_keeps_every_promise(chance: random.Random, rank: int) -> None:
    for _ in range({1: 25, 2: 12, 3: 8}[rank]):
        axes = [draw_axis(chance, {1: 40, 2: 9, 3: 5}[rank]) for _ in range(rank)]
        grid, *options = (tuple(values) for values in zip(*axes, strict=True))
        check_pattern(Neighborhood(*options), [grid], random_extents=1, seed=chance.randint(0, 999))


def test_one_number_means_every_axis() -> None:
    each = Neighborhood((3, 3), (2, 2), (1, 1), (False, False), ("clip", "clip"))
    assert torch.equal(
        Neighborhood(3, 2, border="clip").dense_mask((7, 5), (7, 5)),
        each.dense_mask((7, 5), (7, 5)),
    )


def test_a_wide_axis_far_beyond_int32() -> None:
    """The rule holds where positions need 64 bits; no tensor of the length is made."""
    length = 2**33 + 5
    extent = Extent((length,), (length,))
    query = 2**32 + 3
    keys = torch.tensor([query - 13, query - 12, query - 11, query, query + 12, query + 14])
    seen = Neighborhood(13, dilation=2).allows(torch.tensor([query])[:, None], keys[None], extent)
    assert seen.tolist() == [[False, True, False, True, True, False]]
