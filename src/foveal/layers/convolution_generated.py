"""Layers whose filters, or the places they read, are made from their input or from coordinates."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._convolve import convolve
from foveal._errors import ShapeError
from foveal._judged import judged_alone, need_dtype, need_shape
from foveal.layers.convolution import PointwiseConvolution


@judged_alone
def attentive_convolution(
    x: Tensor,
    features: Tensor,
    generator: Tensor,
    inhibition: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """dw_f(x) with f = g - sigmoid(inhibition) mean(g), g = generator gelu(pool(features)).

    A filter for each sample; pool takes means over K^2 pieces of the tokens in raster order.
    Shapes: x and features [B, H, W, C]; generator [K^2, K^2]; inhibition [C].
    """
    if x.dim() != 4:
        raise ShapeError("x", list(x.shape), "[B, H, W, C] is needed")
    need_shape("features", features, tuple(x.shape), like=x)
    need_shape("inhibition", inhibition, (x.shape[-1],), like=x)
    taps = len(generator)
    window = math.isqrt(taps)
    if generator.shape != (window**2, window**2):
        needed = "[K^2, K^2] for a window of K x K is needed"
        raise ShapeError("generator", list(generator.shape), needed)
    pooled = F.adaptive_avg_pool1d(features.flatten(1, 2).mT, taps)
    filter = F.linear(F.gelu(pooled), generator)
    share = torch.sigmoid(inhibition)[:, None]
    filter = (filter - share * filter.mean(-1, keepdim=True)).unflatten(-1, (window, window))
    return convolve(x, filter, implementation=implementation)


class AttentiveConvolution(nn.Module):
    """y = W_o attentive_convolution(W_v x, W_k x): a filter for each sample and channel from its content.

    Shapes: x and y [B, H, W, dim].
    Options: window of the filter.
    Cost: window^2 products per channel and token, as a static filter.
    Paper: Attentive Convolution (2510.20092), with lateral inhibition; the activation in front of its
    generator is taken to be a gelu.
    """

    def __init__(self, dim: int, window: int = 5) -> None:
        super().__init__()
        self.features, self.values, self.out = (PointwiseConvolution(dim, dim) for _ in range(3))
        self.generator = nn.Parameter(torch.randn(window**2, window**2) / window)
        self.inhibition = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        filtered = attentive_convolution(
            self.values(x), self.features(x), self.generator, self.inhibition
        )
        y: Tensor = self.out(filtered)
        return y


@judged_alone
def hyper_product(x: Tensor, weight: Tensor) -> Tensor:
    """y_c = (weight_c * x_c) x_c, for every channel the matrix product of its maps.

    Shapes: x [B, L, L, C], weight [L, L, C].
    """
    if x.dim() != 4 or x.shape[1] != x.shape[2]:
        raise ShapeError(
            "x", list(x.shape), "[B, L, L, C] is needed: a map is multiplied with itself"
        )
    need_shape("weight", weight, tuple(x.shape[1:]), like=x)
    return torch.einsum("bikc,bkjc->bijc", weight * x, x)


class CoordinateNetwork(nn.Module):
    """weight(p) = W_o z_n, z_{i+1} = (W_i z_i + b_i) * sin(omega A_i p + phi_i): a weight for every place.

    p runs from -1 to 1 along each axis of a grid.  Returns [*grid, dim].
    Options: axes of the grid; hidden, the width; layers; omega, the frequency of the first sine.
    Paper: multiplicative filter networks, as the slow network of HyperZZW (2401.17948).
    """

    def __init__(
        self, dim: int, axes: int = 2, hidden: int = 32, layers: int = 3, omega: float = 10.0
    ) -> None:
        super().__init__()
        self.places = nn.ModuleList(nn.Linear(axes, hidden) for _ in range(layers))
        self.maps = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        self.out = nn.Linear(hidden, dim)
        self.omega = omega

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        like = self.out.weight
        lines = [torch.linspace(-1, 1, n, dtype=like.dtype, device=like.device) for n in grid]
        place = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)
        first, *others = self.places
        hidden = torch.sin(self.omega * first(place))
        for to_next, own in zip(self.maps, others, strict=True):
            hidden = to_next(hidden) * torch.sin(self.omega * own(place))
        weight: Tensor = self.out(hidden)
        return weight


class HyperProduct(nn.Module):
    """y = W_o hyper_product(W_i x, weight), the weight from a network of coordinates.

    Shapes: x and y [B, L, L, dim], any L.
    Cost: 2 L FLOPs per token and channel.
    Paper: HyperZZW (2401.17948), its global branch; versions of it differ in what is multiplied.
    """

    def __init__(self, dim: int, hidden: int = 32) -> None:
        super().__init__()
        self.into, self.out = PointwiseConvolution(dim, dim), PointwiseConvolution(dim, dim)
        self.weight = CoordinateNetwork(dim, 2, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(hyper_product(self.into(x), self.weight(tuple(x.shape[1:3]))))
        return y


@judged_alone
def refined_maps(logits: Tensor, weight: Tensor, *, implementation: str | None = None) -> Tensor:
    """The maps of all slots through one low-pass filter, softmax(weight / |weight|).

    Shapes: logits [B, H, W, slots], weight [K, K].
    """
    need_shape("weight", weight, (*weight.shape[-1:] * 2,), like=logits)
    taps = torch.softmax(F.normalize(weight.flatten(), dim=0), dim=0)
    return convolve(logits, taps.view(1, *weight.shape), implementation=implementation)


class AttentionRefiningKernel(nn.Module):
    """`refined_maps` with a filter of its own, in front of the softmax over slots.

    Shapes: logits and result [B, H, W, slots].
    Options: window.
    Paper: Shepherding Slots to Objects (CVPR 2023); trained by gradient here.
    """

    def __init__(self, window: int = 5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(window, window))

    def forward(self, logits: Tensor) -> Tensor:
        return refined_maps(logits, self.weight)


@judged_alone
def deformable_convolution(
    x: Tensor, filter: Tensor, offsets: Tensor, modulation: Tensor
) -> Tensor:
    """y[p] = sum_t filter_t modulation_t(p) x(p + t - centre + offsets_t(p)), bilinear, zero outside.

    Shapes: x [B, H, W, C]; filter [out, C, K, K]; offsets [B, H, W, K^2, 2] in tokens, along H first;
    modulation [B, H, W, K^2]; returns [B, H, W, out].
    """
    if x.dim() != 4:
        raise ShapeError("x", list(x.shape), "[B, H, W, C] is needed")
    height, width = x.shape[1:3]
    window = filter.shape[-1] if filter.dim() else 0
    need_shape("filter", filter, (-1, x.shape[-1], window, window), like=x)
    need_shape("offsets", offsets, (*x.shape[:3], window**2, 2), like=x)
    need_shape("modulation", modulation, (*x.shape[:3], window**2), like=x)
    need_dtype(x, filter=filter, offsets=offsets, modulation=modulation)
    steps = torch.arange(window, device=x.device) - window // 2
    taps = torch.cartesian_prod(steps, steps).view(-1, 2)
    rows = torch.arange(height, device=x.device).view(-1, 1, 1) + taps[:, 0]
    columns = torch.arange(width, device=x.device).view(1, -1, 1) + taps[:, 1]
    down, right = rows + offsets[..., 0], columns + offsets[..., 1]
    places = torch.stack([(2 * right + 1) / width - 1, (2 * down + 1) / height - 1], dim=-1)
    seen = F.grid_sample(
        x.movedim(-1, 1), places.flatten(2, 3), mode="bilinear", padding_mode="zeros",
        align_corners=False,
    ).unflatten(-1, (width, -1))  # fmt: skip
    return torch.einsum("bchwt,bhwt,oct->bhwo", seen, modulation, filter.flatten(2))


class DeformableConvolution(nn.Module):
    """`deformable_convolution` whose offsets and modulation are linear in a window of the input.

    Shapes: x [B, H, W, dim], y [B, H, W, out].
    Options: window.
    Equals: a plain convolution at first, halved, with offsets 0 and modulation 1/2.
    Paper: Compact deformable convolutional transformers for wafer defects (2303.13827); global
    attention stands behind it there.
    """

    def __init__(self, dim: int, out: int, window: int = 3) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(out, dim, window, window) / (window * dim**0.5))
        self.shift = nn.Conv2d(dim, 3 * window**2, window, padding=window // 2)
        nn.init.zeros_(self.shift.weight)
        assert self.shift.bias is not None
        nn.init.zeros_(self.shift.bias)

    def forward(self, x: Tensor) -> Tensor:
        found = self.shift(x.movedim(-1, 1)).movedim(1, -1)
        taps = self.filter.shape[-1] ** 2
        offsets, modulation = found.split([2 * taps, taps], dim=-1)
        return deformable_convolution(
            x, self.filter, offsets.unflatten(-1, (taps, 2)), torch.sigmoid(modulation)
        )
