"""What the entries of this family share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from foveal.systems.base import Draw, Identity, System

Shapes = Callable[[Mapping[str, Any]], tuple[tuple[int, ...], ...]]


def identity_tap(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """[C, *window] with a 1 in the middle"""
    place = 0
    for k in window:
        place = place * k + k // 2
    tap = x.new_zeros(x.shape[-1], math.prod(window))
    tap[:, place] = 1.0
    return tap.view(-1, *window)


def image(draw: Draw, channels: int = 3) -> Tensor:
    return draw.normal(2, draw.integer(3, 9), draw.integer(3, 9), channels)


def static(*windows: tuple[int, ...]) -> Shapes:
    """x and a filter of each window."""

    def shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
        width = shape["heads"] * shape["head_dim"]
        return ((1, *shape["grid"], width), *((width, *window) for window in windows))

    return shapes


def described(grid: tuple[int, ...], heads: int, head_dim: int) -> Mapping[str, Any]:
    return {"grid": grid, "heads": heads, "kv_heads": heads, "head_dim": head_dim}


def entry(
    name: str,
    title: str,
    year: int,
    paper: str,
    summary: str,
    op: Callable[..., Tensor],
    operands: Shapes,
    shape: Mapping[str, Any],
    *identities: Identity,
    kind: str = "operator",
    layer: type[torch.nn.Module] | None = None,
) -> System:
    return System(
        name=name,
        title=title,
        year=year,
        paper=paper,
        kind=kind,
        summary=summary,
        op=op,
        identities=identities,
        reference_shapes=(shape,),
        layer=layer,
        family="convolution",
        engine="convolution",
        operands=operands,
    )
