"""Depthwise filters of several orders beside each other, and channels that rotate in pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._convolve import convolve
from foveal._errors import ShapeError
from foveal._judged import judged_alone, need_shape
from foveal.layers.convolution import (
    ChannelNorm,
    DepthwiseConvolution,
    PointwiseConvolution,
    SqueezeExcitation,
)


def sharpen(x: Tensor, gamma: Tensor) -> Tensor:
    """x + gamma (x - mean(x)), the mean over the grid: x [B, H, W, C], gamma [C]."""
    return x + gamma * (x - x.mean((1, 2), keepdim=True))


@judged_alone
def two_orders(
    x: Tensor,
    gamma: Tensor,
    high: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """gelu([dw_high(u), dw_second(dw_first(u))]), u = x + gamma (x - mean(x)).

    The first and the second filter are dilated by 2: together they see 9 x 9 tokens.
    Shapes: x [B, H, W, C], gamma [C], filters [C, 3, 3]; returns [B, H, W, 2 C].
    """
    if x.dim() != 4:
        raise ShapeError("x", list(x.shape), "[B, H, W, C] is needed")
    need_shape("gamma", gamma, (x.shape[-1],), like=x)
    u = sharpen(x, gamma)
    low = convolve(u, first, dilation=2, implementation=implementation)
    low = convolve(low, second, dilation=2, implementation=implementation)
    near = convolve(u, high, implementation=implementation)
    return F.gelu(torch.cat([near, low], dim=-1))


class MultiorderMixer(nn.Module):
    """y = W_o [se(gelu(bn(dw_3x3(u)))), se(gelu(bn(dw_9x9(u))))], u = sharpen(W_i x), half as wide.

    The second filter is two of 3x3, dilated by 2, one behind the other.
    Shapes: x and y [B, H, W, dim], dim even.
    Paper: SpaRTAN (2507.10999), its spatial mixer with depthwise filters.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ShapeError("dim", dim, "an even number of channels is needed")
        half = dim // 2
        self.into = PointwiseConvolution(dim, half)
        self.gamma = nn.Parameter(torch.full((half,), 1e-5))
        self.high = DepthwiseConvolution(half, (3, 3), bias=False)
        self.low = nn.Sequential(
            DepthwiseConvolution(half, (3, 3), 2, bias=False),
            DepthwiseConvolution(half, (3, 3), 2, bias=False),
        )
        self.norms = nn.ModuleList(ChannelNorm(half) for _ in range(2))
        self.gates = nn.ModuleList(SqueezeExcitation(half, max(half // 4, 1)) for _ in range(2))
        self.out = PointwiseConvolution(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        u = sharpen(self.into(x), self.gamma)
        branches = zip((self.high, self.low), self.norms, self.gates, strict=True)
        parts = [gate(F.gelu(norm(filter(u)))) for filter, norm, gate in branches]
        y: Tensor = self.out(torch.cat(parts, dim=-1))
        return y


def waves(x: Tensor, amplitude: Tensor, phase: Tensor, turn: Tensor) -> Tensor:
    """Pairs of channels of amplitude phase + amplitude_m phase_m, times a complex number each.

    m is the channel in which x is largest, for every token.
    Shapes: x, amplitude and phase [B, H, W, C], C even; turn [C / 2, 2], real and imaginary part.
    """
    largest = x.argmax(-1, keepdim=True)
    joint = amplitude.gather(-1, largest) * phase.gather(-1, largest)
    re, im = (amplitude * phase + joint).unflatten(-1, (-1, 2)).unbind(-1)
    found = (re * turn[:, 0] - im * turn[:, 1], re * turn[:, 1] + im * turn[:, 0])
    return torch.stack(found, dim=-1).flatten(-2)


class WaveMixer(nn.Module):
    """y = W_o se(dw_3x3(waves(x, W_a x, gelu(W_p x)))): channels as waves that interfere with the strongest.

    Shapes: x and y [B, H, W, dim], dim even.
    Paper: SpaRTAN (2507.10999), its channel mixer.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ShapeError("dim", dim, "an even number of channels is needed")
        self.amplitude, self.phase = (PointwiseConvolution(dim, dim) for _ in range(2))
        self.turn = nn.Parameter(torch.randn(dim // 2, 2))
        self.filter = DepthwiseConvolution(dim, (3, 3))
        self.gate = SqueezeExcitation(dim, max(dim // 4, 1))
        self.out = PointwiseConvolution(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        mixed = waves(x, self.amplitude(x), F.gelu(self.phase(x)), self.turn)
        y: Tensor = self.out(self.gate(self.filter(mixed)))
        return y
