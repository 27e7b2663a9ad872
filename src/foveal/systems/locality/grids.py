"""Several grids in one sequence, and the grid of the sphere."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._judged import judged_alone
from foveal.layers.groups import ScaleAttention
from foveal.layers.heads import each
from foveal.layers.sphere import SphereAttention, area_score, attend_areas, within
from foveal.patterns import Neighborhood, Pattern, Scales
from foveal.patterns.scales import Grid
from foveal.patterns.sphere import Latitudes
from foveal.scores import Score, Softmax
from foveal.systems.base import Claim, Draw, Identity, System, attending

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""Sides of the token maps of a picture of 256 x 256 pixels, 680 tokens in all."""

_SHAPES = ({"grid": (680,), "heads": 16, "kv_heads": 16, "head_dim": 64},)


def _pieces(
    scales: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The scales of a sequence one by one, each as a map of tokens [B, side, side, H, D]."""
    sizes = [side * side for side in scales]
    starts = itertools.accumulate(sizes, initial=0)

    def one(start: int, side: int, x: Tensor) -> Tensor:
        scale: Tensor = x[:, start : start + side * side].unflatten(1, (side, side))
        return scale

    return [
        each(functools.partial(one, start, side), q, k, v)
        for start, side in zip(starts, scales, strict=False)
    ]


def _earlier(
    grid: tuple[int, ...], *, scales: tuple[int | Grid, ...] = SCALES_256
) -> tuple[Pattern, Score]:
    return Scales(scales, "before"), Softmax()


def _stepwise(draw: Draw) -> Claim:
    scales = (1, 2, draw.integer(1, 3))
    ends = list(itertools.accumulate(side * side for side in scales))
    op = attending(_earlier)

    def with_cache(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts = [0, *ends[:-1]]
        steps = (
            attend(q[:, start:end], k[:, :end], v[:, :end])
            for start, end in zip(starts, ends, strict=True)
        )
        return torch.cat([*steps], dim=1)

    return Claim(draw.qkv((ends[-1],)), lambda q, k, v: op(q, k, v, scales=scales), with_cache)


VAR = System(
    name="var",
    title="Visual Autoregressive Modeling: Scalable Image Generation via Next-Scale Prediction",
    year=2024,
    paper="Tian, Jiang, Yuan, Peng, Wang; arXiv 2404.02905",
    kind="model",
    summary="Every scale of a picture attends to itself and to all smaller scales before it.",
    op=attending(_earlier),
    compose=_earlier,
    layer=ScaleAttention,
    identities=(
        Identity(
            "stepwise",
            "It is one scale after another, each against the keys kept so far.",
            _stepwise,
        ),
    ),
    reference_shapes=_SHAPES,
)


def _own(
    grid: tuple[int, ...], *, scales: tuple[int | Grid, ...] = SCALES_256
) -> tuple[Pattern, Score]:
    return Scales(scales), Softmax()


def _apart(draw: Draw) -> Claim:
    scales = (1, 2, draw.integer(1, 3))
    op = attending(_own)

    def separate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([attend(*p).flatten(1, 2) for p in _pieces(scales, q, k, v)], dim=1)

    total = sum(side * side for side in scales)
    return Claim(draw.qkv((total,)), lambda q, k, v: op(q, k, v, scales=scales), separate)


HMAR = System(
    name="hmar",
    title="HMAR: Efficient Hierarchical Masked Auto-Regressive Image Generation",
    year=2025,
    paper="Kumbong et al.; arXiv 2506.04421",
    kind="model",
    summary="Every scale of a picture attends to itself only: its input is already the sum of the "
    "scales before it, so sampling needs no cache.",
    op=attending(_own),
    compose=_own,
    layer=ScaleAttention,
    identities=(Identity("apart", "It is attention of each scale on its own.", _apart),),
    reference_shapes=_SHAPES,
)


def _near(
    grid: tuple[int, ...], *, scales: tuple[int | Grid, ...] = SCALES_256, window: int = 7
) -> tuple[Pattern, Score]:
    return Scales(scales, "own", window), Softmax()


def _wide_mvar(draw: Draw) -> Claim:
    scales = (1, draw.integer(1, 3), 3)
    op, whole = attending(_near), attending(_own)
    return Claim(
        draw.qkv((sum(side * side for side in scales),)),
        lambda q, k, v: op(q, k, v, scales=scales, window=3),
        lambda q, k, v: whole(q, k, v, scales=scales),
    )


def _map_by_map(draw: Draw) -> Claim:
    scales, op = (1, 2, 4, draw.integer(1, 4)), attending(_near)

    def separate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = [
            attend(*maps, Neighborhood(min(3, side))).flatten(1, 2)
            for side, maps in zip(scales, _pieces(scales, q, k, v), strict=True)
        ]
        return torch.cat(outputs, dim=1)

    total = sum(side * side for side in scales)
    return Claim(draw.qkv((total,)), lambda q, k, v: op(q, k, v, scales=scales, window=3), separate)


MVAR = System(
    name="mvar",
    title="MVAR: Visual Autoregressive Modeling with Scale and Spatial Markovian Conditioning",
    year=2025,
    paper="Zhang, Long, Han, You, Gu; arXiv 2505.12742",
    kind="model",
    summary="Inside every scale each token attends to its nearest k x k tokens, the window cut to "
    "the scale; k is not established by the paper, an option, and 7 stands in.",
    op=attending(_near),
    compose=_near,
    layer=ScaleAttention,
    identities=(
        Identity(
            "wide_window", "A window as large as every scale is scale-wise attention.", _wide_mvar
        ),
        Identity(
            "map_by_map", "It is neighborhood attention of each scale on its own.", _map_by_map
        ),
    ),
    reference_shapes=_SHAPES,
)


def _sphere(
    grid: tuple[int, ...], *, latitudes: Latitudes = "equiangular", radius: float | None = None
) -> tuple[Pattern, Score]:
    return within(radius, latitudes), area_score(grid, latitudes)


@judged_alone
def sphere_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    latitudes: Latitudes = "equiangular",
    radius: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """o_i = sum_j w_j exp(s_ij) v_j / sum_j w_j exp(s_ij), w_j the area around key j, 4 pi in all.

    Shapes: q [B, rows, columns, H, D], k and v [B, rows', columns', H, D]; rows run from pole to
    pole.
    Options: latitudes "equiangular" (Clenshaw-Curtis weights) or "gauss-legendre"; radius in radians
    keeps the sums to the keys within that distance of the query, None is global.
    """
    o, lse = attend_areas(q, k, v, within(radius, latitudes), latitudes, implementation)
    return (o, lse) if return_lse else o


def _rotation(draw: Draw) -> Claim:
    op: Callable[..., Any] = sphere_attention
    turn, radius = draw.integer(1, 5), (None, 0.7)[draw.integer(0, 1)]
    return Claim(
        draw.qkv((draw.integer(2, 5), 6)),
        lambda q, k, v: op(*each(lambda x: x.roll(turn, dims=2), q, k, v), radius=radius),
        lambda q, k, v: op(q, k, v, radius=radius).roll(turn, dims=2),
    )


def _whole_sphere(draw: Draw) -> Claim:
    op: Callable[..., Any] = sphere_attention
    return Claim(
        draw.qkv((draw.integer(2, 5), 6)),
        lambda q, k, v: op(q, k, v, radius=math.pi),
        lambda q, k, v: op(q, k, v),
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
    summary="Attention as an integral over the sphere, or over what lies within a great-circle "
    "distance: key j counts with its quadrature weight.",
    op=sphere_attention,
    compose=_sphere,
    layer=SphereAttention,
    identities=(
        Identity("rotation", "Turning the longitudes commutes with it.", _rotation),
        Identity("whole_sphere", "A radius of pi is global.", _whole_sphere),
        Identity("area", "With q = 0 the weights sum to 4 pi: lse = log(4 pi).", _area),
    ),
    reference_shapes=(
        {"grid": (180, 360), "heads": 1, "kv_heads": 1, "head_dim": 64},
        {
            "grid": (361, 720),
            "heads": 1,
            "kv_heads": 1,
            "head_dim": 64,
            "options": {"radius": 0.03},
        },
    ),
)
