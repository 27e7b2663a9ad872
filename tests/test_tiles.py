"""What tiles() lists is what attend() must visit, and what explain() counts."""

from __future__ import annotations

import itertools

import pytest
import torch

import foveal as fv
from foveal.patterns.base import FULL, PARTIAL, SKIPPED
from tests.problems import PATTERNS, Grids

DEVICES = ("cpu", "cuda")


def _inputs(grids: Grids) -> tuple[torch.Tensor, torch.Tensor]:
    q_grid, kv_grid = grids
    return (
        torch.empty(2, *q_grid, 4, 8, device="meta"),
        torch.empty(2, *kv_grid, 2, 8, device="meta"),
    )


def _tokens(grid: tuple[int, ...], start: torch.Tensor, tile: tuple[int, ...]) -> list[int]:
    """Raster indices of a box that starts at a place of the grid."""
    place = start.tolist()
    axes = (range(s, min(s + side, n)) for s, side, n in zip(place, tile, grid, strict=True))
    return [_raster(index, grid) for index in itertools.product(*axes)]


def _raster(index: tuple[int, ...], grid: tuple[int, ...]) -> int:
    place = 0
    for i, n in zip(index, grid, strict=True):
        place = place * n + i
    return place


def _painted(found: fv.Tiles, number: int, shape: tuple[int, int]) -> torch.Tensor:
    """SKIPPED, PARTIAL or FULL for every pair of tokens, by one of the lists."""
    states = torch.full(shape, SKIPPED)
    for entry in found.lists:
        own = min(number, len(entry.states) - 1)
        for row, q_start in enumerate(entry.q_starts):
            queries = _tokens(entry.extent.q_grid, q_start, entry.q_tile)
            visits = zip(entry.k_starts[own, row], entry.states[own, row].tolist(), strict=True)
            for k_start, state in visits:
                if state == SKIPPED:
                    continue
                keys = _tokens(entry.extent.kv_grid, k_start, entry.kv_tile)
                for q_all, k_all in zip(entry.q_tokens, entry.k_tokens, strict=True):
                    states[q_all[queries][:, None], k_all[keys][None]] = state
    return states


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("pattern", "grids"), PATTERNS, ids=str)
def test_counts_are_those_of_explain_and_of_the_lists(
    pattern: fv.Pattern, grids: Grids, device: str
) -> None:
    q, k = _inputs(grids)
    found = fv.tiles(q, k, pattern, device=device)
    assert fv.explain(q, k, k, pattern, device=device).tiles == found.counts
    for kind, count in ((FULL, found.full), (PARTIAL, found.partial)):
        listed = (
            int((each.states == kind).sum()) * len(each.q_tokens) // len(each.states)
            for each in found.lists
        )
        assert sum(listed) == count
    assert found.full + found.partial + found.skipped == found.counts.total


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("pattern", "grids"), PATTERNS, ids=str)
def test_lists_hold_every_visible_pair_and_full_tiles_nothing_else(
    pattern: fv.Pattern, grids: Grids, device: str
) -> None:
    found = fv.tiles(*_inputs(grids), pattern, device=device)
    masks = pattern.dense_mask(*grids)
    masks = masks.reshape(-1, *masks.shape[-2:])
    for number, mask in enumerate(masks):
        states = _painted(found, number, mask.shape)
        assert not bool((mask & (states == SKIPPED)).any())
        assert not bool((~mask & (states == FULL)).any())


def test_packed_documents_bound_the_speed_up() -> None:
    q = torch.empty(1, 1024, 2, 8, device="meta")
    cut = torch.tensor([0, 512, 1024])
    found = fv.tiles(q, q, fv.Dense(), cu_seqlens=cut, device="cuda")
    assert (found.full, found.partial, found.skipped) == (32, 0, 32)
    assert found.speedup_bound == 2.0


def test_key_tiles_of_a_gpu_begin_at_the_window() -> None:
    q = torch.empty(1, 4096, 2, 64, device="meta")
    (entry,) = fv.tiles(q, q, fv.Sliding(200), device="cuda").lists
    middle = entry.k_starts[0, 16]
    assert middle[:, 0].tolist() == [16 * 128 - 200, 16 * 128 - 72, 16 * 128 + 56]
    assert entry.states[0, 16].tolist() == [PARTIAL, PARTIAL, PARTIAL]


def test_bad_input_is_refused_as_by_attend() -> None:
    q = torch.empty(1, 8, 2, 4, device="meta")
    with pytest.raises(fv.errors.PatternError, match="window"):
        fv.tiles(q, q, fv.Neighborhood(9))
    with pytest.raises(fv.errors.PackingError):
        fv.tiles(q, q, cu_seqlens=torch.tensor([0, 5]))
