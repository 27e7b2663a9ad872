"""Attention on the sphere, as an integral: every key counts with the area around it."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import PatternError
from foveal.layers.heads import MultiHead
from foveal.patterns import Dense, Pattern, Sphere
from foveal.patterns.sphere import Latitudes
from foveal.scores import KeyBias, Score, Softmax


@functools.lru_cache(maxsize=32)
def latitude_weights(count: int, latitudes: Latitudes = "equiangular") -> Tensor:
    """Weights of a quadrature over cos(colatitude), which sum to 2.  float64 [count]

    Options: "equiangular": rows at pi t / (count - 1), poles included, Clenshaw-Curtis weights,
    exact for polynomials up to degree count - 1; "gauss-legendre": exact up to degree 2 count - 1.
    Limits: count >= 2 when equiangular, else >= 1.
    """
    if latitudes == "gauss-legendre":
        n = torch.arange(1, count, dtype=torch.float64)
        beside = n / torch.sqrt(4 * n**2 - 1)
        # Golub-Welsch: the weights are 2 times the squared first components of the eigenvectors.
        _, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
        return 2 * vectors[0] ** 2 if count > 1 else torch.tensor([2.0], dtype=torch.float64)
    if latitudes != "equiangular":
        raise PatternError("latitudes", latitudes, "'equiangular' or 'gauss-legendre' is needed")
    if count < 2:
        raise PatternError("count", count, "at least 2 equiangular rows, the poles, are needed")
    last = count - 1
    colatitude = torch.arange(count, dtype=torch.float64) * math.pi / last
    weights = torch.ones(count, dtype=torch.float64)
    for degree in range(1, last // 2 + 1):
        half = 1 if 2 * degree == last else 2
        weights -= torch.cos(2 * degree * colatitude) * (half / (4 * degree**2 - 1))
    ends = torch.full((count,), 2.0, dtype=torch.float64)
    ends[0] = ends[-1] = 1.0
    return weights * ends / last


def area_score(
    grid: tuple[int, ...],
    latitudes: Latitudes = "equiangular",
    device: torch.device | str = "cpu",
) -> Score:
    """Softmax in which key j on a grid [rows, columns] counts w_j times, w_j its share of 4 pi."""
    if len(grid) != 2:
        raise PatternError("grid", grid, "a grid [latitudes, longitudes] is needed")
    rows, columns = grid
    areas = latitude_weights(rows, latitudes) * (2 * math.pi / columns)
    return Softmax() + KeyBias(areas.log().repeat_interleave(columns)[None, None].to(device))


def within(radius: float | None, latitudes: Latitudes = "equiangular") -> Pattern:
    """What a point of the sphere sees: everything, or what lies within `radius` radians of it."""
    return Dense() if radius is None else Sphere(radius, latitudes)


class SphereAttention(MultiHead):
    """Attention on the sphere: o_i = sum_j w_j exp(s_ij) v_j / sum_j w_j exp(s_ij).

    The sums run over the whole sphere, or over the points within `radius` radians of point i.

    Shapes: x and y [B, rows, columns, dim]; rows are colatitudes from pole to pole, columns
    longitudes.
    Options: latitudes as in `latitude_weights`; radius None is global; the rest as in `MultiHead`.
    Paper: Attention on the Sphere (2505.11157).
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        latitudes: Latitudes = "equiangular",
        *,
        radius: float | None = None,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, heads, qkv_bias=qkv_bias, dropout=dropout)
        self.latitudes = latitudes
        self.pattern = within(radius, latitudes)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = area_score(tuple(k.shape[1:-2]), self.latitudes, k.device)
        return attend(q, k, v, self.pattern, score)
