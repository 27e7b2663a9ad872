"""The systems of `locality` written a second time, from their equations, in plain PyTorch.

Nothing here uses a pattern, a score or an engine of foveal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Visible = Callable[[int, int], bool]


@dataclass(frozen=True)
class Example:
    """Inputs of an operator, its options, and the same operator by its definition.

    `arguments` makes the positional arguments of the operator from the inputs.
    """

    inputs: tuple[Tensor, ...]
    expected: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    arguments: Callable[..., tuple[Any, ...]] = lambda *inputs: inputs


def softmax_over(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, bias: Tensor | float = 0.0
) -> Tensor:
    """Softmax over the visible pairs; visible [L, L] or [H, L, L], bias likewise."""
    grid, groups = q.shape[1:-2], q.shape[-2] // k.shape[-2]
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1]) + bias
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights.to(v.dtype), v).unflatten(1, grid)


def pairs(length: int, rule: Visible) -> Tensor:
    """The matrix of a rule about one query and one key of a sequence."""
    return torch.tensor([[rule(i, j) for j in range(length)] for i in range(length)])


def tokens(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(n) for n in grid)))


def grid_pairs(
    grid: tuple[int, ...], rule: Callable[[tuple[int, ...], tuple[int, ...]], bool]
) -> Tensor:
    return torch.tensor([[rule(i, j) for j in tokens(grid)] for i in tokens(grid)])


def draw(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


def qkv(
    source: torch.Generator, grid: tuple[int, ...], heads: int = 2, kv_heads: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = kv_heads or heads
    return (
        draw(source, 2, *grid, heads, 5),
        draw(source, 2, *grid, kv_heads, 5),
        draw(source, 2, *grid, kv_heads, 3),
    )


def axis_keys(
    i: int, length: int, window: int, stride: int, dilation: int, causal: bool
) -> set[int]:
    """Keys of token i on one axis, by the index rule of generalised neighborhoods."""
    r, g = i % dilation, i // dilation
    in_class = (length - r + dilation - 1) // dilation
    if causal:
        leader = min((g // stride) * stride + stride - 1, in_class - 1)
        lo, hi = max(leader - (window - 1), 0), g + 1
    else:
        leader = min((g // stride) * stride + stride // 2, in_class - 1)
        lo = min(max(leader - window // 2, 0), in_class - window)
        hi = lo + window
    return {r + dilation * x for x in range(lo, hi)}


def neighborhood(grid: tuple[int, ...], **options: Any) -> Tensor:
    def per_axis(name: str, default: Any) -> tuple[Any, ...]:
        value = options.get(name, default)
        return value if isinstance(value, tuple) else (value,) * len(grid)

    names = (("window", 7), ("stride", 1), ("dilation", 1), ("causal", False))
    rules = list(zip(grid, *(per_axis(*name) for name in names), strict=True))
    keys = [[axis_keys(i, *rule) for i in range(rule[0])] for rule in rules]
    return grid_pairs(
        grid,
        lambda i, j: all(b in keys[axis][a] for axis, (a, b) in enumerate(zip(i, j, strict=True))),
    )


def table_bias(table: Tensor, grid: tuple[int, ...], dilation: int = 1) -> Tensor:
    """bias[h, i, j] = table[h, (j - i) / dilation + reach], 0 where the step is no whole number."""
    rows = []
    for i, j in itertools.product(tokens(grid), repeat=2):
        steps = [(b - a) / dilation for a, b in zip(i, j, strict=True)]
        index = [step + n // 2 for step, n in zip(steps, table.shape[1:], strict=True)]
        inside = all(
            x == int(x) and 0 <= x < n for x, n in zip(index, table.shape[1:], strict=True)
        )
        rows.append(
            table[(slice(None), *map(int, index))] if inside else table.new_zeros(len(table))
        )
    return torch.stack(rows, dim=-1).unflatten(-1, (math.prod(grid), -1))


def na(source: torch.Generator) -> Example:
    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_over(
            q, k, v, neighborhood((7, 5), window=3), table_bias(table.to(q.dtype), (7, 5))
        )

    table = draw(source, 4, 5, 5)
    return Example(qkv(source, (7, 5), 4, 2), expected, {"window": 3, "table": table})


def na_volume(source: torch.Generator) -> Example:
    options = {"window": (2, 3, 4)}
    visible = neighborhood((3, 5, 4), **options)
    return Example(qkv(source, (3, 5, 4)), lambda q, k, v: softmax_over(q, k, v, visible), options)


def fused(source: torch.Generator) -> Example:
    options = {"window": (3, 2), "dilation": (2, 3), "causal": (True, False)}
    visible = neighborhood((7, 8), **options)
    return Example(
        qkv(source, (7, 8), 4, 1), lambda q, k, v: softmax_over(q, k, v, visible), options
    )


def gna(source: torch.Generator) -> Example:
    options = {"window": (4, 3), "stride": (3, 2), "dilation": (1, 2)}
    visible = neighborhood((9, 7), **options)
    return Example(qkv(source, (9, 7)), lambda q, k, v: softmax_over(q, k, v, visible), options)


def gna_line(source: torch.Generator) -> Example:
    options = {"window": 8, "stride": 3, "causal": True}
    visible = neighborhood((20,), **options)
    counts = visible.sum(1).tolist()
    assert counts == [1, 2, 3, 4, 5, 6, 6, 7, 8, 6, 7, 8, 6, 7, 8, 6, 7, 8, 7, 8]
    return Example(qkv(source, (20,)), lambda q, k, v: softmax_over(q, k, v, visible), options)


def medvit(source: torch.Generator) -> Example:
    grid, table = (9, 7), draw(source, 2, 5, 5)
    visible = neighborhood(grid, window=3, dilation=2)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_over(q, k, v, visible, table_bias(table.to(q.dtype), grid, dilation=2))

    return Example(qkv(source, grid), expected, {"window": 3, "dilation": 2, "table": table})


def sliding(source: torch.Generator) -> Example:
    sink = draw(source, 4)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = pairs(11, lambda i, j: i - 2 <= j <= i + 1 or (j < 2 and j <= i + 1))
        # The sink is one more key that every query sees, with a score of its own and the value 0.
        q, k = (torch.cat([x, torch.zeros_like(x[..., :1])], dim=-1) for x in (q, k))
        scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, dim=2)) / math.sqrt(5)
        scores = scores.masked_fill(~visible, -torch.inf)
        last = sink.to(q.dtype)[None, :, None, None].expand(2, -1, 11, 1)
        weights = torch.softmax(torch.cat([scores, last], dim=-1), dim=-1)[..., :-1]
        return torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, dim=2))

    options = {"left": 2, "right": 1, "sink_tokens": 2, "sink": sink}
    return Example(qkv(source, (11,), 4, 2), expected, options)


def look_around(source: torch.Generator) -> Example:
    visible = pairs(13, lambda i, j: -1 <= j // 3 - i // 3 <= 2)
    options = {"window": 3, "look_backward": 1, "look_forward": 2, "causal": False}
    return Example(qkv(source, (13,)), lambda q, k, v: softmax_over(q, k, v, visible), options)


def look_back_exactly(source: torch.Generator) -> Example:
    visible = pairs(13, lambda i, j: i // 3 - 2 <= j // 3 and i - 6 <= j <= i)
    options = {"window": 3, "look_backward": 2, "exact": True}
    return Example(qkv(source, (13,)), lambda q, k, v: softmax_over(q, k, v, visible), options)


def swin(source: torch.Generator) -> Example:
    side, shift, grid = 3, 1, (6, 9)
    table = draw(source, 2, 5, 5)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Roll, attend inside windows to tokens from the same side of the roll, roll back."""
        rolled = (x.roll((-shift, -shift), dims=(1, 2)) for x in (q, k, v))

        def together(i: tuple[int, ...], j: tuple[int, ...]) -> bool:
            window = all(a // side == b // side for a, b in zip(i, j, strict=True))
            region = all(
                (a >= n - shift) == (b >= n - shift) for a, b, n in zip(i, j, grid, strict=True)
            )
            return window and region

        bias = table_bias(table.to(q.dtype), grid)
        return softmax_over(*rolled, grid_pairs(grid, together), bias).roll((shift, shift), (1, 2))

    return Example(qkv(source, grid), expected, {"window": side, "shift": shift, "table": table})


def axial(source: torch.Generator) -> Example:
    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bxyzhd,bxwzhd->bxzhyw", q, k) / math.sqrt(5)
        return torch.einsum("bxzhyw,bxwzhd->bxyzhd", torch.softmax(scores, -1), v)

    return Example(qkv(source, (3, 5, 2)), expected, {"axis": 1})


def dformer_local(source: torch.Generator) -> Example:
    group = (2, 3, 2)
    visible = grid_pairs(
        (4, 5, 3), lambda i, j: all(a // g == b // g for a, b, g in zip(i, j, group, strict=True))
    )
    return Example(
        qkv(source, (4, 5, 3)), lambda q, k, v: softmax_over(q, k, v, visible), {"group": group}
    )


def dformer_global(source: torch.Generator) -> Example:
    gaps = (2, 2, 1)
    visible = grid_pairs(
        (4, 6, 2), lambda i, j: all(a % g == b % g for a, b, g in zip(i, j, gaps, strict=True))
    )
    options = {"group": (2, 3, 7), "scope": "global"}
    return Example(qkv(source, (4, 6, 2)), lambda q, k, v: softmax_over(q, k, v, visible), options)


def tkl(source: torch.Generator) -> Example:
    visible = pairs(17, lambda i, j: 5 * (i // 5) - 2 <= j < 5 * (i // 5) + 7)
    options = {"chunk": 5, "overlap": 2}
    return Example(qkv(source, (17,)), lambda q, k, v: softmax_over(q, k, v, visible), options)


def boxes(source: torch.Generator) -> Example:
    coordinates = torch.cat(
        [
            torch.randint(0, 2, (23, 1), generator=source),
            torch.randint(-5, 9, (23, 3), generator=source),
        ],
        dim=1,
    )
    cells = [(b, z // 4, y // 4, x // 6) for b, z, y, x in coordinates.tolist()]
    visible = pairs(23, lambda i, j: cells[i] == cells[j])
    q, k, v = (x[:1] for x in qkv(source, (23,)))
    return Example(
        (q, k, v),
        lambda q, k, v: softmax_over(q, k, v, visible),
        {"box": (4, 4, 6)},
        lambda q, k, v: (q, k, v, coordinates),
    )


def factor(kind: str, far: bool, length: int) -> Tensor:
    """Stride 4 and two summary positions."""
    rules: dict[tuple[str, bool], Visible] = {
        ("strided", False): lambda i, j: j <= i and i - j < 4,
        ("strided", True): lambda i, j: j <= i and (i - j) % 4 == 0,
        ("fixed", False): lambda i, j: j <= i and j // 4 == i // 4,
        ("fixed", True): lambda i, j: j <= i and (j // 4 == i // 4 or j % 4 in (2, 3)),
    }
    return pairs(length, rules[kind, far])


def sparse(kind: str, arrangement: str) -> Callable[[torch.Generator], Example]:
    def example(source: torch.Generator) -> Example:
        near, far = factor(kind, False, 14), factor(kind, True, 14)
        visible = {
            "merged": near | far,
            "interleaved": far,
            "split": torch.stack([near, near, far, far]),
        }[arrangement]
        options = {
            "kind": kind,
            "stride": 4,
            "summary": 2,
            "arrangement": arrangement,
            "depth": 3,
        }
        return Example(
            qkv(source, (14,), 4, 2), lambda q, k, v: softmax_over(q, k, v, visible), options
        )

    return example


def s2(causal: bool) -> Callable[[torch.Generator], Example]:
    def example(source: torch.Generator) -> Example:
        block, local, vertical, kv_heads = 2, 2, 4, 3

        def rule(h: int, i: int, j: int) -> bool:
            row, column = i // block, j // block
            if h == kv_heads - 1:
                return j <= i or not causal
            if causal:
                step = max(1, vertical // kv_heads)
                chosen = row - column < local or (column + h * step + 1) % vertical == 0
                return chosen and j <= i
            outside = max(0, row - column - local + 1) + max(0, column - row - local + 1)
            return outside % vertical == 0

        heads = [pairs(13, lambda i, j, h=h: rule(h, i, j)) for h in range(kv_heads)]
        visible = torch.stack(heads).repeat_interleave(2, dim=0)
        options = {
            "block": block,
            "local_blocks": local,
            "vert_stride": vertical,
            "offset": 1 if causal else 0,
            "dense_heads": 1,
            "causal": causal,
        }
        return Example(
            qkv(source, (13,), 6, 3), lambda q, k, v: softmax_over(q, k, v, visible), options
        )

    return example


def cross_axis(axis: int) -> Callable[[torch.Generator], Example]:
    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if axis == 0:
            q, k = (x / x.pow(2).sum((2, 4), keepdim=True).sqrt() for x in (q, k))
            scores = torch.einsum("bxyhd,bwyhd->bhxw", q, k)
            return torch.einsum("bhxw,bwyhd->bxyhd", torch.softmax(scores, -1), v) + q
        q, k = (x / x.pow(2).sum((1, 4), keepdim=True).sqrt() for x in (q, k))
        scores = torch.einsum("bxyhd,bxwhd->bhyw", q, k)
        return torch.einsum("bhyw,bxwhd->bxyhd", torch.softmax(scores, -1), v) + q

    def example(source: torch.Generator) -> Example:
        inputs = tuple(draw(source, 2, 5, 3, 2, 4) for _ in range(3))
        return Example(inputs, expected, {"axis": axis})

    return example


def ifact(form: str) -> Callable[[torch.Generator], Example]:
    grid = (3, 4, 2)

    def expected(*inputs: Tensor) -> Tensor:
        v = inputs[6]
        kx, ky, kz = (
            0.5 * torch.einsum("bihd,bjhd->bhij", q, k)
            for q, k in zip(inputs[:3], inputs[3:6], strict=True)
        )
        if form == "chained":
            return torch.einsum("bhzc,bhyw,bhxa,bawchd->bxyzhd", kz, ky, kx, v)
        along = (
            torch.einsum("bhxa,bayzhd->bxyzhd", kx, v),
            torch.einsum("bhyw,bxwzhd->bxyzhd", ky, v),
            torch.einsum("bhzc,bxychd->bxyzhd", kz, v),
        )
        return torch.cat(along, dim=-1)

    def example(source: torch.Generator) -> Example:
        lines = tuple(draw(source, 2, n, 2, 6) for n in (*grid, *grid))
        return Example(
            (*lines, draw(source, 2, *grid, 2, 3)),
            expected,
            {"scale": 0.5, "form": form},
            lambda *inputs: (inputs[:3], inputs[3:6], inputs[6]),
        )

    return example


def demucs(queries: int, keys: int, **chosen: Any) -> Callable[[torch.Generator], Example]:
    window, first = 2, 3

    def sees(i: int, j: int) -> bool:
        centre = keys / queries * i
        offsets = list(range(-window, window + 1))
        if chosen.get("triangular"):
            offsets += [s * t * (t + 1) // 2 for t in range(keys + queries) for s in (1, -1)]
        columns = {min(max(math.trunc(centre + o), 0), keys - 1) for o in offsets}
        if chosen.get(
            "triangular"
        ):  # offsets far away leave the grid, they do not pile up at its end
            far = {math.trunc(centre + o) for o in offsets[2 * window + 1 :]}
            near = {
                min(max(math.trunc(centre + o), 0), keys - 1) for o in offsets[: 2 * window + 1]
            }
            columns = near | {c for c in far if 0 <= c < keys}
        return j in columns or i < int(first * queries / keys) or j < first

    visible = torch.tensor([[sees(i, j) for j in range(keys)] for i in range(queries)])

    def example(source: torch.Generator) -> Example:
        q = draw(source, 2, queries, 4, 5)
        k, v = draw(source, 2, keys, 2, 5), draw(source, 2, keys, 2, 3)
        options = {"window": window, "global_tokens": first, **chosen}
        return Example((q, k, v), lambda q, k, v: softmax_over(q, k, v, visible), options)

    return example


def scale_of(scales: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Scale, row and column of every token."""
    return [(side, *place) for side in scales for place in tokens((side, side))]


def var(source: torch.Generator) -> Example:
    places = scale_of((1, 2, 3, 4))
    visible = pairs(30, lambda i, j: places[j][0] <= places[i][0])
    return Example(
        qkv(source, (30,)), lambda q, k, v: softmax_over(q, k, v, visible), {"scales": (1, 2, 3, 4)}
    )


def hmar(source: torch.Generator) -> Example:
    places = scale_of((1, 2, 3, 4))
    visible = pairs(30, lambda i, j: places[i][0] == places[j][0])
    return Example(
        qkv(source, (30,)), lambda q, k, v: softmax_over(q, k, v, visible), {"scales": (1, 2, 3, 4)}
    )


def mvar(source: torch.Generator) -> Example:
    scales = (1, 2, 5)
    places = scale_of(scales)

    def rule(i: int, j: int) -> bool:
        (side, *query), (other, *key) = places[i], places[j]
        window = min(3, side)
        return side == other and all(
            b in axis_keys(a, side, window, 1, 1, False) for a, b in zip(query, key, strict=True)
        )

    visible = pairs(30, rule)
    options = {"scales": scales, "window": 3}
    return Example(qkv(source, (30,)), lambda q, k, v: softmax_over(q, k, v, visible), options)


def sphere(source: torch.Generator) -> Example:
    rows, columns = 5, 4
    _, weights = np.polynomial.legendre.leggauss(rows)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        areas = torch.tensor(weights).repeat_interleave(columns).to(q.dtype) * 2 * math.pi / columns
        return integral(q, k, v, areas)

    return Example(qkv(source, (rows, columns)), expected, {"latitudes": "gauss-legendre"})


def sphere_equiangular(source: torch.Generator) -> Example:
    rows, columns = 6, 3

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Weights that integrate every polynomial in cos(colatitude) up to degree rows - 1 exactly.
        cosines = np.cos(np.pi * np.arange(rows) / (rows - 1))
        moments = [2 / (n + 1) if n % 2 == 0 else 0.0 for n in range(rows)]
        weights = np.linalg.solve(np.vander(cosines, increasing=True).T, moments)
        areas = torch.tensor(weights).repeat_interleave(columns).to(q.dtype) * 2 * math.pi / columns
        return integral(q, k, v, areas)

    return Example(qkv(source, (rows, columns)), expected)


def sphere_within(source: torch.Generator) -> Example:
    """Points in space, and the angle between them."""
    rows, columns, radius = 7, 8, 0.75
    cosines, weights = np.polynomial.legendre.leggauss(rows)
    theta = torch.tensor(np.arccos(cosines)[::-1].copy()).repeat_interleave(columns)
    phi = (torch.arange(columns) * 2 * math.pi / columns).repeat(rows).double()
    points = torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], dim=-1)
    near = torch.arccos((points @ points.T).clamp(-1, 1)) <= radius * 1.001

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        areas = torch.tensor(weights).repeat_interleave(columns).to(q.dtype) * 2 * math.pi / columns
        return softmax_over(q, k, v, near, areas.log())

    options = {"latitudes": "gauss-legendre", "radius": radius}
    return Example(qkv(source, (rows, columns)), expected, options)


def hdt(source: torch.Generator) -> Example:
    """Two documents of their own make, anchors before what they head, padding behind."""
    texts = ("DSswwswwSsw", "DSsswSsw")
    length = 12
    visible = torch.zeros(2, 1, length, length, dtype=torch.bool)
    for n, text in enumerate(texts):
        sentence = [text[: i + 1].count("s") for i in range(len(text))]
        section = [text[: i + 1].count("S") for i in range(len(text))]
        for i, a in enumerate(text):
            for j, b in enumerate(text):
                inside = a in "sw" and b in "sw" and sentence[i] == sentence[j]
                anchors = a in "sS" and b in "sS" and section[i] == section[j]
                visible[n, 0, i, j] = inside or anchors or (a in "SD" and b in "SD")
    codes = {"w": 1, "s": 2, "S": 3, "D": 4}
    kinds = torch.tensor([[codes[c] for c in text] + [0] * (length - len(text)) for text in texts])

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        blind = ~visible.any(-1, keepdim=True)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~visible, -torch.inf).masked_fill(blind, 0.0)
        weights = scores.softmax(-1).masked_fill(blind, 0.0)
        return torch.einsum("bhij,bjhd->bihd", weights, v)

    from foveal.layers.groups import document_groups

    return Example(qkv(source, (length,)), expected, {"groups": document_groups(kinds)})


def escaip(source: torch.Generator) -> Example:
    atoms, edges, cutoff = 2, 6, 3.0
    distances = 4 * torch.rand(atoms, edges, generator=source, dtype=torch.float64)
    distances[0, 0], distances[1] = 0.5, distances[1].clamp(max=2.9)
    unit = draw(source, atoms, edges, 3)
    unit = unit / unit.norm(dim=-1, keepdim=True)
    weight = draw(source, 2)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = (distances / cutoff).to(q.dtype)
        envelope = torch.where(x < 1, torch.exp(-(x**2) / (1 - x**2)), 0.0)
        angles = torch.einsum("h,aec,afc->ahef", weight, unit, unit).to(q.dtype)
        scores = torch.einsum("aehd,afhd->ahef", q, k) / math.sqrt(q.shape[-1]) + angles
        weights = envelope[:, None, None] * torch.exp(scores)
        return torch.einsum("ahef,afhd->aehd", weights / weights.sum(-1, keepdim=True), v)

    options = {"cutoff": cutoff, "angle_weight": weight, "directions": unit}
    q, k, v = (draw(source, atoms, edges, 2, 5) for _ in range(3))
    return Example(
        (q, k, v),
        expected,
        options,
        lambda q, k, v: (q, k, v, distances.to(q.dtype)),
    )


def integral(q: Tensor, k: Tensor, v: Tensor, areas: Tensor) -> Tensor:
    grid = q.shape[1:-2]
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    weights = areas * torch.exp(torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1]))
    o = torch.einsum("bhij,bjhd->bhid", weights, v) / weights.sum(-1)[..., None]
    return o.transpose(1, 2).unflatten(1, grid)


DEFINITIONS: dict[str, tuple[Callable[[torch.Generator], Example], ...]] = {
    "neighborhood_attention": (na, na_volume),
    "fused_na": (fused,),
    "gna": (gna, gna_line),
    "tcsr_na": (na,),
    "medvit_dina": (medvit,),
    "sliding_window": (sliding,),
    "local_window": (look_around, look_back_exactly),
    "swin_windows": (swin,),
    "axial_attention": (axial,),
    "dilated_window_3d": (dformer_local, dformer_global),
    "tkl_local_attention": (tkl,),
    "box_attention": (boxes,),
    "sparse_transformer": tuple(
        sparse(kind, arrangement)
        for kind in ("strided", "fixed")
        for arrangement in ("split", "interleaved", "merged")
    ),
    "s2_attention": (s2(causal=True), s2(causal=False)),
    "cross_axis_attention": (cross_axis(0), cross_axis(1)),
    "ifactformer": (ifact("parallel"), ifact("chained")),
    "ht_demucs": (
        demucs(12, 12),
        demucs(9, 14),
        demucs(17, 8),
        demucs(15, 15, triangular=True),
        demucs(16, 11, triangular=True),
    ),
    "var": (var,),
    "hmar": (hmar,),
    "mvar": (mvar,),
    "sphere_attention": (sphere, sphere_equiangular, sphere_within),
    "hdt": (hdt,),
    "escaip": (escaip,),
}
