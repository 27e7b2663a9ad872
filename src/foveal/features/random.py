"""Random features whose products estimate the weights of softmax attention."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from foveal._errors import ShapeError

Shift = Literal["none", "token", "sequence"]


def orthogonal_projection(
    features: int,
    dim: int,
    *,
    generator: torch.Generator | None = None,
    norms: Literal["chi", "fixed"] = "chi",
) -> Tensor:
    """Random directions, orthogonal in each block of `dim` rows: Omega [features, dim] in float32.

    Options: norms "chi" gives the rows the lengths of Gaussian vectors, so that each row alone is
    Gaussian and estimates are unbiased; "fixed" gives all the length sqrt(dim).
    Paper: Performers (2009.14794).
    """
    if features < 1 or dim < 1:
        raise ShapeError("features", [features, dim], "at least 1 feature and dimension is needed")
    device = "cpu" if generator is None else generator.device
    draw = partial(torch.randn, generator=generator, dtype=torch.float64, device=device)
    blocks = []
    for _ in range(-(-features // dim)):
        gaussian = draw(dim, dim)
        q, r = torch.linalg.qr(gaussian)
        blocks.append((q * r.diagonal().sign()).mT)
    rows = torch.cat(blocks)[:features]
    lengths = torch.full((features,), math.sqrt(dim), dtype=torch.float64, device=device)
    if norms == "chi":
        lengths = draw(features, dim).square().sum(-1).sqrt()
    scaled: Tensor = rows * lengths[:, None]
    return scaled.float()


def positive_random(
    x: Tensor,
    projection: Tensor,
    *,
    shift: Shift = "none",
    epsilon: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """phi(x) = m^-1/2 (exp(Omega y - |y|^2 / 2 - c) + epsilon), y = x sqrt(scale): all positive.

    For random Omega the mean of phi(q) . phi(k) is exp(scale q . k).
    Shapes: x [B, L, H, D], projection Omega [m, D]; returns [B, L, H, m].
    Options: c is 0 for shift "none"; "token" makes the largest feature of each token, "sequence" that of
    each (B, H), 1.  A shift cancels in normalised attention, without gradient: "token" suits q in
    every case, "sequence" suits k without causality, but in a causal layer it looks ahead.  scale None
    is D^-1/2.
    Limits: "none" overflows where an exponent exceeds 88 in float32.
    Paper: Performers (2009.14794), FAVOR+.
    """
    _need_columns(projection, x)
    y = x * math.sqrt(x.shape[-1] ** -0.5 if scale is None else scale)
    exponent = y @ projection.to(y).mT - y.square().sum(-1, keepdim=True) / 2
    if shift == "token":
        exponent = exponent - exponent.detach().amax(-1, keepdim=True)
    if shift == "sequence" and exponent.numel():
        exponent = exponent - exponent.detach().amax((1, 3), keepdim=True)
    phi: Tensor = (exponent.exp() + epsilon) * len(projection) ** -0.5
    return phi


def relu_random(
    x: Tensor, projection: Tensor, *, epsilon: float = 1e-3, scale: float | None = None
) -> Tensor:
    """phi(x) = m^-1/2 (relu(Omega x sqrt(scale)) + epsilon).

    Shapes and options as for `positive_random`.  Paper: Performers (2009.14794), generalised attention.
    """
    _need_columns(projection, x)
    y = x * math.sqrt(x.shape[-1] ** -0.5 if scale is None else scale)
    phi: Tensor = (torch.relu(y @ projection.to(y).mT) + epsilon) * len(projection) ** -0.5
    return phi


def fourier_random(x: Tensor, projection: Tensor) -> Tensor:
    """phi(x) = m^-1/2 [cos(Omega x), sin(Omega x)]; the mean of phi(q) . phi(k) is E cos(Omega (q - k)).

    With Gaussian Omega that is exp(-|q - k|^2 / 2); weights may be negative.
    Shapes: x [..., D], projection Omega [m, D]; returns [..., 2 m].
    Paper: On Learning the Transformer Kernel (2110.08323).
    """
    _need_columns(projection, x)
    phase = x @ projection.to(x).mT
    phi: Tensor = torch.cat([phase.cos(), phase.sin()], dim=-1) * len(projection) ** -0.5
    return phi


def _need_columns(projection: Tensor, x: Tensor) -> None:
    if projection.dim() != 2 or projection.shape[1] != x.shape[-1] or not len(projection):
        needed = f"[m, {x.shape[-1]}] is needed, m >= 1"
        raise ShapeError("projection", list(projection.shape), needed)
