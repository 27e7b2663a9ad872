"""Layers whose filters are as long as their grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._convolve import convolve
from foveal._errors import OptionError, ShapeError
from foveal._fftconv import fftconv
from foveal._judged import judged_alone, need_shape


class LongConvolution(nn.Module):
    """y = shrink(k) * x + D x, causal, a filter of the length of the sequence for every channel.

    Shapes: x and y [B, L, dim], L at most `length`.
    Options: length of the filter; squash, what is taken from the size of every tap.
    Paper: Simple Hardware-Efficient Long Convolutions (2302.06646).
    """

    def __init__(self, dim: int, length: int, squash: float = 0.1) -> None:
        super().__init__()
        self.filter = nn.Parameter(0.002 * torch.randn(dim, length))
        self.skip = nn.Parameter(torch.randn(dim))
        self.squash = squash

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.filter.shape[1]:
            needed = f"at most {self.filter.shape[1]} tokens are needed"
            raise ShapeError("x", list(x.shape), needed)
        return fftconv(x, F.softshrink(self.filter, self.squash), skip=self.skip)


@judged_alone
def frequency_filter(
    x: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor,
    *, shrink: float = 0.01,
) -> Tensor:  # fmt: skip
    """x + irfftn(M(X) X), X = rfftn(x), M a complex two-layer map of each frequency, block by block.

    Shapes: x [B, *grid, C]; real and imaginary parts of the maps [2, blocks, C/blocks, C/blocks] and of
    their biases [2, blocks, C/blocks].  relu between them and a soft shrink by `shrink` behind, on
    both parts; in float32 at least.
    """
    if not 3 <= x.dim() <= 5:
        raise ShapeError("x", list(x.shape), "[B, *grid, C] with one to three axes is needed")
    if shrink < 0:
        raise OptionError("shrink", shrink, "a number of at least 0 is needed")
    blocks = first.shape[1] if first.dim() > 1 else 0
    size = x.shape[-1] // max(blocks, 1)
    if not blocks or size * blocks != x.shape[-1]:
        needed = f"[2, blocks, c, c] is needed, blocks c = {x.shape[-1]}"
        raise ShapeError("first", list(first.shape), needed)
    for name, weight, bias in (("first", first, first_bias), ("second", second, second_bias)):
        need_shape(name, weight, (2, blocks, size, size), like=x)
        need_shape(f"{name}_bias", bias, (2, blocks, size), like=x)
    if x.numel() == 0:
        return x
    axes = tuple(range(1, x.dim() - 1))
    wide = torch.promote_types(x.dtype, torch.float32)
    spectrum = torch.fft.rfftn(x.to(wide), dim=axes, norm="ortho")
    rows = spectrum.unflatten(-1, (first.shape[1], -1))
    hidden = _complex_map(rows, first.to(wide), first_bias.to(wide))
    hidden = torch.complex(F.relu(hidden.real), F.relu(hidden.imag))
    mask = _complex_map(hidden, second.to(wide), second_bias.to(wide))
    mask = torch.complex(F.softshrink(mask.real, shrink), F.softshrink(mask.imag, shrink))
    product = mask.flatten(-2) * spectrum
    mixed = torch.fft.irfftn(product, x.shape[1:-1], dim=axes, norm="ortho")
    y: Tensor = x + mixed.to(x.dtype)
    return y


def _complex_map(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    matrix, shift = torch.complex(weight[0], weight[1]), torch.complex(bias[0], bias[1])
    return torch.einsum("...kc,kcd->...kd", x, matrix) + shift


class FrequencyFilter(nn.Module):
    """`frequency_filter` with maps of its own: a mask predicted for every frequency.

    Shapes: x and y [B, *grid, dim].
    Options: blocks divides dim; shrink.
    Paper: Adaptive Frequency Filters (2307.14008).
    """

    def __init__(self, dim: int, blocks: int = 8, shrink: float = 0.01) -> None:
        super().__init__()
        if blocks < 1 or dim % blocks:
            raise ShapeError("blocks", blocks, f"a divisor of dim, {dim}, is needed")
        size = dim // blocks
        self.first = nn.Parameter(0.02 * torch.randn(2, blocks, size, size))
        self.first_bias = nn.Parameter(torch.zeros(2, blocks, size))
        self.second = nn.Parameter(0.02 * torch.randn(2, blocks, size, size))
        self.second_bias = nn.Parameter(torch.zeros(2, blocks, size))
        self.shrink = shrink

    def forward(self, x: Tensor) -> Tensor:
        maps = (self.first, self.first_bias, self.second, self.second_bias)
        return frequency_filter(x, *maps, shrink=self.shrink)


class OversizeConvolution(nn.Module):
    """A column of 2H - 1 taps, then a row of 2W - 1: where the zeros begin tells the position.

    Shapes: x and y [B, X, Y, dim]; on another grid than (H, W) the filters are resized linearly,
    their ends kept.
    Paper: ParCNetV2 (2211.07157), its oversize filters.
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.column = nn.Parameter(torch.randn(dim, 2 * grid[0] - 1) * grid[0] ** -0.5)
        self.row = nn.Parameter(torch.randn(dim, 2 * grid[1] - 1) * grid[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        column = self._resized(self.column, x.shape[1])
        row = self._resized(self.row, x.shape[2])
        return convolve(convolve(x, column[:, :, None]), row[:, None])

    def _resized(self, filter: Tensor, size: int) -> Tensor:
        if filter.shape[1] == 2 * size - 1:
            return filter
        return F.interpolate(filter[None], 2 * size - 1, mode="linear", align_corners=True)[0]
