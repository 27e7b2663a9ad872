import pytest
import torch

import foveal as fv
from foveal.patterns import Rows
from foveal.testing import check_pattern


def test_sees_its_interval(source: torch.Generator) -> None:
    ends = torch.randint(0, 31, (2, 20), generator=source)
    for lower, upper in (ends, ends.sort(1).values):
        pattern, extent = Rows(lower, upper), fv.Extent((20,), (30,))
        j = torch.arange(30)
        expected = (j >= lower[:, None]) & (j < upper[:, None])
        assert torch.equal(pattern.dense_mask(20, 30), expected)
        check_pattern(pattern, [extent], random_extents=0)


def test_intervals_that_ascend_are_separable() -> None:
    i = torch.arange(9)
    pattern, extent = Rows(i * 0, i + 1), fv.Extent((9,), (9,))
    bounds = pattern.bounds(extent)
    assert bounds is not None
    assert bounds.pairs == 45
    assert torch.equal(pattern.dense_mask(9, 9), fv.Causal().dense_mask(9, 9))
    assert Rows(i.flip(0), i + 9).bounds(extent) is None


def test_equal_by_content() -> None:
    i = torch.arange(4)
    assert Rows(i, i + 1) == Rows(i.clone(), (i + 1).to(torch.int32))
    assert len({Rows(i, i + 1), Rows(i, i + 1), Rows(i, i + 2)}) == 2


def test_bad_ends_are_named() -> None:
    i = torch.arange(4)
    with pytest.raises(fv.errors.PatternError, match="upper"):
        Rows(i, torch.arange(3))
    with pytest.raises(fv.errors.PatternError, match="5 queries"):
        Rows(i, i + 1).dense_mask(5, 5)
    with pytest.raises(fv.errors.PatternError, match="upper"):
        Rows(i, i + 2).dense_mask(4, 4)
