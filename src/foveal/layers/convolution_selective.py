"""Layers that weigh the results of several filters, channel by channel and place by place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._convolve import convolve
from foveal._errors import ShapeError
from foveal._judged import judged_alone, need_shape
from foveal.engines.convolution.strips_problem import Strips
from foveal.layers.convolution import ChannelNorm, DepthwiseConvolution, PointwiseConvolution


def select_kernels(
    branches: Sequence[Tensor], reduce: Tensor, expand: Tensor, spatial: Tensor
) -> Tensor:
    """sum_m a_m sigmoid(expand_m relu(reduce mean(s))) sigmoid(spatial_m * [mean_c s, max_c s]).

    s is the sum of the branches.
    Shapes: M branches a_m [B, H, W, C]; reduce [hidden, C]; expand [M, C, hidden]; spatial [M, 2, K, K].
    """
    first = branches[0]
    if first.dim() != 4:
        raise ShapeError("branches", list(first.shape), "[B, H, W, C] is needed")
    count, width = len(branches), first.shape[-1]
    need_shape("reduce", reduce, (-1, width), like=first)
    need_shape("expand", expand, (count, width, len(reduce)), like=first)
    need_shape("spatial", spatial, (count, 2, *spatial.shape[-1:] * 2), like=first)
    total = torch.stack(list(branches)).sum(0)
    hidden = F.relu(F.linear(total.mean((1, 2)), reduce))
    channels = torch.sigmoid(torch.einsum("bh,mch->mbc", hidden, expand))
    maps = torch.stack([total.mean(-1), total.amax(-1)], dim=1)
    places = torch.sigmoid(F.conv2d(maps, spatial, padding=spatial.shape[-1] // 2))
    parts = zip(branches, channels, places.unbind(1), strict=True)
    return torch.stack([a * c[:, None, None] * p[..., None] for a, c, p in parts]).sum(0)


@judged_alone
def separable_kernel_attention(
    x: Tensor,
    square: Tensor,
    row: Tensor,
    column: Tensor,
    reduce: Tensor,
    expand: Tensor,
    spatial: Tensor,
    mixing: Tensor,
    *,
    dilation: int = 3,
    implementation: str | None = None,
) -> Tensor:
    """x * (mixing select(a, dw_row(a), dw_column(a))), a = dw_square(x), the strips dilated.

    Shapes: x [B, H, W, C]; square [C, k, k], row [C, 1, K], column [C, K, 1]; mixing [C, C];
    the others as `select_kernels` with three branches has them.
    """
    need_shape("row", row, (-1, 1, -1), like=x)
    need_shape("column", column, (-1, -1, 1), like=x)
    need_shape("mixing", mixing, (x.shape[-1], x.shape[-1]), like=x)
    near = convolve(x, square, implementation=implementation)
    strips = (
        convolve(near, each, dilation=dilation, implementation=implementation)
        for each in (row, column)
    )
    return x * F.linear(select_kernels([near, *strips], reduce, expand, spatial), mixing)


SPANS: dict[int, tuple[int, int, int]] = {
    7: (3, 3, 2),
    11: (3, 5, 2),
    23: (5, 7, 3),
    35: (5, 11, 3),
    41: (5, 13, 3),
    53: (5, 17, 3),
}
"""Near window, far window and its dilation for the tokens that a chain of strips spans."""


def _span(span: int) -> tuple[int, int, int]:
    if span not in SPANS:
        raise ShapeError("span", span, f"one of {sorted(SPANS)} is needed")
    return SPANS[span]


class KernelSelection(nn.Module):
    """`select_kernels` with maps of its own: weights of channels and of places for M branches.

    Shapes: M branches [B, H, W, dim]; returns [B, H, W, dim].
    Options: branches, M; window of the map of places.
    Paper: BEVANet (2508.07300), its comprehensive kernel selection; sigmoids, no softmax.  The norms
    and one-token convolutions of its code are linear in evaluation and part of these maps.
    """

    def __init__(self, dim: int, branches: int = 3, window: int = 7) -> None:
        super().__init__()
        hidden = max(dim // 16, 32)
        self.reduce = nn.Parameter(torch.randn(hidden, dim) * dim**-0.5)
        self.expand = nn.Parameter(torch.randn(branches, dim, hidden) * hidden**-0.5)
        self.spatial = nn.Parameter(torch.randn(branches, 2, window, window) * 0.1)

    def forward(self, branches: Sequence[Tensor]) -> Tensor:
        return select_kernels(branches, self.reduce, self.expand, self.spatial)


class SeparableKernelAttention(nn.Module):
    """y = x * W select(a, row(a), column(a)), a = dw(x): parallel dilated strips, chosen by content.

    Shapes: x and y [B, H, W, dim].
    Options: span, one of `SPANS`.
    Paper: BEVANet (2508.07300), its sparse decomposed large separable kernel attention.
    """

    def __init__(self, dim: int, span: int = 23) -> None:
        super().__init__()
        near, far, dilation = _span(span)
        self.conv0 = DepthwiseConvolution(dim, (near, near))
        self.conv_h = DepthwiseConvolution(dim, (1, far), dilation)
        self.conv_v = DepthwiseConvolution(dim, (far, 1), dilation)
        self.select = KernelSelection(dim)
        self.conv1 = PointwiseConvolution(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        near = self.conv0(x)
        gate: Tensor = self.conv1(self.select([near, self.conv_h(near), self.conv_v(near)]))
        return x * gate


class LargeSeparableKernelAttention(nn.Module):
    """y = x * W column_far(row_far(column(row(x)))): large kernel attention by four strips.

    Shapes: x and y [B, H, W, dim].
    Options: span, one of `SPANS`.
    Paper: Large Separable Kernel Attention (2309.01439); the state dict of its code's `LSKA`.
    """

    def __init__(self, dim: int, span: int = 23) -> None:
        super().__init__()
        near, far, dilation = _span(span)
        self.conv0h = DepthwiseConvolution(dim, (1, near))
        self.conv0v = DepthwiseConvolution(dim, (near, 1))
        self.conv_spatial_h = DepthwiseConvolution(dim, (1, far), dilation)
        self.conv_spatial_v = DepthwiseConvolution(dim, (far, 1), dilation)
        self.conv1 = PointwiseConvolution(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        near = _in_a_row(x, self.conv0h, self.conv0v)
        far = _in_a_row(near, self.conv_spatial_h, self.conv_spatial_v)
        gate: Tensor = self.conv1(far)
        return x * gate


def _in_a_row(x: Tensor, row: DepthwiseConvolution, column: DepthwiseConvolution) -> Tensor:
    strips = Strips(row.weight[:, 0, 0], column.weight[:, 0, :, 0], row.bias)
    return convolve(x, strips, bias=column.bias, dilation=row.dilation)


class LargeKernelPyramid(nn.Module):
    """y = W_o [W_0 x, up(f_1), .., up(f_4)] + W_s x, f_m = LSKA(W_m pool_m(x)): context at four scales.

    Shapes: x [B, H, W, dim], y [B, H, W, out].
    Options: hidden, the width of a branch; span of its attention.  The pools are means over 5, 9 and 17
    tokens at strides 2, 4 and 8, and over the whole grid.
    Paper: BEVANet (2508.07300), its pyramid pooling with deep large kernels; how its branches are
    wired in detail is not established here.
    """

    def __init__(self, dim: int, out: int, hidden: int | None = None, span: int = 11) -> None:
        super().__init__()
        hidden = max(dim // 4, 1) if hidden is None else hidden
        self.into = nn.ModuleList(PointwiseConvolution(dim, hidden) for _ in range(5))
        self.attend = nn.ModuleList(LargeSeparableKernelAttention(hidden, span) for _ in range(4))
        self.out = PointwiseConvolution(5 * hidden, out)
        self.shortcut = PointwiseConvolution(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        first = x.movedim(-1, 1)
        pooled = [
            F.avg_pool2d(first, 2 * stride + 1, stride, stride, count_include_pad=False)
            for stride in (2, 4, 8)
        ]
        pooled.append(first.mean((2, 3), keepdim=True))
        parts = [self.into[0](x)]
        for small, into, attend in zip(pooled, self.into[1:], self.attend, strict=False):
            context = attend(into(small.movedim(1, -1))).movedim(-1, 1)
            wide = F.interpolate(context, x.shape[1:3], mode="bilinear", align_corners=False)
            parts.append(wide.movedim(1, -1))
        y: Tensor = self.out(torch.cat(parts, dim=-1)) + self.shortcut(x)
        return y


@judged_alone
def select_sizes(
    x: Tensor,
    near: Tensor,
    far: Tensor,
    reduce: Tensor,
    expand: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """sum_m a_m u_m, u_m = dw_m(x), a = softmax over m of expand_m relu(reduce mean_t(sum_m u_m)).

    Shapes: x [B, T, F, C], time and frequency; near and far [C, *window]; reduce [hidden, C];
    expand [2, C, hidden].  The weights are one for each frequency and channel.
    """
    if x.dim() != 4:
        raise ShapeError("x", list(x.shape), "[B, T, F, C] is needed")
    found = [convolve(x, each, implementation=implementation) for each in (near, far)]
    return weigh_sizes(torch.stack(found), reduce, expand)


def weigh_sizes(found: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
    """sum_m a_m u_m of `select_sizes` for results u [M, B, T, F, C]."""
    need_shape("reduce", reduce, (-1, found.shape[-1]), like=found)
    need_shape("expand", expand, (len(found), found.shape[-1], len(reduce)), like=found)
    hidden = F.relu(F.linear(found.sum(0).mean(1), reduce))
    weights = torch.softmax(torch.einsum("bfh,mch->mbfc", hidden, expand), dim=0)
    return (weights[:, :, None] * found).sum(0)


class SelectiveKernelAttention(nn.Module):
    """y = sum_m a_m bn(dw_m(x)): a softmax over filter sizes for every frequency and channel.

    Shapes: x and y [B, T, F, dim], time and frequency.
    Options: windows of the filters; hidden, the width between.
    Paper: Frequency and multi-scale selective kernel attention (2204.01005); its descriptor keeps
    frequency and channel, the mean is over time alone.
    """

    def __init__(self, dim: int, windows: Sequence[int] = (3, 5), hidden: int = 32) -> None:
        super().__init__()
        self.convs = nn.ModuleList(DepthwiseConvolution(dim, (k, k), bias=False) for k in windows)
        self.norms = nn.ModuleList(ChannelNorm(dim) for _ in windows)
        self.reduce = nn.Parameter(torch.randn(hidden, dim) * dim**-0.5)
        self.expand = nn.Parameter(torch.randn(len(self.convs), dim, hidden) * hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.convs, self.norms, strict=True)
        found = torch.stack([F.relu(norm(conv(x))) for conv, norm in pairs])
        return weigh_sizes(found, self.reduce, self.expand)
