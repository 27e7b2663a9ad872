"""Every layer agrees with its equations, written out with its own weights; all gradients too."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, instance_norm, layer_norm, linear, relu

import foveal as fv
from foveal import layers
from foveal.layers.factorised_axes import rotate
from foveal.layers.groups import document_groups
from foveal.layers.sphere import latitude_weights
from tests.systems.definitions import (
    factor,
    grid_pairs,
    integral,
    neighborhood,
    pairs,
    softmax_over,
    table_bias,
)

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def seeded(layer: Any, source: torch.Generator) -> Any:
    """The layer in float64, every parameter drawn anew so that none is zero."""
    layer = layer.double()
    for parameter in layer.parameters():
        noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
        parameter.data.copy_(0.4 * noise)
    return layer


def draw(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64).requires_grad_()


def assert_same(layer: nn.Module, got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Outputs, and the gradients of the inputs and of every parameter."""
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
    at = (*inputs, *layer.parameters())
    weight = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    gradients = (
        torch.autograd.grad(o, at, weight, materialize_grads=True) for o in (got, expected)
    )
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


def projected(layer: Any, x: Tensor, mix: Mix) -> Tensor:
    """Projection to heads, `mix`, and back, by the weights of a layer."""
    q, k, v = (
        linear(x, weight, bias).unflatten(-1, (layer.heads, -1))
        for weight, bias in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True)
    )
    return linear(mix(q, k, v).flatten(-2), layer.proj.weight, layer.proj.bias)


def masked(visible: Tensor, bias: Tensor | float = 0.0) -> Mix:
    return lambda q, k, v: softmax_over(q, k, v, visible, bias)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((11,), {"window": 4, "causal": True}),
        ((6, 5), {"window": (3, 4), "stride": (2, 1)}),
        ((7, 9), {"window": 3, "dilation": (2, 3)}),
        ((3, 4, 3), {"window": (2, 3, 3)}),
    ],
)
def test_neighborhood_layer(
    grid: tuple[int, ...], options: dict[str, Any], source: torch.Generator
) -> None:
    layer = layers.NeighborhoodAttention(6, 2, axes=len(grid), relative_bias=False, **options)
    seeded(layer, source)
    x = draw(source, 2, *grid, 6)
    expected = projected(layer, x, masked(neighborhood(grid, **options)))
    assert_same(layer, layer(x), expected, x)


def test_neighborhood_layer_with_table(source: torch.Generator) -> None:
    layer = seeded(layers.NeighborhoodAttention(6, 2, 3, axes=2, dilation=2), source)
    x, grid = draw(source, 2, 6, 7, 6), (6, 7)
    bias = table_bias(layer.table, grid, dilation=2)
    expected = projected(layer, x, masked(neighborhood(grid, window=3, dilation=2), bias))
    assert_same(layer, layer(x), expected, x)


def test_projections_can_be_left_out(source: torch.Generator) -> None:
    layer = layers.NeighborhoodAttention(6, 2, 3, qkv_bias=False, out_proj=False, dropout=0.5)
    names = {name for name, _ in layer.named_parameters()}
    assert names == {"table", "qkv.weight"}
    x = torch.randn(1, 4, 4, 6, generator=source)
    assert torch.equal(layer.eval()(x), layer(x))
    with pytest.raises(fv.errors.ShapeError, match="divisor"):
        layers.NeighborhoodAttention(6, 4, 3)


@pytest.mark.parametrize("released", [False, True])
def test_medvit_layer(released: bool, source: torch.Generator) -> None:
    layer = seeded(layers.MedViTAttention(4, 3, head_dim=2, released_layout=released), source)
    x, grid = draw(source, 2, 4, 5, 4), (5, 4)
    normed = layer.norm(x)
    bias = table_bias(layer.attention.table, grid)
    mix = masked(neighborhood(grid, window=3), bias)
    if released:
        y = projected(layer.attention, normed.reshape(2, 5, 4, 4), mix).reshape(2, 4, 5, 4)
    else:
        y = projected(layer.attention, normed.permute(0, 2, 3, 1), mix).permute(0, 3, 1, 2)
    assert_same(layer, layer(x), x + y, x)


@pytest.mark.parametrize("shift", [0, 1])
def test_swin_layer(shift: int, source: torch.Generator) -> None:
    layer, grid = seeded(layers.SwinWindowAttention(6, 2, window=3, shift=shift), source), (6, 9)
    x = draw(source, 1, *grid, 6)

    def together(i: tuple[int, ...], j: tuple[int, ...]) -> bool:
        return all(
            a // 3 == b // 3 and (a >= n - shift) == (b >= n - shift)
            for a, b, n in zip(i, j, grid, strict=True)
        )

    mix = masked(grid_pairs(grid, together), table_bias(layer.table, grid))
    rolled = projected(layer, x.roll((-shift, -shift), (1, 2)), mix)
    assert_same(layer, layer(x), rolled.roll((shift, shift), (1, 2)), x)


def test_axial_layer(source: torch.Generator) -> None:
    layer, grid = seeded(layers.AxialAttention(4, 2, axes=(1, 0), causal=True), source), (3, 4)
    x = draw(source, 2, *grid, 4)
    columns = grid_pairs(grid, lambda i, j: i[0] == j[0] and j[1] <= i[1])
    rows = grid_pairs(grid, lambda i, j: i[1] == j[1] and j[0] <= i[0])
    expected = x + projected(layer.lines[0], x, masked(columns))
    expected = expected + projected(layer.lines[1], expected, masked(rows))
    assert_same(layer, layer(x), expected, x)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_dilated_window_layer(scope: Any, source: torch.Generator) -> None:
    layer, grid = seeded(layers.DilatedWindowAttention(4, 2, (2, 2, 7), scope), source), (4, 6, 2)
    gaps = (2, 3, 1)

    def together(i: tuple[int, ...], j: tuple[int, ...]) -> bool:
        if scope == "local":
            return i[0] // 2 == j[0] // 2 and i[1] // 2 == j[1] // 2
        return all(a % g == b % g for a, b, g in zip(i, j, gaps, strict=True))

    x = draw(source, 2, *grid, 4)
    expected = projected(layer, x, masked(grid_pairs(grid, together)))
    assert_same(layer, layer(x), expected, x)


@pytest.mark.parametrize("kind", ["strided", "fixed"])
def test_sparse_transformer_layer(kind: Any, source: torch.Generator) -> None:
    layer = seeded(layers.SparseTransformerAttention(8, 4, kind, stride=4, summary=2), source)
    x = draw(source, 2, 14, 8)
    near, far = factor(kind, False, 14), factor(kind, True, 14)
    expected = projected(layer, x, masked(torch.stack([near, near, far, far])))
    assert_same(layer, layer(x), expected, x)


@pytest.mark.parametrize("kind", ["strided", "fixed"])
@pytest.mark.parametrize("length", [3, 16, 17])
def test_united_factors(kind: Any, length: int, source: torch.Generator) -> None:
    options = {"stride": 4, "summary": 2, "arrangement": "merged"}
    layer = seeded(layers.SparseTransformerAttention(8, 4, kind, **options), source)
    x = draw(source, 2, length, 8)
    either = factor(kind, False, length) | factor(kind, True, length)
    assert_same(layer, layer(x), projected(layer, x, masked(either)), x)


def test_sharded_layer(source: torch.Generator) -> None:
    layer = seeded(
        layers.ShardedAttention(8, 4, block=2, local_blocks=2, vert_stride=4, dense_heads=1), source
    )
    visible = torch.zeros(4, 15, 15, dtype=torch.bool)
    for h, i, j in itertools.product(range(4), range(15), range(15)):
        local = i // 2 - j // 2 < 2
        visible[h, i, j] = j <= i and (local or (j // 2 + h) % 4 == 0 or h == 3)
    x = draw(source, 2, 15, 8)
    assert_same(layer, layer(x), projected(layer, x, masked(visible)), x)


@pytest.mark.parametrize("other", [None, 7])
def test_diagonal_layer(other: int | None, source: torch.Generator) -> None:
    layer = seeded(layers.DiagonalAttention(6, 2, window=2, global_tokens=1), source)
    x = draw(source, 2, 11, 6)
    y = x if other is None else draw(source, 2, other, 6)
    keys = y.shape[1]
    visible = torch.zeros(11, keys, dtype=torch.bool)
    for i in range(11):
        at = {min(max(math.trunc(keys / 11 * i + o), 0), keys - 1) for o in range(-2, 3)}
        visible[i, [0, *at]] = True
    visible[: int(11 / keys)] = True
    q = linear(x, layer.q.weight, layer.q.bias).unflatten(-1, (2, 3))
    k, v = linear(y, layer.kv.weight, layer.kv.bias).unflatten(-1, (2, 2, 3)).unbind(2)
    expected = linear(masked(visible)(q, k, v).flatten(-2), layer.proj.weight, layer.proj.bias)
    assert_same(layer, layer(x, None if other is None else y), expected, *{x, y})


def encoded(layer: Any, x: Tensor, visible: Tensor) -> Tensor:
    """Every layer of an encoder, with a mask."""
    for each in layer.layers:
        first, second = each.feed_forward[0], each.feed_forward[3]
        x = each.norms[0](x + projected(each.attention, x, masked(visible)))
        hidden = relu(linear(x, first.weight, first.bias))
        x = each.norms[1](x + linear(hidden, second.weight, second.bias))
    return x


def test_chunked_encoder(source: torch.Generator) -> None:
    """Pad left, cut chunks with their margins, encode each alone, keep the middles."""
    layer = seeded(layers.ChunkedEncoder(4, 2, chunk=4, overlap=2, hidden=5), source)
    x, lengths = draw(source, 3, 11, 4), (11, 5, 0)
    rows = []
    for row, length in zip(x, lengths, strict=True):
        padded = torch.cat([row.new_zeros(2, 4), row, row.new_zeros(6, 4)])
        kept = []
        for start in range(0, 11, 4):
            chunk = padded[start : start + 8] + layer.positions
            present = torch.tensor([0 <= start - 2 + place < length for place in range(8)])
            if present[2:6].any():
                visible = torch.where(present.any(), present, True).expand(8, 8)
                out = encoded(layer, chunk[None], visible)[0]
                kept.append(torch.where(present[:, None], out, 0.0)[2:6])
            else:
                kept.append(row.new_zeros(4, 4))
        rows.append(torch.cat(kept)[:11])
    assert_same(layer, layer(x, torch.tensor(lengths)), torch.stack(rows), x)


def test_chunked_encoder_with_one_layer_is_a_pattern(source: torch.Generator) -> None:
    layer = seeded(layers.ChunkedEncoder(4, 2, layers=1, chunk=4, overlap=2), source)
    layer.positions.data.zero_()
    x = draw(source, 1, 11, 4)
    visible = pairs(11, lambda i, j: 4 * (i // 4) - 2 <= j < 4 * (i // 4) + 6)
    torch.testing.assert_close(layer(x), encoded(layer, x, visible))


def test_two_chunked_layers_are_not_the_pattern_twice(source: torch.Generator) -> None:
    layer = seeded(layers.ChunkedEncoder(4, 2, layers=2, chunk=4, overlap=2), source)
    layer.positions.data.zero_()
    x = draw(source, 1, 11, 4)
    visible = pairs(11, lambda i, j: 4 * (i // 4) - 2 <= j < 4 * (i // 4) + 6)
    assert (layer(x) - encoded(layer, x, visible)).abs().max() > 1e-6


def test_padding_of_documents_is_never_read(source: torch.Generator) -> None:
    layer = seeded(layers.ChunkedEncoder(4, 2, chunk=4, overlap=2), source)
    x = draw(source, 2, 11, 4).detach()
    lengths = torch.tensor([7, 3])
    expected = layer(x, lengths)
    x[0, 7:], x[1, 3:] = torch.nan, torch.inf
    assert torch.equal(layer(x, lengths), expected)
    assert expected[1, 3:].eq(0).all()


def test_cross_axis_layer(source: torch.Generator) -> None:
    layer = seeded(layers.CrossAxisAttention(4, 2, sizes=(3, 5)), source)
    x = draw(source, 2, 4, 5, 3)
    normed = layer_norm(x.permute(0, 2, 3, 1), (4,), layer.norm.weight, layer.norm.bias)
    normed = normed.permute(0, 3, 1, 2)
    a = layer.proj(sum(strip(normed) for strip in layer.horizontal))
    b = layer.proj(sum(strip(normed) for strip in layer.vertical))

    def unit(y: Tensor) -> Tensor:
        return y / y.pow(2).sum(-1, keepdim=True).sqrt()

    def rows(y: Tensor) -> Tensor:
        """[B, heads, H, c W]"""
        return y.unflatten(1, (2, 2)).transpose(2, 3).flatten(3)

    def attend(query: Tensor, key: Tensor) -> Tensor:
        q, k = unit(rows(query)), unit(rows(key))
        o = torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ rows(key) + q
        return o.unflatten(3, (2, -1)).transpose(2, 3).flatten(1, 2)

    across = attend(b, a)
    down = attend(a.transpose(2, 3), b.transpose(2, 3)).transpose(2, 3)
    assert_same(layer, layer(x), layer.proj(across) + layer.proj(down) + x, x)


def test_factorised_axes_layer(source: torch.Generator) -> None:
    layer = layers.FactorisedAxesAttention(4, 2, head_dim=2, multiplier=3, iterations=2)
    seeded(layer, source)
    grid = (3, 4, 2)
    u = draw(source, 2, *grid, 4)
    places = tuple(torch.rand(n, generator=source, dtype=torch.float64) for n in grid)
    expected = u
    for _ in range(2):
        normed = layer.norm(expected)
        v = layer.v(normed).unflatten(-1, (2, 2))
        weights = []
        for axis, others in enumerate(((2, 3), (1, 3), (1, 2))):
            line = layer.profiles[axis](layer.enter(normed).mean(others))
            q, k = layer.qk[axis](line).chunk(2, dim=-1)
            q, k = (rotate(x.unflatten(-1, (2, 6)), places[axis]) for x in (q, k))
            weights.append(torch.einsum("bihd,bjhd->bhij", q, k))
        along = (
            torch.einsum("bhxa,bayzhd->bxyzhd", weights[0], v),
            torch.einsum("bhyw,bxwzhd->bxyzhd", weights[1], v),
            torch.einsum("bhzc,bxychd->bxyzhd", weights[2], v),
        )
        y = instance_norm(torch.cat(along, dim=-1).flatten(-2).movedim(-1, 1)).movedim(1, -1)
        hidden = gelu(linear(y, layer.leave[0].weight))
        expected = expected + linear(hidden, layer.leave[2].weight, layer.leave[2].bias) / 2
    assert_same(layer, layer(u, places), expected, u)


def test_rotation_depends_on_the_distance_only(source: torch.Generator) -> None:
    q, k = draw(source, 1, 1, 1, 6), draw(source, 1, 1, 1, 6)
    here, there = torch.tensor([[0.1], [0.6]], dtype=torch.float64)
    near, moved = ((rotate(q, a) * rotate(k, a + 0.25)).sum() for a in (here, there))
    torch.testing.assert_close(near, moved)
    turned = rotate(q, torch.tensor([1 / 64]))[..., 0]
    torch.testing.assert_close(turned, q[..., 0] * math.cos(1) - q[..., 3] * math.sin(1))


def test_sphere_layer(source: torch.Generator) -> None:
    layer = seeded(layers.SphereAttention(4, 2), source)
    x = draw(source, 2, 3, 4, 4)
    # Simpson's rule: three rows integrate cos(colatitude) exactly up to degree three.
    rows = torch.tensor([1 / 3, 4 / 3, 1 / 3], dtype=torch.float64)
    areas = rows.repeat_interleave(4) * (2 * math.pi / 4)
    expected = projected(layer, x, lambda q, k, v: integral(q, k, v, areas))
    assert_same(layer, layer(x), expected, x)


def test_sphere_layer_within_a_radius(source: torch.Generator) -> None:
    layer = seeded(layers.SphereAttention(4, 2, radius=0.9), source)
    x, grid = draw(source, 2, 5, 6, 4), (5, 6)
    near = fv.Sphere(0.9).dense_mask(grid, grid)
    areas = latitude_weights(5).repeat_interleave(6).log()
    assert_same(layer, layer(x), projected(layer, x, masked(near, areas)), x)


@pytest.mark.parametrize(("sees", "window"), [("own", None), ("before", None), ("own", 2)])
def test_scale_layer(sees: Any, window: int | None, source: torch.Generator) -> None:
    layer = seeded(layers.ScaleAttention(4, 2, (1, 2, 3), sees, window), source)
    x = draw(source, 2, 14, 4)
    starts = (0, 1, 5, 14)
    scale = [n for n in range(3) for _ in range(starts[n + 1] - starts[n])]

    def rule(i: int, j: int) -> bool:
        if sees == "before":
            return scale[j] <= scale[i]
        if scale[i] != scale[j] or window is None:
            return scale[i] == scale[j]
        side = scale[i] + 1
        own = neighborhood((side, side), window=min(window, side))
        return bool(own[i - starts[side - 1], j - starts[side - 1]])

    assert_same(layer, layer(x), projected(layer, x, masked(pairs(14, rule))), x)


def test_hierarchical_layer(source: torch.Generator) -> None:
    layer = seeded(layers.HierarchicalAttention(4, 2), source)
    kinds = torch.tensor([[4, 3, 2, 1, 1, 2, 1, 3, 2, 1], [4, 3, 2, 1, 3, 2, 1, 1, 2, 0]])
    groups = document_groups(kinds)
    x = draw(source, 2, 10, 4)
    rows = []
    for row, own in zip(x, groups, strict=True):
        same = (own[:, :, None] == own[:, None]) & (own[:, :, None] >= 0)
        visible = same.any(0)
        blind = ~visible.any(-1)
        y = projected(layer, row[None], masked(visible | blind[:, None]))
        rows.append(torch.where(blind[:, None], layer.proj.bias, y[0]))
    assert_same(layer, layer(x, groups), torch.stack(rows), x)


def test_box_layer(source: torch.Generator) -> None:
    layer = seeded(layers.BoxAttention(4, 2, box=(2, 3), ratio=2), source)
    x = draw(source, 11, 4)
    places = torch.randint(0, 6, (11, 3), generator=source)
    places[:, 0] %= 2
    cells = [(b, y // 2, z // 3) for b, y, z in places.tolist()]
    visible = pairs(11, lambda i, j: cells[i] == cells[j])
    y = x + projected(layer, layer.norms[0](x)[None], masked(visible))[0]
    assert_same(layer, layer(x, places), y + layer.mlp(layer.norms[1](y)), x)


def test_neighbour_layer(source: torch.Generator) -> None:
    layer = seeded(layers.NeighbourAttention(4, 2, cutoff=2.0, angles=True), source)
    x = draw(source, 3, 5, 4)
    points = draw(source, 3, 5, 3)

    def distances() -> Tensor:
        return points.norm(dim=-1)

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        unit = points / distances()[..., None]
        angles = layer.angle_weight[None, :, None, None] * (unit @ unit.transpose(1, 2))[:, None]
        scores = torch.einsum("aehd,afhd->ahef", q, k) / math.sqrt(2) + angles
        r = (distances() / 2.0).clamp(max=1 - 1e-12)
        envelope = torch.where(distances() < 2.0, torch.exp(-(r**2) / (1 - r**2)), 0.0)
        weights = envelope[:, None, None] * torch.exp(scores)
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total == 0, 1.0, total)
        return torch.einsum("ahef,afhd->aehd", weights, v)

    unit = points / distances()[..., None]
    got = layer(x, distances(), unit)
    assert_same(layer, got, projected(layer, x, mix), x, points)


def test_forces_have_a_gradient(source: torch.Generator) -> None:
    """Second derivatives: the loss of a force, by the plain implementation."""
    layer = seeded(layers.NeighbourAttention(4, 2, 2.0, implementation="reference"), source)
    x, points = draw(source, 2, 3, 4), draw(source, 2, 3, 3)

    def force(at: Tensor) -> Tensor:
        energy = layer(x, at.norm(dim=-1)).sin().sum()
        return torch.autograd.grad(energy, at, create_graph=True)[0]

    assert torch.autograd.gradcheck(force, (points,))


def test_an_edge_that_crosses_the_cut_off_changes_nothing_suddenly(source: torch.Generator) -> None:
    layer = seeded(layers.NeighbourAttention(4, 2, 2.0), source)
    x = draw(source, 1, 3, 4).detach()
    at = [
        layer(x, torch.tensor([[0.3, 0.9, edge]], dtype=torch.float64)) for edge in (1.999, 2.001)
    ]
    assert (at[0] - at[1])[:, :2].abs().max() < 1e-9
