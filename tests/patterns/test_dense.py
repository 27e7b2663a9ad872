import pytest
import torch

from foveal import Causal, Dense, Extent
from foveal.testing import check_pattern


@pytest.mark.parametrize(("Lq", "Lk"), [(1, 1), (7, 7), (3, 8), (8, 3), (1, 6), (6, 1)])
def test_dense_and_causal_equal_the_rule(Lq: int, Lk: int) -> None:
    expected = torch.tensor([[j <= i + Lk - Lq for j in range(Lk)] for i in range(Lq)])
    assert torch.equal(Causal().dense_mask(Lq, Lk), expected)
    assert bool(Dense().dense_mask(Lq, Lk).all())


@pytest.mark.parametrize("pattern", [Dense(), Causal()])
def test_keeps_every_promise(pattern: Dense | Causal, source: torch.Generator) -> None:
    extents = [
        1,
        70,
        (4, 5),
        (2, 3, 4),
        Extent((5,), (9,)),
        Extent((9,), (5,)),
        Extent((2, 2), (3, 3)),
    ]
    check_pattern(pattern, extents, seed=source.initial_seed())
