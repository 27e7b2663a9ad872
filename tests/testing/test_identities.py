"""check_pattern accepts what is right and names each promise that a pattern breaks."""

from dataclasses import dataclass

import pytest
import torch

import foveal as fv
from foveal.patterns.base import FULL, Bounds
from foveal.testing import check_pattern


@dataclass(frozen=True)
class Window(fv.Pattern):
    """A user's own pattern: two keys back, nothing but the definition."""

    def allows(self, q_pos, k_pos, extent):
        return (k_pos <= q_pos) & (k_pos >= q_pos - 2)


class Spoilt(Window):
    """The same with one promise broken by each subclass."""


class WrongBounds(Spoilt):
    def bounds(self, extent):
        return fv.Sliding(3).bounds(extent)


class FallingBounds(Spoilt):
    def allows(self, q_pos, k_pos, extent):
        return k_pos >= q_pos

    def bounds(self, extent):
        place = extent.q_positions()
        hi = torch.full_like(place, extent.Lk)
        return Bounds(extent, (place.flip(0),), (hi,))


class WrongSimplify(Spoilt):
    def simplify(self, extent):
        return fv.Causal()


class SkippedTile(Spoilt):
    def tile_map(self, extent, q_tile, kv_tile):
        return super().tile_map(extent, q_tile, kv_tile) * 0


class FullTile(Spoilt):
    def tile_map(self, extent, q_tile, kv_tile):
        return super().tile_map(extent, q_tile, kv_tile).clamp(max=1) * FULL


class WrongParts(Spoilt):
    def parts(self, extent):
        return fv.Strided(2).parts(extent)


class WrongList(Spoilt):
    def allows_listed(self, q_pos, k_pos, extent):
        return super().allows_listed(q_pos, k_pos, extent) | True


class ShortReach(Spoilt):
    def reach(self, extent):
        return (1,)


class LocalDefinition(Spoilt):
    """Judges a pair by the whole call."""

    def allows(self, q_pos, k_pos, extent):
        return super().allows(q_pos, k_pos, extent) & (k_pos != k_pos.flatten()[0])


class NoBool(Spoilt):
    def allows(self, q_pos, k_pos, extent):
        return super().allows(q_pos, k_pos, extent).float()


def test_accepts_a_pattern_with_nothing_but_a_definition() -> None:
    check_pattern(Window(), [20, (3, 4), fv.Extent((3,), (9,))])


@pytest.mark.parametrize(
    ("pattern", "promise"),
    [
        (WrongBounds(), "`bounds` describe"),
        (FallingBounds(), "lower and upper never decrease|lower <= upper"),
        (WrongSimplify(), "`simplify` keeps"),
        (SkippedTile(), "no visible pair is in a skipped tile"),
        (FullTile(), "no hidden pair is in a full tile"),
        (WrongParts(), "`parts` hold"),
        (WrongList(), "`allows_listed` equals"),
        (ShortReach(), "beyond `reach`"),
        (LocalDefinition(), "each pair on its own"),
        (NoBool(), "returns bool"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_names_the_broken_promise(pattern: fv.Pattern, promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_pattern(pattern, [20])


def test_names_the_first_pair() -> None:
    with pytest.raises(AssertionError, match="by `allows`, query 3 does not see key 0"):
        check_pattern(WrongBounds(), [20], random_extents=0)


def test_says_when_no_extent_fits() -> None:
    with pytest.raises(AssertionError, match="name some in `extents`"):
        check_pattern(fv.Neighborhood(500))
    with pytest.raises(fv.errors.PatternError, match="window"):
        check_pattern(fv.Neighborhood(500), [20])
