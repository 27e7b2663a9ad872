"""The simulator of tiles: published values, and masks counted tile by tile."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random

import pytest
import torch

import foveal as fv
from foveal.cli import main
from foveal.probe.tiles import (
    MACHINES,
    Simulation,
    advice,
    best_tiles,
    interior,
    machine,
    predict,
    report,
    simulate,
)

FLUX, HUNYUAN, LINE = (256, 256), (30, 48, 80), 32768
IMAGE = fv.Neighborhood((80, 80))
VIDEO = fv.Neighborhood((18, 24, 24))


@pytest.mark.parametrize(
    ("pattern", "grid", "tile", "speedup", "flops", "masked"),
    [
        (IMAGE, FLUX, (16, 8), 7.51, 10.24, 0.50),
        (dataclasses.replace(IMAGE, stride=16), FLUX, (16, 8), 10.24, 10.24, 0.0),
        (IMAGE, FLUX, (1, 128), 3.2, 10.24, 1.0),
        (VIDEO, HUNYUAN, (2, 8, 8), 5.44, 11.11, 0.83),
        (dataclasses.replace(VIDEO, stride=(16, 8, 8)), HUNYUAN, (2, 8, 8), 11.11, 11.11, 0.0),
        (fv.Neighborhood(2048), LINE, (128,), 15.11, 16.0, 0.11),
        (fv.Neighborhood(2048, stride=128), LINE, (128,), 15.11, 16.0, 0.11),
        (fv.Neighborhood(2048, stride=256), LINE, (128,), 16.0, 16.0, 0.0),
        (fv.Neighborhood(2048, stride=2048), LINE, (128,), 16.0, 16.0, 0.0),
    ],
)
def test_published_problems(
    pattern: fv.Pattern,
    grid: tuple[int, ...] | int,
    tile: tuple[int, ...],
    speedup: float,
    flops: float,
    masked: float,
) -> None:
    found = simulate(pattern, grid, tile, tile, start="grid")
    assert found.tile_speedup == pytest.approx(speedup, abs=0.006)
    assert found.flop_speedup == pytest.approx(flops, abs=0.006)
    assert found.mask_share == pytest.approx(masked, abs=0.006)
    assert found.perfect == (masked == 0.0)


def test_published_upper_bounds_count_an_interior_tile() -> None:
    assert interior(IMAGE, FLUX, (16, 16), (16, 8)) == pytest.approx(6.095, abs=5e-4)
    assert interior(VIDEO, HUNYUAN, (4, 8, 8), (2, 8, 8)) == pytest.approx(3.273, abs=5e-4)


def counted(pattern: fv.Pattern, grid: tuple[int, ...], found: Simulation) -> tuple[int, int, int]:
    """Visited and full tiles and pairs, by looking at every pair of the mask."""
    mask = pattern.dense_mask(grid, grid).view(*grid, *grid)
    visited = full = 0
    queries = itertools.product(*(range(0, n, t) for n, t in zip(grid, found.q_tile, strict=True)))
    for corner in queries:
        box = tuple(slice(c, c + t) for c, t in zip(corner, found.q_tile, strict=True))
        rows = mask[box].flatten(0, len(grid) - 1)
        seen = torch.nonzero(rows.any(0))
        if not len(seen):
            continue
        low, high = seen.min(0).values.tolist(), seen.max(0).values.tolist()
        starts = []
        for a, t in enumerate(found.kv_tile):
            origin = low[a] if found.start == "window" else low[a] // t * t
            starts.append(range(origin, high[a] + 1, t))
        for start in itertools.product(*starts):
            there = tuple(slice(s, s + t) for s, t in zip(start, found.kv_tile, strict=True))
            tile = rows[(slice(None), *there)]
            inside = [min(t, n - s) for s, t, n in zip(start, found.kv_tile, grid, strict=True)]
            whole = list(tile.shape[1:]) == (
                list(found.kv_tile) if found.start == "window" else inside
            )
            visited += 1
            full += bool(tile.all()) and whole
    return visited, full, int(mask.sum())


@pytest.mark.parametrize("start", ["grid", "window"])
@pytest.mark.parametrize("round_", range(6))
def test_counts_equal_those_of_the_mask(round_: int, start: str, source: torch.Generator) -> None:
    chance = random.Random(source.initial_seed())
    axes = chance.choice((1, 2, 3))
    grid = tuple(chance.randint(3, {1: 40, 2: 12, 3: 6}[axes]) for _ in range(axes))
    rules = []
    for length in grid:
        window = chance.randint(1, length)
        causal = chance.random() < 0.3
        rules.append(
            (window, chance.randint(1, window), 1, causal, chance.choice(("shift", "clip")))
        )
    pattern = fv.Neighborhood(*zip(*rules, strict=True))
    tiles = [tuple(chance.choice((1, 2, 4, 5)) for _ in grid) for _ in range(2)]
    found = simulate(pattern, grid, *tiles, start=start)  # type: ignore[arg-type]
    assert (found.visited, found.full, found.pairs) == counted(pattern, grid, found)


def test_dilation_is_counted_class_by_class() -> None:
    found = simulate(fv.Neighborhood(4, dilation=2), 32, (4,), (4,))
    alone = simulate(fv.Neighborhood(4), 16, (4,), (4,))
    assert (found.visited, found.full, found.pairs) == (
        2 * alone.visited,
        2 * alone.full,
        2 * alone.pairs,
    )


def test_lists_are_counted_from_their_tile_map() -> None:
    pattern = fv.Sliding(5, sink_tokens=2)
    found = simulate(pattern, 64, (8,), (8,))
    assert found.pairs == int(pattern.dense_mask(64, 64).sum())
    assert found.visited == int((pattern.tile_map(fv.Extent((64,), (64,)), 8, 8) > 0).sum())


def test_best_tiles_are_the_best_of_all() -> None:
    best = best_tiles(IMAGE, FLUX)
    assert best.tile_speedup >= simulate(IMAGE, FLUX, (1, 128), (1, 128)).tile_speedup
    assert best.tile_speedup > 8
    assert simulate(IMAGE, FLUX) == best


def test_tiles_at_the_window_never_visit_more() -> None:
    for pattern, grid, tile in ((IMAGE, FLUX, (16, 8)), (VIDEO, HUNYUAN, (2, 8, 8))):
        here = simulate(pattern, grid, tile, tile)
        there = simulate(pattern, grid, tile, tile, start="grid")
        assert here.visited <= there.visited


def test_advice_names_the_stride_that_removes_masks() -> None:
    now = simulate(IMAGE, FLUX, (16, 8), (16, 8), start="grid")
    sentence = advice(IMAGE, FLUX, now=now)[0]
    assert sentence == "stride 16 instead of 1 removes all masking: 1.36x"
    assert advice(dataclasses.replace(IMAGE, stride=16), FLUX) == ()
    assert any("visits no more tiles" in line for line in advice(fv.Neighborhood(13), FLUX))
    assert any("Dense()" in line for line in advice(fv.Neighborhood(63), (64, 64)))
    assert advice(fv.Causal(), 128) == ()


def test_what_it_advises_holds() -> None:
    here = best_tiles(fv.Neighborhood(13), FLUX)
    assert (
        simulate(fv.Neighborhood((13, 17)), FLUX, here.q_tile, here.kv_tile).visited == here.visited
    )


def test_predictions_follow_tiles_and_bytes() -> None:
    h100 = machine("h100")
    image = best_tiles(IMAGE, FLUX)
    full = dataclasses.replace(image, full=image.visited, partial=0)
    assert predict(full, h100, 24, 128) < predict(image, h100, 24, 128)
    assert predict(image, h100, 48, 128) > 1.9 * predict(image, h100, 24, 128)
    tiny = best_tiles(fv.Neighborhood(2), (128,), 16, 16)
    moved = 2 * 128 * (64 + 64) * 2 * 4096
    assert predict(tiny, h100, 64, 64, batch=64) >= moved / h100.bytes_per_second
    with pytest.raises(fv.errors.UnknownNameError, match="h100"):
        machine("h10")


@pytest.mark.parametrize(
    ("pattern", "grid", "heads", "head_dim", "measured"),
    [
        (fv.Dense(), (16384,), 16, 128, 3.157),
        (fv.Causal(), (16384,), 16, 128, 1.600),
        (fv.Dense(), (16384,), 32, 64, 3.824),
        (fv.Sliding(1023), (32768,), 16, 128, 0.550),
        (fv.Neighborhood((25, 25)), (128, 128), 16, 128, 0.302),
        (fv.Neighborhood((13, 13)), FLUX, 8, 64, 0.302),
        (IMAGE, FLUX, 24, 128, 9.59),
        (VIDEO, HUNYUAN, 24, 128, 41.8),
        (fv.Neighborhood(2048), (32768,), 16, 128, 0.949),
    ],
)
def test_predictions_are_near_measured_times(
    pattern: fv.Pattern, grid: tuple[int, ...], heads: int, head_dim: int, measured: float
) -> None:
    """Milliseconds of forward passes on one H100, benchmarks/tile_h100.jsonl and locality_h100.jsonl."""
    h100 = machine("h100")
    seconds = predict(h100.tiles(pattern, grid, head_dim), h100, heads, head_dim)
    assert 1e3 * seconds == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("on", MACHINES, ids=lambda m: m.name)
def test_the_report_says_it_in_words(on: object) -> None:
    text = report(IMAGE, FLUX, heads=24, on=on)  # type: ignore[arg-type]
    for part in ("best tiles", "masked", "by FLOPs", "predicted", "removes all masking"):
        assert part in text


def test_tiles_are_powers_of_two() -> None:
    with pytest.raises(fv.errors.PatternError, match="power of two"):
        best_tiles(IMAGE, FLUX, 100, 128)


def test_explain_gives_the_advice(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["explain", "Neighborhood((32, 32))", "--grid", "128x128", "--no-bound"]
    assert main(call) == 0
    assert "removes all masking" in " ".join(capsys.readouterr().out.split())
    assert main([*call, "--json"]) == 0
    assert "removes all masking" in json.loads(capsys.readouterr().out)["advice"][0]


def test_explain_simulates_a_machine(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["explain", "Neighborhood((80, 80))", "--grid", "256x256", "--heads", "24", "--no-bound"]
    assert main([*call, "--head-dim", "128", "--machine", "h100"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("best tiles of h100", "masked", "by FLOPs", "ms forward predicted"):
        assert part in text
    assert main([*call, "--machine", "h100", "--json"]) == 0
    assert "best tiles" in json.loads(capsys.readouterr().out)["simulated"][0]
    assert main([*call, "--machine", "h10"]) == 2
    assert "h100" in capsys.readouterr().err
