"""Softmax-free attention along every axis of a volume: the layer of IFactFormer-m."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor, nn

from foveal._errors import OptionError, ShapeError
from foveal._judged import need_dtype, need_shape

Form = Literal["parallel", "chained"]


def mix_axes(
    q: tuple[Tensor, ...],
    k: tuple[Tensor, ...],
    v: Tensor,
    scale: float = 1.0,
    form: Form = "parallel",
) -> Tensor:
    """y_a[.., i, ..] = sum_j scale (q_a[i].k_a[j]) v[.., j, ..] along each axis a.

    "parallel" puts the results side by side, "chained" applies axis 0 first and the last axis last.

    Shapes: q[a], k[a] [B, grid[a], H, Dk]; v [B, *grid, H, D]; returns [B, *grid, H, axes * D], or
    [B, *grid, H, D] when chained.
    Paper: IFactFormer-m (2412.18840).
    """
    if len(q) != v.dim() - 3 or len(k) != len(q):
        raise ShapeError("q", f"{len(q)} axes", f"one tensor per axis of {list(v.shape)} is needed")
    if form not in ("parallel", "chained"):
        raise OptionError("form", repr(form), "'parallel' or 'chained' is needed")
    for axis, (own_q, own_k) in enumerate(zip(q, k, strict=True)):
        sizes = (v.shape[0], v.shape[axis + 1], v.shape[-2])
        for name, x in ((f"q[{axis}]", own_q), (f"k[{axis}]", own_k)):
            need_shape(name, x, (*sizes, own_q.shape[-1]), like=v)
        need_dtype(v, **{f"q[{axis}]": own_q, f"k[{axis}]": own_k})
    weights = [scale * torch.einsum("bihd,bjhd->bhij", *pair) for pair in zip(q, k, strict=True)]
    if form == "chained":
        return functools.reduce(_along, enumerate(weights), v)
    return torch.cat([_along(v, numbered) for numbered in enumerate(weights)], dim=-1)


def _along(v: Tensor, numbered: tuple[int, Tensor]) -> Tensor:
    """v [B, *grid, H, D] contracted on one axis with weights [B, H, i, j]."""
    axis, weights = numbered
    lines = v.movedim((-2, axis + 1), (1, 2))  # [B, H, j, *rest, D]
    mixed = torch.einsum("bhij,bhjx->bhix", weights, lines.flatten(3)).view_as(lines)
    return mixed.movedim((1, 2), (-2, axis + 1))


def rotate(x: Tensor, place: Tensor, lowest: float = 1 / 64) -> Tensor:
    """Rotary embedding by a real coordinate: pair c turns by (place / lowest) * 10000^(-2c / D).

    Shapes: x [B, n, H, D] with D even, the pair of channel c being c + D / 2; place [n].
    """
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)  # an angle of 64 has no digits in bfloat16
    speed = 10000 ** -(torch.arange(half, dtype=wide, device=x.device) / half)
    angle = (place.to(wide)[:, None] / lowest * speed)[:, None]  # [n, 1, half]
    first, second = x.split(half, dim=-1)
    cos, sin = (wave.to(x.dtype) for wave in (angle.cos(), angle.sin()))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class FactorisedAxesAttention(nn.Module):
    """One layer of IFactFormer-m, iterated `iterations` times: u <- u + layer(u) / iterations.

    Per axis a: u_a = MLP(mean over the other axes of W_in norm(u)), q_a, k_a linear in u_a and
    rotated by the coordinate; `mix_axes` acts on v = W_v norm(u); then InstanceNorm and two linear
    maps with a GELU.

    Shapes: u and y [B, X, Y, Z, dim]; coordinates, one [n] per axis, default evenly spaced in [0,
    1).
    Options: heads of head_dim; q and k have multiplier * head_dim, scaled by its -1/2 power only
    when multiplier > 4.  On an uneven grid nothing weighs the sum, as in the released code.
    Paper: IFactFormer-m (2412.18840).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int = 32,
        *,
        axes: int = 3,
        multiplier: int = 3,
        iterations: int = 10,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.iterations = iterations
        width = multiplier * head_dim
        self.scale = width**-0.5 if multiplier > 4 else 1.0
        self.norm = nn.LayerNorm(dim)
        self.enter = nn.Linear(dim, dim, bias=False)
        self.profiles = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
            for _ in range(axes)
        )
        self.qk = nn.ModuleList(_near_zero(dim, 2 * heads * width) for _ in range(axes))
        self.v = nn.Linear(dim, heads * head_dim, bias=False)
        self.leave = nn.Sequential(
            nn.Linear(axes * heads * head_dim, dim, bias=False), nn.GELU(), nn.Linear(dim, dim)
        )

    def forward(self, u: Tensor, coordinates: tuple[Tensor, ...] | None = None) -> Tensor:
        if coordinates is None:
            wide = torch.promote_types(u.dtype, torch.float32)
            coordinates = tuple(
                torch.arange(n, dtype=wide, device=u.device) / n for n in u.shape[1:-1]
            )
        for _ in range(self.iterations):
            u = u + self._step(u, coordinates) / self.iterations
        return u

    def _step(self, u: Tensor, coordinates: tuple[Tensor, ...]) -> Tensor:
        normed = self.norm(u)
        entered = self.enter(normed)
        queries, keys = [], []
        for axis, (profile, qk, place) in enumerate(
            zip(self.profiles, self.qk, coordinates, strict=True)
        ):
            others = tuple(a + 1 for a in range(len(coordinates)) if a != axis)
            line = profile(entered.mean(others) if others else entered)  # [B, n, dim]
            q, k = qk(line).unflatten(-1, (2, self.heads, -1)).unbind(2)
            queries.append(rotate(q, place))
            keys.append(rotate(k, place))
        v = self.v(normed).unflatten(-1, (self.heads, -1))
        y = mix_axes(tuple(queries), tuple(keys), v, self.scale).flatten(-2)
        grid = tuple(range(1, y.dim() - 1))
        variance, mean = torch.var_mean(y, dim=grid, correction=0, keepdim=True)
        left: Tensor = self.leave((y - mean) * torch.rsqrt(variance + 1e-5))
        return left


def _near_zero(dim: int, width: int) -> nn.Linear:
    linear = nn.Linear(dim, width, bias=False)
    nn.init.xavier_uniform_(linear.weight, gain=0.02)
    return linear
