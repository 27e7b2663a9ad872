"""Layers of large static filters, channels last, under the parameter names of their papers' code."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._convolve import convolve
from foveal._errors import ShapeError


class DepthwiseConvolution(nn.Module):
    """`convolve` with a filter and bias of its own that keeps the grid.

    Shapes: x and y [B, *grid, dim]; weight [dim, 1, *window], as a grouped `nn.Conv2d` has it.
    Options: window, one size per axis; dilation per axis or for all; bias.
    """

    def __init__(
        self,
        dim: int,
        window: tuple[int, ...],
        dilation: int | tuple[int, ...] = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, *window))
        nn.init.trunc_normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x, self.weight[:, 0], bias=self.bias, dilation=self.dilation)

    def extra_repr(self) -> str:
        window = tuple(self.weight.shape[2:])
        return f"{len(self.weight)}, window={window}, dilation={self.dilation}"


class PointwiseConvolution(nn.Module):
    """A linear map of the channels with the weight of a 1x1 `nn.Conv2d`, [out, dim, 1, 1]."""

    def __init__(self, dim: int, out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, dim, 1, 1))
        nn.init.trunc_normal_(self.weight, std=dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class ChannelNorm(nn.BatchNorm1d):
    """Batch normalisation of the last axis, over all others; the state of an `nn.BatchNorm2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, -2)).view(input.shape)


class ResponseNorm(nn.Module):
    """y = (gamma n + 1) x + beta, n the norm of each channel over the grid by its mean over channels.

    Shapes: x and y [B, H, W, dim].  Paper: ConvNeXt V2 (2301.00808).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        size = size / (size.mean(-1, keepdim=True) + 1e-6)
        y: Tensor = (self.gamma * size + 1) * x + self.beta
        return y


class SqueezeExcitation(nn.Module):
    """y = sigmoid(W_up relu(W_down mean(x))) x.  Shapes: x and y [B, H, W, dim]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.down = PointwiseConvolution(dim, hidden)
        self.up = PointwiseConvolution(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.down(x.mean((1, 2), keepdim=True))))
        return x * torch.sigmoid(gate)


class LargeKernelAttention(nn.Module):
    """y = x * W dw_7x7,dilated 3( dw_5x5(x) ): the gate sees 23 x 23 tokens.

    Shapes: x and y [B, H, W, dim].
    Options: window and far_window, the two filters; dilation of the second.
    Equals: one filter of 23 x 23 taps at least 11 tokens away from the border.
    Paper: Visual Attention Network (2202.09741); its code's `AttentionModule`.
    """

    def __init__(self, dim: int, window: int = 5, far_window: int = 7, dilation: int = 3) -> None:
        super().__init__()
        self.conv0 = DepthwiseConvolution(dim, (window, window))
        self.conv_spatial = DepthwiseConvolution(dim, (far_window, far_window), dilation)
        self.conv1 = PointwiseConvolution(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.conv1(self.conv_spatial(self.conv0(x)))
        return x * gate


class VANAttention(nn.Module):
    """y = x + W_2 LKA(gelu(W_1 x)).  Shapes: x and y [B, H, W, dim].

    Paper: Visual Attention Network (2202.09741); its code's `SpatialAttention`.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_1 = PointwiseConvolution(dim, dim)
        self.spatial_gating_unit = LargeKernelAttention(dim)
        self.proj_2 = PointwiseConvolution(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x))))
        return x + y


class _DepthwiseInside(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = DepthwiseConvolution(dim, (3, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dwconv(x)
        return y


class _VANFeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConvolution(dim, hidden)
        self.dwconv = _DepthwiseInside(hidden)
        self.fc2 = PointwiseConvolution(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.dwconv(self.fc1(x))))
        return y


class VANBlock(nn.Module):
    """A block of a Visual Attention Network: attention and feed-forward, each with norm and scale.

    Shapes: x and y [B, H, W, dim].
    Options: expansion of the feed-forward.
    Paper: Visual Attention Network (2202.09741); the state dict of its code's `Block`.
    """

    def __init__(self, dim: int, expansion: float = 4.0) -> None:
        super().__init__()
        self.norm1 = ChannelNorm(dim)
        self.attn = VANAttention(dim)
        self.norm2 = ChannelNorm(dim)
        self.mlp = _VANFeedForward(dim, int(dim * expansion))
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), 1e-2))
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1 * self.attn(self.norm1(x))
        y: Tensor = x + self.layer_scale_2 * self.mlp(self.norm2(x))
        return y


class InceptionConvolution(nn.Module):
    """An eighth of the channels each by a square, a row and a column of taps, the rest as they are.

    Shapes: x and y [B, H, W, dim]; order of the channels: identity, square, row, column.
    Options: window of the square, band of the strips, share of the channels of each branch.
    Paper: InceptionNeXt (2303.16900); the state dict of its code's `InceptionDWConv2d`.
    """

    def __init__(self, dim: int, window: int = 3, band: int = 11, share: float = 0.125) -> None:
        super().__init__()
        part = int(dim * share)
        if part < 1:
            raise ShapeError("dim", dim, f"at least one channel in a branch of {share} is needed")
        self.dwconv_hw = DepthwiseConvolution(part, (window, window))
        self.dwconv_w = DepthwiseConvolution(part, (1, band))
        self.dwconv_h = DepthwiseConvolution(part, (band, 1))
        self.sizes = (dim - 3 * part, part, part, part)

    def forward(self, x: Tensor) -> Tensor:
        kept, square, row, column = x.split(self.sizes, dim=-1)
        mixed = (self.dwconv_hw(square), self.dwconv_w(row), self.dwconv_h(column))
        return torch.cat([kept, *mixed], dim=-1)
