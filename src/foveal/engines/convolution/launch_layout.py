"""Launches of the changes of layout."""

from __future__ import annotations

import math

import triton
from torch import Tensor

from foveal.engines.convolution.layout import convolution_layout_forward

_TILE = 64
_MOST = 2**16
"""Samples and tiles that one launch takes on its second and third axis."""


def swapped(x: Tensor) -> Tensor:
    """A contiguous [B, C, *grid] of x [B, *grid, C], whose channels or whose grid are contiguous."""
    batch, *grid, channels = x.shape
    tokens = math.prod(grid)
    flat = _flat(x)
    launchable = flat is not None and batch < _MOST and max(tokens, channels) < _MOST * _TILE
    if flat is None or not launchable or not x.numel():
        return x.movedim(-1, 1).contiguous()
    y = x.new_empty(batch, channels, *grid)
    programs = (triton.cdiv(tokens, _TILE), triton.cdiv(channels, _TILE), batch)
    convolution_layout_forward[programs](
        flat, y, tokens, channels, flat.stride(0), flat.stride(1), y.stride(0), tokens,
        TILE=_TILE, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def _flat(x: Tensor) -> Tensor | None:
    """[B, tokens, C] with unit stride along C, where x is stored so."""
    if x.stride(-1) != 1 or 0 in x.stride():
        return None
    inner = x.stride(-2)
    for axis in range(x.dim() - 3, 0, -1):
        if x.stride(axis) != inner * math.prod(x.shape[axis + 1 : -1]):
            return None
    return x.as_strided((len(x), math.prod(x.shape[1:-1]), x.shape[-1]), (x.stride(0), inner, 1))
