"""Keys with a lifetime of their own: what they mean, that the tiled edition walks them, what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import foveal as fv
from foveal.testing import check_pattern


def ends(source: torch.Generator, length: int, heads: int = 2) -> torch.Tensor:
    return torch.arange(length) + torch.randint(-2, length, (1, heads, length), generator=source)


@pytest.mark.parametrize("length", [9, 150])
def test_what_it_says_of_itself_is_its_definition(length: int, source: torch.Generator) -> None:
    pattern = fv.Lifetimes(ends(source, length))
    grids = [fv.Extent((n,), (length,)) for n in (length, length - 7)]
    for chosen in (pattern, pattern & fv.Sliding(11)):
        check_pattern(chosen, extents=grids, random_extents=0)


def test_known_patterns_are_lifetimes() -> None:
    place = torch.arange(20)
    whole = fv.Lifetimes(torch.full((1, 1, 20), 20))
    assert torch.equal(whole.dense_mask(20, 20)[0, 0], fv.Causal().dense_mask(20, 20))
    window = fv.Lifetimes((place + 4)[None, None])
    assert torch.equal(window.dense_mask(20, 20)[0, 0], fv.Sliding(4).dense_mask(20, 20))
    hidden = fv.Lifetimes((place - 1)[None, None])
    assert not hidden.dense_mask(20, 20).any()


def test_equal_content_is_equal(source: torch.Generator) -> None:
    found = ends(source, 12)
    assert fv.Lifetimes(found) == fv.Lifetimes(found.clone())
    assert fv.Lifetimes(found) != fv.Lifetimes(found + 1)
    assert fv.Lifetimes(found).key == fv.Lifetimes(found.int()).key


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fv.Lifetimes(torch.zeros(3, dtype=torch.int64)), "integers"),
        (lambda: fv.Lifetimes(torch.zeros(1, 1, 3)), "integers"),
        (
            lambda: fv.attend(
                *(torch.zeros(1, 4, 2, 3),) * 3, fv.Lifetimes(torch.zeros(1, 2, 3).long())
            ),
            "each of 4 keys",
        ),
        (
            lambda: fv.attend(
                *(torch.zeros(1, 4, 4, 3),) * 3, fv.Lifetimes(torch.zeros(1, 3, 4).long())
            ),
            "heads",
        ),
    ],
)
def test_bad_ends_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(fv.errors.SelectionError, match=message):
        make()
