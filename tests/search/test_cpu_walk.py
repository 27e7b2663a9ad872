"""The walk of the tiled edition as a template: its numbers decide on tiles, and are put back."""

from __future__ import annotations

import pytest
import torch

from foveal.engines.tile import walk
from foveal.patterns.base import Extent
from foveal.search.library import TEMPLATES, template_task
from foveal.search.templates.cpu_walk import PATTERNS, Walk, build


def tiles(pattern: str, extent: Extent) -> tuple[object, int]:
    bounds = PATTERNS[pattern].bounds(extent)
    assert bounds is not None
    return walk.choose_tile(bounds, 4), len(walk.walk(PATTERNS[pattern], extent, 4))


def test_numbers_decide_within_and_not_after() -> None:
    extent = Extent((4096,), (4096,))
    before = tiles("sliding", extent)
    with Walk(calls=walk._CALLS * 100).used():
        larger = tiles("sliding", extent)
    with Walk(sweep=walk._SWEEP_QUERIES // 4).used():
        assert tiles("sliding", extent)[1] > before[1]
    assert larger[0] > before[0]  # type: ignore[operator]
    assert tiles("sliding", extent) == before


@pytest.mark.parametrize("name", ["cpu/sliding", "cpu/neighborhood"])
def test_the_start_is_what_is_shipped_and_all_points_agree(
    name: str, source: torch.Generator
) -> None:
    space = TEMPLATES[name].space
    assert Walk(**space.first) == Walk()  # type: ignore[arg-type]
    assert template_task(name).space is space
    pattern = TEMPLATES[name].fixed["pattern"]
    grid = (300,) if pattern == "sliding" else (19, 17)
    q, k, v = (torch.randn(1, *grid, 2, 16, generator=source) for _ in "qkv")
    exact = build(pattern=pattern, reference=True)(q.double(), k.double(), v.double())
    for numbers in ({}, {"calls": 40000}, {"rows": 72, "sweep": 512}):
        found = build(pattern=pattern, **numbers)(q, k, v)
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)
