"""Several grids in one sequence, and the grid of the sphere."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import ShapeError
from foveal.layers.heads import each
from foveal.layers.sphere import Latitudes, SphereAttention, area_score
from foveal.patterns import Dense, Neighborhood, Pattern
from foveal.patterns.base import per_axis
from foveal.patterns.documents import Packed
from foveal.scores import Score, Softmax
from foveal.systems.base import Claim, Draw, Identity, System, attending

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""Sides of the token maps of a picture of 256 x 256 pixels, 680 tokens in all."""


def _scales(
    grid: tuple[int, ...], *, scales: tuple[int, ...] = SCALES_256
) -> tuple[Pattern, Score]:
    _check_scales(grid, scales)
    return Packed(Dense(), tuple(side * side for side in scales)), Softmax()


def _check_scales(grid: tuple[int, ...], scales: tuple[int, ...]) -> None:
    total = sum(side * side for side in scales)
    if len(grid) != 1 or math.prod(grid) != total:
        raise ShapeError("scales", scales, f"{total} tokens are needed, not {grid}")


def _apart(draw: Draw) -> Claim:
    scales = (1, 2, draw.integer(1, 3))
    sizes = [side * side for side in scales]
    op = attending(_scales)

    def separate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = zip(*(x.split(sizes, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([attend(*piece) for piece in pieces], dim=1)

    return Claim(draw.qkv((sum(sizes),)), lambda q, k, v: op(q, k, v, scales=scales), separate)


HMAR = System(
    name="hmar",
    title="HMAR: Efficient Hierarchical Masked Auto-Regressive Image Generation",
    year=2025,
    paper="Kumbong et al.; arXiv 2506.04421",
    kind="model",
    summary="Every scale of a picture attends to itself only: its input is already the sum of the "
    "scales before it, so sampling needs no cache.",
    op=attending(_scales),
    compose=_scales,
    identities=(Identity("apart", "It is attention of each scale on its own.", _apart),),
    reference_shapes=({"grid": (680,), "heads": 16, "kv_heads": 16, "head_dim": 64},),
)


def mvar(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scales: tuple[int, ...] = SCALES_256,
    window: int = 7,
    implementation: str | None = None,
) -> Tensor:
    """Neighborhood attention inside every scale of a picture, the window cut to the scale.

    Shapes: q, k, v [B, L, H, D] with L = sum of side * side over the scales, small scales first.
    Options: window is not established by the paper; 7 stands in.
    """
    _check_scales(tuple(k.shape[1:-2]), scales)
    outputs, start = [], 0
    for side in scales:
        tokens = each(partial(_map, start, side), q, k, v)
        pattern = Neighborhood(min(window, side))
        outputs.append(attend(*tokens, pattern, implementation=implementation).flatten(1, 2))
        start += side * side
    return torch.cat(outputs, dim=1)


def _map(start: int, side: int, x: Tensor) -> Tensor:
    """One scale of a sequence as a map of tokens.  [B, side, side, H, D]"""
    scale: Tensor = x[:, start : start + side * side].unflatten(1, (side, side))
    return scale


def _one_scale(
    grid: tuple[int, ...], *, scales: tuple[int, ...] = SCALES_256, window: int = 7
) -> tuple[Pattern, Score]:
    """The pattern on the grid of one of the scales; the operator takes them all in a row."""
    window_per_axis = zip(per_axis(window, len(grid)), grid, strict=True)
    return Neighborhood(tuple(min(pair) for pair in window_per_axis)), Softmax()


def _wide_mvar(draw: Draw) -> Claim:
    scales = (1, draw.integer(1, 3), 3)
    hmar = attending(_scales)
    return Claim(
        draw.qkv((sum(side * side for side in scales),)),
        lambda q, k, v: mvar(q, k, v, scales=scales, window=3),
        lambda q, k, v: hmar(q, k, v, scales=scales),
    )


MVAR = System(
    name="mvar",
    title="MVAR: Visual Autoregressive Modeling with Scale and Spatial Markovian Conditioning",
    year=2025,
    paper="Zhang, Long, Han, You, Gu; arXiv 2505.12742",
    kind="model",
    summary="Inside every scale each token attends to its nearest k x k tokens; k is not "
    "established and an option.",
    op=mvar,
    compose=_one_scale,
    identities=(
        Identity(
            "wide_window", "A window as large as every scale is scale-wise attention.", _wide_mvar
        ),
    ),
    reference_shapes=({"grid": (16, 16), "heads": 16, "kv_heads": 16, "head_dim": 64},),
)


def _sphere(
    grid: tuple[int, ...], *, latitudes: Latitudes = "equiangular"
) -> tuple[Pattern, Score]:
    return Dense(), area_score(grid, latitudes)


def sphere_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    latitudes: Latitudes = "equiangular",
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """o_i = sum_j w_j exp(s_ij) v_j / sum_j w_j exp(s_ij), w_j the area around key j, 4 pi in all.

    Shapes: q [B, rows, columns, H, D], k and v [B, rows', columns', H, D]; rows run from pole to
    pole.
    Options: latitudes "equiangular" (Clenshaw-Curtis weights) or "gauss-legendre", for the keys.
    """
    score = area_score(tuple(k.shape[1:-2]), latitudes, k.device)
    o, lse = attend(q, k, v, Dense(), score, return_lse=True, implementation=implementation)
    return (o, lse) if return_lse else o


def _rotation(draw: Draw) -> Claim:
    op: Callable[..., Any] = sphere_attention
    turn = draw.integer(1, 5)
    return Claim(
        draw.qkv((draw.integer(2, 5), 6)),
        lambda q, k, v: op(*each(lambda x: x.roll(turn, dims=2), q, k, v)),
        lambda q, k, v: op(q, k, v).roll(turn, dims=2),
    )


def _area(draw: Draw) -> Claim:
    rows, choice = draw.integer(2, 7), draw.integer(0, 1)
    latitudes: Latitudes = "equiangular" if choice else "gauss-legendre"

    def mean_weight(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, lse = sphere_attention(q * 0, k, v, latitudes=latitudes, return_lse=True)
        return lse

    return Claim(
        draw.qkv((rows, 4)),
        mean_weight,
        lambda q, k, v: q.sum(-1) * 0 + math.log(4 * math.pi),
    )


SPHERE_ATTENTION = System(
    name="sphere_attention",
    title="Attention on the Sphere",
    year=2025,
    paper="Bonev, Rietmann, Paris, Carpentieri, Kurth; arXiv 2505.11157",
    kind="operator",
    summary="Global attention as an integral over the sphere: key j counts with its quadrature "
    "weight. The geodesic neighborhood is not offered yet.",
    op=sphere_attention,
    compose=_sphere,
    layer=SphereAttention,
    identities=(
        Identity("rotation", "Turning the longitudes commutes with it.", _rotation),
        Identity("area", "With q = 0 the weights sum to 4 pi: lse = log(4 pi).", _area),
    ),
    reference_shapes=({"grid": (180, 360), "heads": 1, "kv_heads": 1, "head_dim": 64},),
)
