"""Local linear attention: attention that fits lines instead of constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveal._attend import attend
from foveal.layers.local_linear import LocalLinearAttention, ParallaxAttention
from foveal.patterns import Causal, Dense
from foveal.scores import LocalLinear, Parallax
from foveal.scores.local_linear import RidgeGrad
from foveal.systems.base import Claim, Draw, Identity, System


def local_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge: float = 1.0,
    causal: bool = True,
    ridge_grad: RidgeGrad = "exact",
    implementation: str | None = None,
) -> Tensor:
    """o [B, L, H, Dv] by `LocalLinear`, of q and k [B, L, H, D] and v [B, L, H, Dv]."""
    pattern = Causal() if causal else Dense()
    score = LocalLinear(ridge, ridge_grad=ridge_grad)
    return attend(q, k, v, pattern, score, implementation=implementation)


def parallax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    r: Tensor,
    *,
    causal: bool = True,
    implementation: str | None = None,
) -> Tensor:
    """o [B, L, H, Dv] by `Parallax`, of q, k and r [B, L, H, D] and v [B, L, H, Dv]."""
    pattern = Causal() if causal else Dense()
    return attend(q, k, v, pattern, Parallax(r), implementation=implementation)


def _constant(draw: Draw) -> Claim:
    def left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_linear_attention(q, k, v, ridge=1e13)

    def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, Causal())

    return Claim(draw.qkv((9,)), left, right)


def _shift(draw: Draw) -> Claim:
    def left(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
        return local_linear_attention(q, k, v + c)

    def right(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
        return local_linear_attention(q, k, v) + c

    return Claim((*draw.qkv((9,)), draw.normal(4)), left, right)


def solved_slope(q: Tensor, k: Tensor, ridge: float) -> Tensor:
    """r [B, L, H, D] of the causal system, solved directly."""
    L, D = q.shape[1], q.shape[3]
    future = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5
    p = scores.masked_fill(future, -torch.inf).softmax(-1)
    mean = torch.einsum("bhij,bjhd->bihd", p, k)
    centred = k[:, None] - mean[:, :, None]  # [B, i, j, H, D]
    system = torch.einsum("bhij,bijhd,bijhe->bihde", p, centred, centred)
    system = system + ridge * torch.eye(D, dtype=q.dtype, device=q.device)
    solution: Tensor = torch.linalg.solve(system, mean - q)
    return solution


def _given_slope(draw: Draw) -> Claim:
    def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parallax(q, k, v, solved_slope(q, k, 1.0))

    return Claim(draw.qkv((9,)), local_linear_attention, right)


def _no_slope(draw: Draw) -> Claim:
    def left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parallax(q, k, v, torch.zeros_like(q))

    def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, Causal())

    return Claim(draw.qkv((9,)), left, right)


def _linear_slope(draw: Draw) -> Claim:
    def left(q: Tensor, k: Tensor, v: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return parallax(q, k, v, r + t) + attend(q, k, v, Causal())

    def right(q: Tensor, k: Tensor, v: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return parallax(q, k, v, r) + parallax(q, k, v, t)

    q, k, v = draw.qkv((9,))
    return Claim((q, k, v, draw.normal(*q.shape), draw.normal(*q.shape)), left, right)


_SHAPE: Mapping[str, Any] = {"grid": (2048,), "heads": 4, "kv_heads": 4, "head_dim": 64}


def _with_slope(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    return ((1, *shape["grid"], shape["heads"], shape["head_dim"]),) * 4


LOCAL_LINEAR_ATTENTION = System(
    name="local_linear_attention",
    title="Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For "
    "Test-Time Regression",
    year=2025,
    paper="Zuo et al.; arXiv 2510.01450",
    kind="operator",
    summary="The value at each query of a line that is fitted to keys and values by a ridge regression "
    "weighted by the softmax.",
    op=local_linear_attention,
    layer=LocalLinearAttention,
    identities=(
        Identity("constant", "With an infinite ridge it is softmax attention.", _constant),
        Identity("shift", "A constant added to all values is added to the output.", _shift),
        Identity("given_slope", "It is Parallax with the r of its system.", _given_slope),
    ),
    reference_shapes=(_SHAPE,),
    family="local_linear",
    engine="local_linear",
)

PARALLAX = System(
    name="parallax",
    title="Parallax",
    year=2026,
    paper="arXiv 2605.29157",
    kind="operator",
    summary="Softmax attention with a correction to first order along a direction that the layer projects.",
    op=parallax,
    layer=ParallaxAttention,
    identities=(
        Identity("no_slope", "With r = 0 it is softmax attention.", _no_slope),
        Identity("linear", "What r adds to softmax attention is linear in r.", _linear_slope),
    ),
    reference_shapes=(_SHAPE,),
    family="local_linear",
    engine="local_linear",
    operands=_with_slope,
)

SYSTEMS: tuple[System, ...] = (LOCAL_LINEAR_ATTENTION, PARALLAX)
