"""Convolution layers: published state dicts, merging, shapes, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import foveal as fv
from foveal import layers
from foveal.layers.convolution_generated import attentive_convolution
from foveal.layers.convolution_merge import (
    Branch,
    fold_norm,
    merge_parallel,
    merge_strips,
    undilated,
)


def randomise(model: nn.Module, source: torch.Generator) -> nn.Module:
    """Random weights and running statistics, in float64 and for evaluation."""
    model = model.double().eval()
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if x.is_floating_point():
                drawn = torch.randn(x.shape, generator=source, dtype=torch.float64) * 0.3
                x.copy_(drawn.abs() + 0.5 if "var" in name else drawn)
    return model


class PublishedVAN(nn.Module):
    """The block in plain PyTorch, channels first, with the names of the published code."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        gate = nn.Module()
        gate.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        gate.conv_spatial = nn.Conv2d(dim, dim, 7, padding=9, groups=dim, dilation=3)
        gate.conv1 = nn.Conv2d(dim, dim, 1)
        self.norm1, self.norm2 = nn.BatchNorm2d(dim), nn.BatchNorm2d(dim)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.proj_1, self.attn.proj_2 = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.attn.spatial_gating_unit = gate
        self.mlp.fc1, self.mlp.fc2 = nn.Conv2d(dim, 4 * dim, 1), nn.Conv2d(4 * dim, dim, 1)
        self.mlp.dwconv = nn.Module()
        self.mlp.dwconv.dwconv = nn.Conv2d(4 * dim, 4 * dim, 3, padding=1, groups=4 * dim)
        self.layer_scale_1 = nn.Parameter(torch.ones(dim))
        self.layer_scale_2 = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        gate = self.attn.spatial_gating_unit
        u = F.gelu(self.attn.proj_1(y))
        u = u * gate.conv1(gate.conv_spatial(gate.conv0(u)))
        x = x + self.layer_scale_1[:, None, None] * (self.attn.proj_2(u) + y)
        y = self.mlp.dwconv.dwconv(self.mlp.fc1(self.norm2(x)))
        return x + self.layer_scale_2[:, None, None] * self.mlp.fc2(F.gelu(y))


def published_norm(dim: int, window: int) -> nn.Module:
    part = nn.Sequential()
    part.add_module(
        "conv", nn.Conv2d(dim, dim, window, padding=window // 2, groups=dim, bias=False)
    )
    part.add_module("bn", nn.BatchNorm2d(dim))
    return part


class PublishedRepLK(nn.Module):
    def __init__(self, dim: int, hidden: int, window: int) -> None:
        super().__init__()
        self.prelkb_bn = nn.BatchNorm2d(dim)
        self.pw1, self.pw2 = nn.Sequential(), nn.Sequential()
        for part, sizes in ((self.pw1, (dim, hidden)), (self.pw2, (hidden, dim))):
            part.add_module("conv", nn.Conv2d(*sizes, 1, bias=False))
            part.add_module("bn", nn.BatchNorm2d(sizes[1]))
        self.large_kernel = nn.Module()
        self.large_kernel.lkb_origin = published_norm(hidden, window)
        self.large_kernel.small_conv = published_norm(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.pw1(self.prelkb_bn(x)))
        y = self.large_kernel.lkb_origin(y) + self.large_kernel.small_conv(y)
        return x + self.pw2(F.relu(y))


class PublishedUniRepLK(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Module()
        self.dwconv.lk_origin = nn.Conv2d(dim, dim, 13, padding=6, groups=dim, bias=False)
        self.dwconv.origin_bn = nn.BatchNorm2d(dim)
        self.branches = ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5))
        for k, r in self.branches:
            own = nn.Conv2d(
                dim, dim, k, padding=r * (k - 1) // 2, dilation=r, groups=dim, bias=False
            )
            self.dwconv.add_module(f"dil_conv_k{k}_{r}", own)
            self.dwconv.add_module(f"dil_bn_k{k}_{r}", nn.BatchNorm2d(dim))
        self.norm = nn.BatchNorm2d(dim)
        self.se = nn.Module()
        self.se.down, self.se.up = nn.Conv2d(dim, dim // 4, 1), nn.Conv2d(dim // 4, dim, 1)
        self.pwconv1 = nn.Sequential(nn.Identity(), nn.Linear(dim, 4 * dim))
        grn = nn.Module()
        grn.gamma = nn.Parameter(torch.zeros(1, 1, 1, 4 * dim))
        grn.beta = nn.Parameter(torch.zeros(1, 1, 1, 4 * dim))
        self.act = nn.Sequential(nn.GELU(), grn)
        self.pwconv2 = nn.Sequential(
            nn.Linear(4 * dim, dim, bias=False), nn.Identity(), nn.BatchNorm2d(dim)
        )
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv.origin_bn(self.dwconv.lk_origin(x))
        for k, r in self.branches:
            own = self.dwconv.get_submodule(f"dil_conv_k{k}_{r}")(x)
            y = y + self.dwconv.get_submodule(f"dil_bn_k{k}_{r}")(own)
        y = self.norm(y)
        y = y * torch.sigmoid(self.se.up(F.relu(self.se.down(y.mean((2, 3), keepdim=True)))))
        y = self.act[0](self.pwconv1[1](y.permute(0, 2, 3, 1)))
        size = y.square().sum((1, 2), keepdim=True).sqrt()
        grn = self.act[1]
        y = (grn.gamma * size / (size.mean(-1, keepdim=True) + 1e-6) + 1) * y + grn.beta
        y = self.pwconv2[2](self.pwconv2[0](y).permute(0, 3, 1, 2))
        return x + self.gamma[:, None, None] * y


class PublishedInception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dwconv_hw = nn.Conv2d(2, 2, 3, padding=1, groups=2)
        self.dwconv_w = nn.Conv2d(2, 2, (1, 11), padding=(0, 5), groups=2)
        self.dwconv_h = nn.Conv2d(2, 2, (11, 1), padding=(5, 0), groups=2)

    def forward(self, x: Tensor) -> Tensor:
        kept, square, row, column = torch.split(x, (10, 2, 2, 2), dim=1)
        parts = (kept, self.dwconv_hw(square), self.dwconv_w(row), self.dwconv_h(column))
        return torch.cat(parts, dim=1)


PUBLISHED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], int]] = {
    "van": (lambda: PublishedVAN(6), lambda: layers.VANBlock(6), 6),
    "replk": (lambda: PublishedRepLK(4, 6, 13), lambda: layers.RepLKBlock(4, 6, 13), 4),
    "unireplk": (lambda: PublishedUniRepLK(8), lambda: layers.UniRepLKBlock(8, 13), 8),
    "inception": (PublishedInception, lambda: layers.InceptionConvolution(16), 16),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_load_by_name(name: str, source: torch.Generator) -> None:
    published, ours, dim = PUBLISHED[name]
    theirs = randomise(published(), source)
    layer = ours().double().eval()
    layer.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 20, dim, generator=source, dtype=torch.float64)
    wanted = theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["replk", "unireplk"])
def test_a_merged_network_does_the_same(name: str, source: torch.Generator) -> None:
    _, ours, dim = PUBLISHED[name]
    layer = randomise(ours(), source)
    merged = layers.merge(layer)
    kinds = {type(module).__name__ for module in merged.modules()}
    assert not kinds & {"DilatedBranches", "LargeKernelBranches"}
    assert len(list(merged.parameters())) < len(list(layer.parameters()))
    for grid in ((3, 4), (15, 17)):
        x = torch.randn(2, *grid, dim, generator=source, dtype=torch.float64)
        torch.testing.assert_close(merged(x), layer(x), rtol=1e-9, atol=1e-9)


def test_a_single_branch_merges(source: torch.Generator) -> None:
    layer = randomise(layers.LargeKernelBranches(3, 7, None), source)
    merged = layers.merge(layer)
    x = torch.randn(1, 4, 9, 3, generator=source, dtype=torch.float64)
    assert isinstance(merged, layers.DepthwiseConvolution)
    torch.testing.assert_close(merged(x), layer(x))


def test_a_wrong_merge_is_not_believed(source: torch.Generator) -> None:
    class Wrong(layers.LargeKernelBranches):
        def merged(self) -> layers.DepthwiseConvolution:
            found = super().merged()
            with torch.no_grad():
                found.weight[..., 0, 0] += 1.0
            return found

    with pytest.raises(ArithmeticError, match="differs by"):
        layers.merge(randomise(Wrong(3, 7), source))


def test_strips_merge_exactly(source: torch.Generator) -> None:
    row, column = (
        torch.randn(3, *k, generator=source, dtype=torch.float64) for k in ((1, 5), (3, 1))
    )
    zero = torch.zeros(3, dtype=torch.float64)
    bias = torch.randn(3, generator=source, dtype=torch.float64)
    merged = merge_strips([Branch(row, zero), Branch(column, bias, 2)])
    assert merged.filter.shape == (3, 5, 5)
    x = torch.randn(2, 4, 6, 3, generator=source, dtype=torch.float64)
    apart = fv.convolve(fv.convolve(x, row), column, bias=bias, dilation=(2, 1))
    torch.testing.assert_close(fv.convolve(x, merged.filter, bias=merged.bias), apart)


def test_what_does_not_merge_says_why() -> None:
    zero = torch.zeros(2)
    square, even = Branch(torch.ones(2, 3, 3), zero), Branch(torch.ones(2, 2, 2), zero)
    with pytest.raises(fv.errors.ShapeError, match="differ at the border"):
        merge_strips([square, square])
    with pytest.raises(fv.errors.ShapeError, match="differ at the border"):
        merge_strips([Branch(torch.ones(2, 1, 3), zero + 1), Branch(torch.ones(2, 3, 1), zero)])
    with pytest.raises(fv.errors.ShapeError, match="parity"):
        merge_parallel([square, even])
    with pytest.raises(fv.errors.ShapeError, match="parity"):
        merge_parallel([square], (1, 1))
    with pytest.raises(fv.errors.ShapeError, match="statistics"):
        fold_norm(square, nn.BatchNorm2d(2, track_running_stats=False))
    with pytest.raises(fv.errors.ShapeError, match="branches"):
        layers.DilatedBranches(4, 12)
    with pytest.raises(fv.errors.ShapeError, match="parity"):
        layers.DilatedBranches(4, 7, [(5, 3)])


def test_zeros_between_taps_are_a_dilation(source: torch.Generator) -> None:
    filter = torch.randn(2, 3, 4, generator=source)
    x = torch.randn(1, 8, 9, 2, generator=source)
    got = fv.convolve(x, undilated(filter, 2), padding=0)
    torch.testing.assert_close(got, fv.convolve(x, filter, dilation=2, padding=0))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lka": (lambda: layers.LargeKernelAttention(4), (2, 5, 6, 4)),
    "light": (lambda: layers.LightweightConvolution(8, 2, 5), (2, 9, 8)),
    "dynamic": (lambda: layers.DynamicConvolution(8, 2, 5), (2, 9, 8)),
    "centred dynamic": (lambda: layers.DynamicConvolution(8, 2, 5, causal=False), (2, 9, 8)),
    "context": (lambda: layers.ContextMixing(8, 2, 5, 3, regions=3), (2, 6, 7, 8)),
    "long": (lambda: layers.LongConvolution(4, 12, squash=0.0), (2, 9, 4)),
    "frequency": (lambda: layers.FrequencyFilter(8, 2), (2, 5, 6, 8)),
    "oversize": (lambda: layers.OversizeConvolution(4, (5, 6)), (2, 5, 6, 4)),
    "resized oversize": (lambda: layers.OversizeConvolution(4, (5, 6)), (2, 7, 4, 4)),
    "separable": (lambda: layers.SeparableKernelAttention(4, 11), (2, 5, 6, 4)),
    "four strips": (lambda: layers.LargeSeparableKernelAttention(4, 11), (2, 5, 6, 4)),
    "pyramid": (lambda: layers.LargeKernelPyramid(8, 8), (2, 9, 11, 8)),
    "sizes": (lambda: layers.SelectiveKernelAttention(4, hidden=8), (2, 5, 6, 4)),
    "two orders": (lambda: layers.MultiorderMixer(8), (2, 5, 6, 8)),
    "waves": (lambda: layers.WaveMixer(8), (2, 5, 6, 8)),
    "attentive": (lambda: layers.AttentiveConvolution(4, 3), (2, 5, 6, 4)),
    "hyper product": (lambda: layers.HyperProduct(4, 8), (2, 5, 5, 4)),
    "refining kernel": (lambda: layers.AttentionRefiningKernel(3), (2, 5, 6, 3)),
    "deformable": (lambda: layers.DeformableConvolution(4, 4), (2, 5, 6, 4)),
    "unireplk, small window": (lambda: layers.UniRepLKBlock(8, 3), (2, 5, 6, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_keeps_the_shape_and_reaches_every_parameter(name: str, source: torch.Generator) -> None:
    make, shape = LAYERS[name]
    reached = set()
    for _ in range(10):  # all units of a small squeeze may be off at once
        layer = randomise(make(), source).train()
        x = torch.randn(shape, generator=source, dtype=torch.float64).requires_grad_()
        y = layer(x)
        assert y.shape == x.shape
        weight = torch.randn(shape, generator=source, dtype=torch.float64)
        inputs = {"x": x, **dict(layer.named_parameters())}
        gradients = torch.autograd.grad(y, list(inputs.values()), weight)
        assert all(bool(g.isfinite().all()) for g in gradients)
        reached |= {n for n, g in zip(inputs, gradients, strict=True) if bool(g.any())}
    assert reached == set(inputs)


@pytest.mark.parametrize("name", ["light", "dynamic", "long"])
def test_causal_layers_do_not_look_ahead(name: str, source: torch.Generator) -> None:
    make, shape = LAYERS[name]
    layer = randomise(make(), source)
    x = torch.randn(shape, generator=source, dtype=torch.float64)
    changed = x.clone()
    changed[:, 6:] += 1.0
    torch.testing.assert_close(layer(changed)[:, :6], layer(x)[:, :6])


def test_bad_sizes_are_named() -> None:
    with pytest.raises(fv.errors.ShapeError, match="heads"):
        layers.DynamicConvolution(8, 3)
    with pytest.raises(fv.errors.ShapeError, match="heads"):
        layers.ContextMixing(9, 3)
    with pytest.raises(fv.errors.ShapeError, match="blocks"):
        layers.FrequencyFilter(9)
    with pytest.raises(fv.errors.ShapeError, match="dim"):
        layers.InceptionConvolution(4)
    with pytest.raises(fv.errors.ShapeError, match="x"):
        layers.LongConvolution(2, 4)(torch.zeros(1, 5, 2))
    with pytest.raises(fv.errors.ShapeError, match="span"):
        layers.SeparableKernelAttention(4, 12)
    with pytest.raises(fv.errors.ShapeError, match="dim"):
        layers.MultiorderMixer(5)
    with pytest.raises(fv.errors.ShapeError, match="dim"):
        layers.WaveMixer(5)
    with pytest.raises(fv.errors.ShapeError, match="x"):
        layers.HyperProduct(4)(torch.zeros(1, 5, 6, 4))
    with pytest.raises(fv.errors.ShapeError, match="generator"):
        attentive_convolution(*torch.zeros(2, 1, 5, 6, 4), torch.zeros(8, 8), torch.zeros(4))
