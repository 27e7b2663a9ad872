"""Layers whose filters are a softmax, fixed or made from their input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._convolve import convolve
from foveal._errors import ShapeError
from foveal._local_mix import local_mix


class _Gated(nn.Module):
    """A gated linear unit before the convolution and a linear map behind it."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ShapeError("heads", heads, f"a divisor of dim, {dim}, is needed")
        self.heads = heads
        self.into = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)


class LightweightConvolution(_Gated):
    """y = W_o conv(glu(W_i x)) with one softmax filter per head.

    Shapes: x and y [B, L, dim].
    Options: heads divides dim; window; causal, else centred.
    Cost: 2 window FLOPs per channel and token beside the maps.
    Paper: Pay Less Attention with Lightweight and Dynamic Convolutions (1901.10430).
    """

    def __init__(self, dim: int, heads: int, window: int = 31, causal: bool = True) -> None:
        super().__init__(dim, heads)
        self.filter = nn.Parameter(torch.empty(heads, window))
        nn.init.xavier_uniform_(self.filter)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.glu(self.into(x), dim=-1)
        taps = torch.softmax(self.filter, dim=-1).to(hidden.dtype)
        y: Tensor = self.out(convolve(hidden, taps, causal=self.causal))
        return y


class DynamicConvolution(_Gated):
    """y = W_o mix(softmax(W_k h), h), h = glu(W_i x): a filter for every token and head.

    Shapes: x and y [B, L, dim].
    Options: heads divides dim; window; causal, else centred.
    Paper: Pay Less Attention with Lightweight and Dynamic Convolutions (1901.10430).
    """

    def __init__(self, dim: int, heads: int, window: int = 31, causal: bool = True) -> None:
        super().__init__(dim, heads)
        self.filter = nn.Linear(dim, heads * window, bias=False)
        self.window, self.causal = window, causal

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.glu(self.into(x), dim=-1)
        weights = torch.softmax(self.filter(hidden).unflatten(-1, (self.heads, -1)), dim=-1)
        values = hidden.unflatten(-1, (self.heads, -1))
        mixed = local_mix(weights.to(values.dtype), values, self.window, causal=self.causal)
        y: Tensor = self.out(mixed.flatten(-2))
        return y


class ContextMixing(nn.Module):
    """Filters from the affinities of every token to the regions of a context, for half of the heads each
    with the large and the small window.

    R[p, r] = q_p . k_r / sqrt(D), weights = softmax(W R + bias) over a window shifted into the grid,
    y = W_o [mix over window, mix over small].
    Shapes: x [B, X, Y, dim], context [B, X', Y', dim], by default x; y [B, X, Y, dim].
    Options: heads, even; window and small, at most the grid; regions per axis of the context.
    Paper: OverLoCK (2502.20087), its dynamic filters without the block around them.
    """

    def __init__(
        self, dim: int, heads: int, window: int = 7, small: int = 5, regions: int = 7
    ) -> None:
        super().__init__()
        if heads < 2 or heads % 2 or dim % heads:
            raise ShapeError("heads", heads, f"an even divisor of dim, {dim}, is needed")
        self.heads, self.windows, self.regions = heads, (window, small), regions
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_taps = nn.Linear(regions**2, window**2 + small**2)
        self.bias = nn.ParameterList(torch.zeros(heads // 2, size**2) for size in self.windows)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        pooled = F.adaptive_avg_pool2d(context.movedim(-1, 1), self.regions).flatten(2).mT
        q, k = (y.unflatten(-1, (self.heads, -1)) for y in (self.q(x), self.k(pooled)))
        affinity = torch.einsum("bxyhd,brhd->bxyhr", q * q.shape[-1] ** -0.5, k)
        logits = self.to_taps(affinity).split([size**2 for size in self.windows], dim=-1)
        values = self.v(x).unflatten(-1, (self.heads, -1)).chunk(2, dim=-2)
        half = self.heads // 2
        mixed = []
        for number, (size, own) in enumerate(zip(self.windows, values, strict=True)):
            heads = slice(number * half, (number + 1) * half)
            weights = torch.softmax(logits[number][..., heads, :] + self.bias[number], dim=-1)
            mixed.append(local_mix(weights.to(own.dtype), own, size, border="shift"))
        y: Tensor = self.out(torch.cat(mixed, dim=-2).flatten(-2))
        return y
