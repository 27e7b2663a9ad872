"""Attention on the sphere, as an integral: every key counts with the area around it."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import PatternError
from foveal._kept import kept
from foveal._problem import Problem
from foveal.compose.weighted import EXTRA_COLUMNS, attend_weighted
from foveal.engines.tile import hopper
from foveal.layers.heads import MultiHead
from foveal.patterns import Dense, Pattern, Sphere
from foveal.patterns.base import Extent
from foveal.patterns.sphere import Latitudes
from foveal.scores import KeyBias, Score, Softmax
from foveal.scores.normal import NormalForm


@kept(32)
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
    dtype: torch.dtype = torch.float32,
) -> Score:
    """Softmax in which key j on a grid [rows, columns] counts w_j times, w_j its share of 4 pi.

    Options: dtype of log w; float64 only pays for q in float64, and GPUs read it slowly.
    """
    if len(grid) != 2:
        raise PatternError("grid", grid, "a grid [latitudes, longitudes] is needed")
    rows, columns = grid
    return Softmax() + KeyBias(_log_areas((rows, columns), latitudes, torch.device(device), dtype))


@kept(32)
def _log_areas(
    grid: tuple[int, int], latitudes: Latitudes, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """log w of every key.  [1, 1, keys]"""
    rows, columns = grid
    areas = latitude_weights(rows, latitudes) * (2 * math.pi / columns)
    return areas.log().repeat_interleave(columns)[None, None].to(device, dtype)


def area_precision(x: Tensor) -> torch.dtype:
    """The dtype of log w that goes with tensors like x."""
    return torch.promote_types(x.dtype, torch.float32)


def within(radius: float | None, latitudes: Latitudes = "equiangular") -> Pattern:
    """What a point of the sphere sees: everything, or what lies within `radius` radians of it."""
    return Dense() if radius is None else Sphere(radius, latitudes)


def attend_areas(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    latitudes: Latitudes = "equiangular",
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o and lse of attention in which every key counts with the area around it.

    Shapes: as `attend`, on grids [rows, columns].  The areas are a bias per key, or stand in columns of k
    where no gradient is asked for and the Hopper edition runs, whose forward is slower with biases.
    """
    grid, precision = tuple(k.shape[1:-2]), area_precision(k)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not training and _in_columns(q, v, pattern, implementation):
        areas = _log_areas((grid[0], grid[1]), latitudes, k.device, precision)
        return attend_weighted(
            q, k, v, areas.flatten(), pattern, return_lse=True, implementation=implementation
        )
    score = area_score(grid, latitudes, k.device, precision)
    return attend(q, k, v, pattern, score, return_lse=True, implementation=implementation)


def _in_columns(q: Tensor, v: Tensor, pattern: Pattern, implementation: str | None) -> bool:
    if not q.is_cuda or implementation not in (None, "hopper") or not isinstance(pattern, Dense):
        return False
    return _hopper_runs(q.shape[-1] + EXTRA_COLUMNS, v.shape[-1], q.dtype)


@functools.lru_cache(maxsize=64)
def _hopper_runs(head_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether the Hopper edition takes plain attention of these sizes."""
    token = Extent((1,), (1,))
    problem = Problem(1, token, 1, 1, head_dim, value_dim, dtype, "cuda", True)
    form = NormalForm(head_dim**-0.5, None, None, ())
    return hopper.refuses(problem, Dense(), form) is None


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
        return attend_areas(q, k, v, self.pattern, self.latitudes)[0]
