"""Filters for every token, or one softmax for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveal._convolve import convolve
from foveal._errors import ShapeError
from foveal._judged import judged_alone, need_dtype, need_shape
from foveal._local_mix import local_mix
from foveal.layers.convolution_dynamic import (
    ContextMixing,
    DynamicConvolution,
    LightweightConvolution,
)
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.convolution.entries import described, entry


@judged_alone
def contmix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    to_taps: Tensor,
    bias: Tensor,
    *,
    window: int = 7,
    scale: float | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Filters from affinities: softmax(to_taps (scale q . k) + bias) over a window shifted into the grid.

    q [B, X, Y, H, D]; k [B, R, H, D], one for each of R regions; v [B, X, Y, H, Dv];
    to_taps [window^2, R]; bias [H, window^2].
    """
    if q.dim() != 5:
        raise ShapeError("q", list(q.shape), "[B, X, Y, H, D] is needed")
    batch, heads, taps = len(q), q.shape[3], window**2
    need_shape("k", k, (batch, -1, heads, q.shape[-1]), like=q)
    need_shape("v", v, (*q.shape[:4], -1), like=q)
    need_shape("to_taps", to_taps, (taps, k.shape[1]), like=q)
    need_shape("bias", bias, (heads, taps), like=q)
    need_dtype(q, k=k, v=v, to_taps=to_taps)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    affinity = torch.einsum("bxyhd,brhd->bxyhr", q * scale, k)
    weights = torch.softmax(F.linear(affinity, to_taps) + bias, dim=-1)
    return local_mix(weights, v, window, border="shift", implementation=implementation)


@judged_alone
def dynamic(
    x: Tensor, logits: Tensor, *, causal: bool = True, implementation: str | None = None
) -> Tensor:
    """Softmax filters for each token and head: x [B, L, H, D], logits [B, L, H, K]."""
    weights = torch.softmax(logits, dim=-1)
    return local_mix(weights, x, logits.shape[-1], causal=causal, implementation=implementation)


@judged_alone
def light(
    x: Tensor, logits: Tensor, *, causal: bool = True, implementation: str | None = None
) -> Tensor:
    """One softmax filter for each head: x [B, L, H, D], logits [H, K]."""
    if x.dim() != 4:
        raise ShapeError("x", list(x.shape), "[B, L, H, D] is needed")
    need_shape("logits", logits, (x.shape[2], -1), like=x)
    weights = torch.softmax(logits, dim=-1)
    y = convolve(x.flatten(-2), weights, causal=causal, implementation=implementation)
    found: Tensor = y.unflatten(-1, x.shape[-2:])
    return found


def _mean_of_window(draw: Draw) -> Claim:
    q, v = draw.normal(1, 9, 8, 2, 3), draw.normal(1, 9, 8, 2, 4)
    k, maps = draw.normal(1, 5, 2, 3), torch.zeros(49, 5, dtype=torch.float64)

    def left(v: Tensor) -> Tensor:
        return contmix(q, k, v, maps, torch.zeros(2, 49, dtype=torch.float64))

    def right(v: Tensor) -> Tensor:
        return local_mix(torch.full((1, 9, 8, 2, 49), 1 / 49, dtype=v.dtype), v, 7, border="shift")

    return Claim((v,), left, right)


def _same_for_all(draw: Draw) -> Claim:
    length = draw.integer(1, 20)
    return Claim(
        (draw.normal(2, length, 2, 3), draw.normal(2, 4)),
        lambda x, logits: dynamic(x, logits.expand(2, length, 2, 4)),
        light,
    )


def _moving_average(draw: Draw) -> Claim:
    x = draw.normal(2, draw.integer(1, 20), 2, 3)

    def average(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, 0, 2, 0))
        return padded.unfold(1, 3, 1).sum(-1) / 3

    return Claim((x,), lambda x: light(x, torch.zeros(2, 3, dtype=x.dtype)), average)


def _one_tap(draw: Draw) -> Claim:
    x = draw.normal(2, draw.integer(1, 20), 2, 3)
    return Claim((x,), lambda x: dynamic(x, torch.zeros_like(x[..., :1])), lambda x: x)


def _contmix_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    heads, dim = shape["heads"], shape["head_dim"]
    tokens = (1, *shape["grid"], heads, dim)
    return (tokens, (1, 49, heads, dim), tokens, (49, 49), (heads, 49))


def _dynamic_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    tokens = (1, *shape["grid"], shape["heads"])
    return ((*tokens, shape["head_dim"]), (*tokens, 31))


def _light_shapes(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    heads = shape["heads"]
    return ((1, *shape["grid"], heads, shape["head_dim"]), (heads, 31))


SYSTEMS: tuple[System, ...] = (
    entry(
        "contmix", "OverLoCK", 2025, "2502.20087",
        "Filters for every token from its affinities to regions of a context.",
        contmix, _contmix_shapes, described((28, 28), 4, 32),
        Identity("mean_of_window", "a map of zeros averages the window", _mean_of_window),
        kind="model", layer=ContextMixing,
    ),
    entry(
        "dynamic_conv", "Dynamic convolutions", 2019, "1901.10430",
        "A softmax filter for every token and head, from the token itself.",
        dynamic, _dynamic_shapes, described((1024,), 16, 64),
        Identity("same_for_all", "the same logits for all tokens are a light convolution", _same_for_all),
        Identity("one_tap", "a filter of one tap is the identity", _one_tap),
        layer=DynamicConvolution,
    ),
    entry(
        "light_conv", "Lightweight convolutions", 2019, "1901.10430",
        "One softmax filter per head.",
        light, _light_shapes, described((1024,), 16, 64),
        Identity("moving_average", "equal logits average the last tokens", _moving_average),
        layer=LightweightConvolution,
    ),
)  # fmt: skip
