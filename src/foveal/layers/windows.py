"""Layers that cut the grid in windows, lines or combs."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from foveal._attend import attend
from foveal._errors import PatternError
from foveal.layers.heads import MultiHead
from foveal.layers.neighborhood import relative_table
from foveal.patterns import Axial, Neighborhood, Partition
from foveal.patterns.base import per_axis
from foveal.scores import RelativeBias, Softmax


class SwinWindowAttention(MultiHead):
    """Attention inside square windows, which `shift` moves towards the end of the grid.

    Shapes: x and y [B, H, W, dim]; table [heads, 2 window - 1, 2 window - 1].
    Options: 0 <= shift < window tokens, window // 2 in every second block of the network; the rest
    as in `MultiHead`.  No rolling, no mask, no padding: windows cut by the border are smaller.
    Equals: rolling by -shift, window attention that masks tokens from different sides of the grid,
    and rolling back, where the window divides the grid.
    Paper: Swin Transformer (2103.14030).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int | tuple[int, ...] = 7,
        shift: int | tuple[int, ...] = 0,
        *,
        axes: int = 2,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias, dropout=dropout)
        self.pattern = Partition(per_axis(window, axes), per_axis(shift, axes))
        self.table = relative_table(heads, per_axis(window, axes))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern, Softmax() + RelativeBias(self.table))


class AxialAttention(nn.Module):
    """Attention along one axis after the other, with weights of its own for each.

    Shapes: x and y [B, *grid, dim].
    Options: axes in the order of attention; causal sees, on every axis, the tokens up to its own;
    the rest as in `MultiHead`.
    Paper: Axial Attention in Multidimensional Transformers (1912.12180).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        axes: tuple[int, ...] = (0, 1),
        *,
        causal: bool = False,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.lines = nn.ModuleList(
            _LineAttention(dim, heads, Axial(axis, causal), qkv_bias, dropout) for axis in axes
        )

    def forward(self, x: Tensor) -> Tensor:
        for line in self.lines:
            x = x + line(x)
        return x


class _LineAttention(MultiHead):
    def __init__(
        self, dim: int, heads: int, pattern: Axial, qkv_bias: bool, dropout: float
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias, dropout=dropout)
        self.pattern = pattern

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.pattern)


class DilatedWindowAttention(MultiHead):
    """The two attentions of D-Former: groups of neighbours, or combs over the whole volume.

    Shapes: x and y [B, X, Y, Z, dim].
    Options: scope "local": contiguous groups of `group` tokens per axis; "global": as many tokens
    per axis, spread evenly over it.  A group longer than an axis becomes the axis.
    Limits: with scope "global" the group must divide the grid.
    Paper: D-Former (2201.00462).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        group: tuple[int, ...] = (2, 7, 7),
        scope: Literal["local", "global"] = "local",
        *,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias, dropout=dropout)
        self.group = group
        self.scope = scope

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, dilated_window(tuple(k.shape[1:-2]), self.group, self.scope))


def dilated_window(
    grid: tuple[int, ...], group: tuple[int, ...], scope: Literal["local", "global"]
) -> Partition | Neighborhood:
    """Contiguous groups of a grid, or the combs of as many tokens with equal gaps."""
    if scope not in ("local", "global"):
        raise PatternError("scope", repr(scope), "'local' or 'global' is needed")
    if not isinstance(group, tuple | list) or len(group) != len(grid):
        raise PatternError("group", group, f"one length for each axis of the grid {grid} is needed")
    group = tuple(min(pair) for pair in zip(group, grid, strict=True))
    if scope == "local":
        return Partition(group)
    if any(length % size for length, size in zip(grid, group, strict=True)):
        raise PatternError("group", group, f"sizes that divide the grid {grid} are needed")
    gaps = tuple(length // size for length, size in zip(grid, group, strict=True))
    return Neighborhood(group, dilation=gaps)
