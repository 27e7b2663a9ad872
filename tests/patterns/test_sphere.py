"""Neighborhoods on the sphere, against the distance of the points in space."""

import math

import numpy as np
import pytest
import torch

import foveal as fv
from foveal.patterns import Sphere
from foveal.patterns.sphere import colatitudes, half_widths
from foveal.testing import check_pattern


def points(rows: int, columns: int, latitudes: str) -> np.ndarray:
    """Unit vectors [rows * columns, 3]."""
    if latitudes == "equiangular":
        theta = np.pi * np.arange(rows) / (rows - 1)
    else:
        theta = np.arccos(np.polynomial.legendre.leggauss(rows)[0])[::-1]
    phi = 2 * np.pi * np.arange(columns) / columns
    theta, phi = np.meshgrid(theta, phi, indexing="ij")
    xyz = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], -1)
    return xyz.reshape(-1, 3)


@pytest.mark.parametrize("latitudes", ["equiangular", "gauss-legendre"])
@pytest.mark.parametrize("radius", [0.05, 0.31, 0.9, 2.2])
@pytest.mark.parametrize("grids", [((9, 14), (9, 14)), ((5, 6), (8, 12)), ((3, 1), (4, 7))])
def test_sees_what_is_within_the_radius(
    latitudes: str, radius: float, grids: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    q, k = (points(*grid, latitudes) for grid in grids)
    distance = np.arccos(np.clip(q @ k.T, -1, 1))
    mask = Sphere(radius, latitudes).dense_mask(*grids).numpy()
    clear = np.abs(distance - radius * 1.001) > 1e-6
    assert (mask == (distance <= radius * 1.001))[clear].all()


def test_default_radius_reaches_the_next_rows() -> None:
    mask = Sphere().dense_mask((7, 8), (7, 8)).view(7, 8, 7, 8)
    assert mask[3, 0, 2:5, 0].all()
    assert not mask[3, 0, 1, 0]
    assert mask[0].all(-1).all(0)[0]


def test_pi_is_dense() -> None:
    extent = fv.Extent((5, 6), (5, 6))
    assert Sphere(math.pi).simplify(extent) == fv.Dense()
    assert Sphere(1.0).simplify(extent) != fv.Dense()


@pytest.mark.parametrize("latitudes", ["equiangular", "gauss-legendre"])
@pytest.mark.parametrize("rows", [2, 4, 5, 7, 16])
def test_the_far_side_is_within_pi(latitudes: str, rows: int) -> None:
    """Opposite points lie pi apart, and c = -1 for them up to a rounding of either sign."""
    for columns in (2, 6, 8):
        assert Sphere(math.pi, latitudes).dense_mask((rows, columns), (rows, columns)).all()


@pytest.mark.parametrize("radius", [0.2, 0.6, 1.4])
def test_keeps_every_promise(radius: float, source: torch.Generator) -> None:
    extents = [(7, 9), (11, 16), fv.Extent((4, 5), (6, 10))]
    check_pattern(Sphere(radius), extents, random_extents=2, seed=source.initial_seed())
    check_pattern(Sphere(radius, "gauss-legendre"), [(6, 7)], random_extents=0)


@pytest.mark.parametrize(
    "pattern", [Sphere(0.3), Sphere(0.8) | fv.Axial(0), Sphere(0.5) & fv.Causal()]
)
def test_tiles_in_the_order_of_boxes_tell_the_truth(pattern: fv.Pattern) -> None:
    grid = (13, 21)
    (part,) = pattern.parts(fv.Extent(grid, grid)) or ()
    places = torch.arange(part.extent.Lq)
    mask = part.pattern.allows(places[:, None], places[None], part.extent)
    order = part.q_tokens[0]
    assert torch.equal(mask, pattern.dense_mask(grid, grid)[order][:, order])
    for tile in ((1, 1), (5, 3), (64, 64), (64, 16)):
        states = part.pattern.tile_map(part.extent, *tile)
        spread = states.repeat_interleave(tile[0], 0)[: len(places)]
        spread = spread.repeat_interleave(tile[1], 1)[:, : len(places)]
        assert not (mask & (spread == 0)).any()
        assert not (~mask & (spread == 2)).any()
        if tile == (1, 1):
            assert torch.equal(spread > 0, mask)


def test_most_tiles_are_skipped() -> None:
    grid = (180, 360)
    (part,) = Sphere(0.03).parts(fv.Extent(grid, grid)) or ()
    states = part.pattern.tile_map(part.extent, 64, 64)
    assert (states > 0).float().mean() < 0.02
    (part,) = Sphere(0.5).parts(fv.Extent(grid, grid)) or ()
    assert (part.pattern.tile_map(part.extent, 64, 64) == 2).any()


def test_rows_near_the_poles_are_seen_whole() -> None:
    half = half_widths(Sphere(0.32), fv.Extent((21, 40), (21, 40)))
    assert half[0, 0] >= 20
    assert half[1, 1] >= 20
    assert half[10, 10] == int(0.32 * 1.001 / (2 * math.pi / 40))
    assert half[10, 0] == -1


def test_gauss_rows_are_the_roots() -> None:
    roots = np.arccos(np.polynomial.legendre.leggauss(9)[0])[::-1]
    np.testing.assert_allclose(colatitudes(9, "gauss-legendre").numpy(), roots, atol=1e-12)


def test_bad_options_are_named() -> None:
    with pytest.raises(fv.errors.PatternError, match="radius"):
        Sphere(0.0)
    with pytest.raises(fv.errors.PatternError, match="latitudes"):
        Sphere(1.0, "mercator")  # type: ignore[arg-type]
    with pytest.raises(fv.errors.PatternError, match="divide"):
        Sphere(1.0).dense_mask((4, 5), (4, 7))
