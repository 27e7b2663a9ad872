import pytest
import torch

import foveal as fv
from foveal.patterns import Scales
from foveal.testing import check_pattern
from tests.pattern_rules import mask_of, neighborhood_keys, place

PICTURE = (1, 2, (2, 3), 4, 2)
SIZES = [1, 4, 6, 16, 4]
GRIDS = [(1, 1), (2, 2), (2, 3), (4, 4), (2, 2)]
TOTAL = sum(SIZES)


def owner(i: int) -> tuple[int, int]:
    """Number of the grid of a token, and where the grid begins."""
    start = 0
    for number, size in enumerate(SIZES):
        if i < start + size:
            return number, start
        start += size
    raise AssertionError


def keys(i: int, sees: str, window: int | None) -> list[int]:
    number, start = owner(i)
    own = range(start, start + SIZES[number])
    if sees == "before":
        return list(range(start + SIZES[number]))
    if window is None:
        return list(own)
    grid = GRIDS[number]
    here = place(i - start, grid)
    lines = [
        neighborhood_keys(n, at, min(window, n), 1, 1, False, "shift")
        for n, at in zip(grid, here, strict=True)
    ]
    return [
        j
        for j in own
        if all(p in line for p, line in zip(place(j - start, grid), lines, strict=True))
    ]


@pytest.mark.parametrize(
    ("sees", "window"), [("own", None), ("before", None), ("own", 3), ("own", 2)]
)
def test_sees_its_grids(sees: str, window: int | None) -> None:
    pattern = Scales(PICTURE, sees, window)  # type: ignore[arg-type]
    expected = mask_of(TOTAL, TOTAL, lambda i: keys(i, sees, window))
    assert torch.equal(pattern.dense_mask(TOTAL, TOTAL), expected)
    check_pattern(pattern, [TOTAL], random_extents=0)


def test_published_densities() -> None:
    for sides, own, before in (
        ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 0.239, 0.619),
        ((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), 0.303, 0.652),
    ):
        length = sum(side * side for side in sides)
        extent = fv.Extent((length,), (length,))
        for sees, share in (("own", own), ("before", before)):
            bounds = Scales(sides, sees).bounds(extent)  # type: ignore[arg-type]
            assert bounds is not None
            assert bounds.pairs / length**2 == pytest.approx(share, abs=6e-4)


def test_single_tokens_are_causal() -> None:
    mask = Scales((1,) * 7, "before").dense_mask(7, 7)
    assert torch.equal(mask, fv.Causal().dense_mask(7, 7))


def test_bad_options_are_named() -> None:
    with pytest.raises(fv.errors.PatternError, match="window"):
        Scales((1, 2), "before", 3)
    with pytest.raises(fv.errors.PatternError, match="sees"):
        Scales((1, 2), "after")  # type: ignore[arg-type]
    with pytest.raises(fv.errors.PatternError, match="sides"):
        Scales((1, 0))
    with pytest.raises(fv.errors.PatternError, match="5 queries"):
        Scales((1, 3)).dense_mask(5, 5)
