"""The tiles that the CPU edition visits: every query once, every visible pair, any tile shape."""

import pytest
import torch

import foveal as fv
from foveal.engines.tile import walk
from foveal.testing import Sizes, check_attend, qkv


@pytest.fixture
def fresh_tiles():
    """Tile lists are kept between calls; here they depend on a replaced choice."""
    kept = (walk._box_sweeps, walk._states)
    for cache in kept:
        cache.cache_clear()
    yield
    for cache in kept:
        cache.cache_clear()


@pytest.mark.parametrize(
    ("pattern", "grid", "tiles"),
    [
        (fv.Sliding(5, 2), (37,), [(1,), (7,), (16,), (64,)]),
        (fv.Neighborhood(6, 4), (41,), [(1,), (5,), (32,)]),
        (fv.Neighborhood((5, 4), (2, 1)), (9, 11), [(1, 1), (2, 5), (4, 8), (16, 16)]),
        (fv.Neighborhood((3, 3, 2), border="clip"), (4, 5, 6), [(1, 2, 3), (2, 2, 4), (8, 8, 8)]),
        (fv.Neighborhood((3, 3), dilation=2), (9, 10), [(1, 1), (3, 2)]),
        (fv.Neighborhood((3, 4), border="wrap"), (7, 8), [(1, 1), (3, 5), (16, 16)]),
        (fv.Partition((4, 3), (1, 2), (1, 0), (0, 2)), (9, 8), [(1, 1), (3, 3), (8, 8)]),
    ],
    ids=str,
)
def test_results_do_not_depend_on_the_tile_shape(
    pattern: fv.Pattern,
    grid: tuple[int, ...],
    tiles: list[tuple[int, ...]],
    source: torch.Generator,
    fresh_tiles: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = qkv(Sizes(grid, q_heads=2, kv_heads=1), source, torch.float64)
    for tile in tiles:
        walk._box_sweeps.cache_clear()
        monkeypatch.setattr(walk, "choose_tile", lambda bounds, heads, tile=tile: tile)
        check_attend(q, k, v, pattern, implementation="cpu")


@pytest.mark.parametrize(
    ("pattern", "grid"),
    [
        (fv.Sliding(9), (100,)),
        (fv.Neighborhood((5, 4)), (9, 11)),
        (fv.Strided(3) | fv.Sliding(2), (70,)),
        (fv.Fixed(5, 2), (33,)),
    ],
    ids=str,
)
def test_each_query_belongs_to_one_tile(pattern: fv.Pattern, grid: tuple[int, ...]) -> None:
    extent = fv.Extent(grid, grid)
    seen = torch.zeros(extent.Lq, extent.Lk, dtype=torch.bool)
    rows = []
    for sweep in walk.walk(pattern, extent, 2):
        for tile in sweep.tiles:
            q_tokens, k_tokens = (tokens.flatten() for tokens in tile.tokens())
            visible = torch.ones(len(q_tokens), len(k_tokens), dtype=torch.bool)
            for columns, hidden in tile.mask.pieces if tile.mask is not None else ():
                visible[:, columns] &= ~hidden
            seen[q_tokens[:, None], k_tokens[None]] |= visible
            rows.append(q_tokens)
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(extent.Lq))
    assert torch.equal(seen, pattern.dense_mask(grid, grid))
