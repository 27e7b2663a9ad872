"""Neighborhood attention as a layer, and the attention block of MedViT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal.layers.heads import MultiHead
from foveal.patterns import Neighborhood
from foveal.patterns.base import per_axis
from foveal.scores import RelativeBias, Softmax


class NeighborhoodAttention(MultiHead):
    """Each token attends to the `window` tokens around it, on one to three axes.

    Shapes: x and y [B, *grid, dim]; table [heads, 2 window - 1 per axis].
    Options: axes is the number of grid axes; window, stride, dilation, causal as in `Neighborhood`;
    relative_bias adds a learned value per head and offset, started at 0.02 times a normal draw cut
    at 2; the rest as in `MultiHead`.
    Limits: window * dilation must not exceed any axis of the grid.
    Paper: Neighborhood Attention Transformer (2204.07143), Dilated NAT (2209.15001).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int | tuple[int, ...] = 7,
        *,
        axes: int = 2,
        stride: int | tuple[int, ...] = 1,
        dilation: int | tuple[int, ...] = 1,
        causal: bool | tuple[bool, ...] = False,
        relative_bias: bool = True,
        qkv_bias: bool = True,
        out_proj: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias, out_proj=out_proj, dropout=dropout)
        self.pattern = Neighborhood(per_axis(window, axes), stride, dilation, causal)
        self.table = relative_table(heads, per_axis(window, axes)) if relative_bias else None

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = Softmax() if self.table is None else Softmax() + RelativeBias(self.table)
        return attend(q, k, v, self.pattern, score)


def relative_table(heads: int, window: tuple[int, ...]) -> nn.Parameter:
    """A learned bias per head and offset.  [heads, 2 window - 1 per axis]"""
    table = torch.empty(heads, *(2 * side - 1 for side in window))
    return nn.Parameter(nn.init.trunc_normal_(table, std=0.02, a=-0.04, b=0.04))


class MedViTAttention(nn.Module):
    """y = x + attention(norm(x)): the local block of MedViTV2, batch normalisation and window 7.

    Shapes: x and y [B, dim, H, W].
    Options: head_dim 32; window, dilation per `Neighborhood`, dilation 1 as in the released code
    although the paper stresses dilated windows; released_layout reads the channels-first memory as
    [B, H, W, dim] without moving an element, as the released code does: needed for its weights,
    wrong for anything else.
    Paper: MedViTV2 (2502.13693).
    """

    def __init__(
        self,
        dim: int,
        window: int = 7,
        dilation: int = 1,
        *,
        head_dim: int = 32,
        dropout: float = 0.0,
        released_layout: bool = False,
    ) -> None:
        super().__init__()
        self.released_layout = released_layout
        self.norm = nn.BatchNorm2d(dim)
        self.attention = NeighborhoodAttention(
            dim, dim // head_dim, window, dilation=dilation, dropout=dropout
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        normed = self.norm(x)
        if self.released_layout:
            mixed: Tensor = self.attention(normed.reshape(batch, height, width, dim))
            return x + mixed.reshape(batch, dim, height, width)
        mixed = self.attention(normed.movedim(1, -1))
        return x + mixed.movedim(-1, 1)
