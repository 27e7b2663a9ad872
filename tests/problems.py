"""Patterns, scores and shapes that many tests run over, and random ones."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

import foveal as fv
from foveal.testing import LAYOUTS, Layout, Sizes

Grids = tuple[tuple[int, ...], tuple[int, ...]]

PATTERNS: list[tuple[fv.Pattern, Grids]] = [
    (fv.Dense(), ((13,), (13,))),
    (fv.Dense(), ((7,), (19,))),
    (fv.Causal(), ((17,), (17,))),
    (fv.Causal(), ((5,), (18,))),
    (fv.Causal(), ((18,), (5,))),
    (fv.Causal(), ((3, 5), (3, 5))),
    (fv.Sliding(4), ((33,), (33,))),
    (fv.Sliding(3, 2), ((9,), (30,))),
    (fv.Sliding(3, 1, sink_tokens=2), ((21,), (21,))),
    (fv.Sliding(2), ((20,), (6,))),
    (fv.Neighborhood(5), ((23,), (23,))),
    (fv.Neighborhood(4, stride=3, dilation=2), ((19,), (19,))),
    (fv.Neighborhood(5, causal=True), ((6,), (15,))),
    (fv.Neighborhood((3, 4), stride=(2, 1), dilation=(2, 1)), ((7, 9), (7, 9))),
    (fv.Neighborhood((3, 5), causal=(True, False)), ((6, 7), (6, 7))),
    (fv.Neighborhood((3, 2), border="clip"), ((5, 6), (5, 6))),
    (fv.Neighborhood((3, 2), dilation=(1, 2), border=("shift", "wrap")), ((5, 6), (5, 6))),
    (fv.Neighborhood((2, 3, 2), dilation=(1, 1, 2), border="clip"), ((3, 5, 4), (3, 5, 4))),
    (fv.Strided(3), ((17,), (17,))),
    (fv.Strided(4, causal=False), ((11,), (18,))),
    (fv.Fixed(4, 1), ((22,), (22,))),
    (fv.Axial(0), ((5, 6), (5, 6))),
    (fv.Axial(-1, causal=True), ((3, 4, 5), (3, 4, 5))),
    (fv.Partition(4), ((18,), (18,))),
    (fv.Partition((3, 2), shift=(1, 0)), ((7, 5), (7, 5))),
    (fv.Partition(5, 2, before=3, after=1), ((19,), (19,))),
    (fv.Causal() & fv.Strided(2, causal=False), ((15,), (15,))),
    (fv.Sliding(3) | fv.Strided(5), ((21,), (21,))),
    (fv.Axial(0) | fv.Axial(1), ((5, 4), (5, 4))),
    (fv.Axial(0) | fv.Neighborhood((3, 3)), ((9, 11), (9, 11))),
    (fv.Sphere(0.7), ((6, 9), (6, 9))),
    (fv.Sphere(0.7), ((4, 5), (6, 10))),
    (fv.Scales((1, 2, (2, 3), 3), "before"), ((20,), (20,))),
    (fv.Scales((1, 2, (2, 3), 3), window=2), ((20,), (20,))),
    (fv.Tree(torch.tensor([[0, 0, 0, 1, 1, 2, -1], [-1, 0, -1, 0, -1, 0, -1]])), ((7,), (7,))),
    (fv.Rows(torch.tensor([0, 3, 1, 1]), torch.tensor([2, 9, 1, 5])), ((4,), (9,))),
]

ScoreMaker = Callable[[Sizes, fv.Pattern, torch.Generator], fv.Score]


def _lengths(sizes: Sizes) -> tuple[int, int]:
    q, k, _ = sizes.shapes
    return torch.Size(q[1:-2]).numel(), torch.Size(k[1:-2]).numel()


def sink(sizes: Sizes, pattern: fv.Pattern, source: torch.Generator) -> fv.Score:
    return fv.Softmax(sink=torch.randn(sizes.q_heads, generator=source))


def soft_cap(sizes: Sizes, pattern: fv.Pattern, source: torch.Generator) -> fv.Score:
    return fv.Softmax(scale=1.3, soft_cap=1.5)


def bias(sizes: Sizes, pattern: fv.Pattern, source: torch.Generator) -> fv.Score:
    shape = (sizes.batch, sizes.q_heads, *_lengths(sizes))
    return fv.Bias(torch.randn(shape, generator=source))


def shared_bias(sizes: Sizes, pattern: fv.Pattern, source: torch.Generator) -> fv.Score:
    Lq, Lk = _lengths(sizes)
    rows = fv.Bias(torch.randn(1, sizes.q_heads, Lq, 1, generator=source))
    return rows + fv.Bias(torch.randn(sizes.batch, 1, 1, Lk, generator=source))


def key_bias(sizes: Sizes, pattern: fv.Pattern, source: torch.Generator) -> fv.Score:
    _, k, _ = sizes.shapes
    return fv.KeyBias(torch.randn(sizes.batch, k[-2], _lengths(sizes)[1], generator=source))


def alibi(sizes: Sizes, pattern: fv.Pattern, source: torch.Generator) -> fv.Score:
    return fv.Alibi(torch.rand(sizes.q_heads, generator=source))


def relative(sizes: Sizes, pattern: fv.Pattern, source: torch.Generator) -> fv.Score:
    q, k, _ = sizes.shapes
    reach = pattern.reach(fv.Extent(tuple(q[1:-2]), tuple(k[1:-2])))
    table = torch.randn(sizes.q_heads, *(2 * r + 1 for r in reach), generator=source)
    return fv.RelativeBias(table)


def everything(sizes: Sizes, pattern: fv.Pattern, source: torch.Generator) -> fv.Score:
    softmax = fv.Softmax(0.7, 2.0, torch.randn(sizes.q_heads, generator=source))
    makers = (shared_bias, key_bias, relative)
    total: fv.Score = softmax
    for maker in makers:
        total = total + maker(sizes, pattern, source)
    return total


SCORES: dict[str, ScoreMaker] = {
    "softmax": lambda *_: fv.Softmax(),
    "soft_cap": soft_cap,
    "sink": sink,
    "bias": bias,
    "shared_bias": shared_bias,
    "key_bias": key_bias,
    "alibi": alibi,
    "relative": relative,
    "everything": everything,
}


def fits(name: str, grids: Grids) -> bool:
    """Alibi speaks of sequences; relative tables of patterns on one grid or on a sequence."""
    q_grid, kv_grid = grids
    if name == "alibi":
        return len(kv_grid) == 1
    if name in ("relative", "everything"):
        return q_grid == kv_grid or (len(kv_grid) == 1 and q_grid[0] <= kv_grid[0])
    return True


def random_pattern(chance: random.Random, sizes: Sizes) -> fv.Pattern:
    """Any pattern that accepts the extent, combinations included."""
    q, k, _ = sizes.shapes
    extent = fv.Extent(tuple(q[1:-2]), tuple(k[1:-2]))
    while True:
        pattern = _any_pattern(chance, extent.kv_grid)
        try:
            pattern.validate(extent)
        except fv.errors.FovealError:
            continue
        return pattern


def _any_pattern(chance: random.Random, grid: tuple[int, ...]) -> fv.Pattern:
    rank = len(grid)
    kinds = ["neighborhood"] * 3 + ["dense", "causal", "sliding", "strided", "fixed"]
    kinds += ["axial", "partition", "blocks", "and", "or"]
    kind = chance.choice(kinds)
    length = torch.Size(grid).numel()
    if kind == "neighborhood":
        return _random_neighborhood(chance, grid)
    if kind == "axial":
        return fv.Axial(chance.randrange(rank), chance.random() < 0.5)
    if kind == "partition":
        size = tuple(chance.randint(1, n + 1) for n in grid)
        margins = [tuple(chance.choice((0, 0, 1, 3)) for _ in grid) for _ in range(2)]
        return fv.Partition(size, tuple(chance.randrange(n) for n in size), *margins)
    if kind == "sliding":
        return fv.Sliding(*(chance.choice((0, 1, 3, 9, length)) for _ in range(3)))
    if kind == "strided":
        return fv.Strided(chance.randint(1, 6), chance.random() < 0.5)
    if kind == "fixed":
        stride = chance.randint(1, 7)
        return fv.Fixed(stride, chance.randint(1, stride))
    if kind == "blocks":
        blocks = chance.choice((2, 5, 16)), chance.choice((2, 3, 16))
        counts = [-(-length // block) for block in blocks]
        source = torch.Generator().manual_seed(chance.randrange(2**31))
        mask = torch.rand(1, 1, *counts, generator=source) < chance.random()
        return fv.Blocks(fv.BlockSelection.from_block_mask(mask, *blocks))
    if kind == "and":
        return _any_pattern(chance, grid) & _any_pattern(chance, grid)
    if kind == "or":
        return _any_pattern(chance, grid) | _any_pattern(chance, grid)
    return fv.Dense() if kind == "dense" else fv.Causal()


def _random_neighborhood(chance: random.Random, grid: tuple[int, ...]) -> fv.Neighborhood:
    axes = []
    for length in grid:
        dilation = min(chance.choice((1, 1, 2, 3)), length)
        window = chance.randint(1, length // dilation)
        causal = chance.random() < 0.3
        border = chance.choice(("shift", "clip", "wrap"))
        if border == "wrap" and (causal or length % dilation):
            border = "shift"
        axes.append((window, chance.randint(1, window), dilation, causal, border))
    return fv.Neighborhood(*zip(*axes, strict=True))


def random_sizes(chance: random.Random) -> Sizes:
    rank = chance.choice((1, 1, 2, 2, 3))
    grid = tuple(chance.randint(1, {1: 90, 2: 11, 3: 5}[rank]) for _ in range(rank))
    q_grid = grid
    if rank == 1 and chance.random() < 0.4:
        q_grid = (chance.randint(1, 90),)
    kv_heads = chance.choice((1, 2, 3))
    return Sizes(
        q_grid,
        grid,
        batch=chance.choice((1, 1, 2, 3)),
        q_heads=kv_heads * chance.choice((1, 1, 2, 3)),
        kv_heads=kv_heads,
        head_dim=chance.choice((1, 3, 8, 20)),
        value_dim=chance.choice((1, 4, 8, 17)),
    )


def random_score(
    chance: random.Random, sizes: Sizes, pattern: fv.Pattern, source: torch.Generator
) -> fv.Score:
    q, k, _ = sizes.shapes
    names = [name for name in SCORES if fits(name, (q[1:-2], k[1:-2]))]
    return SCORES[chance.choice(names)](sizes, pattern, source)


def random_layout(chance: random.Random) -> Layout:
    return chance.choice(LAYOUTS)
