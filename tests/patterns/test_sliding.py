import pytest
import torch

from foveal import Extent, Sliding
from foveal.testing import check_pattern
from tests import pattern_rules as rules

CASES = [
    (0, 0, 0),
    (3, 0, 0),
    (0, 4, 0),
    (5, 2, 0),
    (5, 0, 1),
    (2, 3, 4),
    (60, 0, 0),
    (60, 60, 0),
    (0, 0, 60),
]


@pytest.mark.parametrize(("left", "right", "sink_tokens"), CASES)
@pytest.mark.parametrize(("Lq", "Lk"), [(1, 1), (17, 17), (5, 20), (20, 5), (1, 33), (33, 1)])
def test_equals_the_rule(left: int, right: int, sink_tokens: int, Lq: int, Lk: int) -> None:
    got = Sliding(left, right, sink_tokens).dense_mask(Lq, Lk)
    keys = lambda i: rules.sliding_keys(Lk, i, left, right, sink_tokens)  # noqa: E731
    assert torch.equal(got, rules.mask_of(Lq, Lk, keys))


@pytest.mark.parametrize(("left", "right", "sink_tokens"), CASES)
def test_keeps_every_promise(
    left: int, right: int, sink_tokens: int, source: torch.Generator
) -> None:
    extents = [1, 64, 65, Extent((20,), (50,)), Extent((50,), (20,)), (4, 5)]
    check_pattern(Sliding(left, right, sink_tokens), extents, seed=source.initial_seed())


def test_tile_map_is_exact_without_sink_tokens() -> None:
    for left, right in [(0, 0), (5, 0), (7, 3), (100, 0)]:
        mask = Sliding(left, right).dense_mask(50, 50)
        states = Sliding(left, right).tile_map(Extent((50,), (50,)), 8, 4)
        for row, queries in enumerate(mask.split(8)):
            for column, tile in enumerate(queries.split(4, dim=-1)):
                assert states[row, column] == int(tile.any()) + int(tile.all())
