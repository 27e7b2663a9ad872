"""Linear attention on grids: L2ViT and NaLaFormer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._errors import ShapeError
from foveal._judged import judged_alone, need_shape
from foveal._problem import describe
from foveal.features import contract, norm_aware_k, norm_aware_q
from foveal.layers.heads import MultiHead, Projections


@judged_alone
def l2vit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor | None = None,
    *,
    floor: float = 100.0,
) -> Tensor:
    """o_i = t_h relu(q_i) (sum_j relu(k_j) v_j^T) / max(relu(q_i) . sum_j relu(k_j), floor).

    Shapes: q, k, v [B, *grid, H, .]; temperature t [H], by default D^-1/2.
    Options: the large floor of the paper keeps tokens of little weight small.
    """
    need_grids(q, k, v)
    grid = q.shape[1:-2]
    if temperature is None:
        temperature = v.new_full((q.shape[-2],), q.shape[-1] ** -0.5)
    need_shape("temperature", temperature, (q.shape[-2],), like=q)
    q, k, v = (x.flatten(1, -3) for x in (q, k, v))
    o = contract(torch.relu(q), torch.relu(k), v, floor=floor) * temperature.to(v.dtype)[:, None]
    y: Tensor = o.unflatten(1, grid)
    return y


@judged_alone
def nala(q: Tensor, k: Tensor, v: Tensor, *, rotary_base: float | None = 10000.0) -> Tensor:
    """o_i = turned(a_i) . sum_j turned(b_j) v_j / a_i . sum_j b_j, a = norm_aware_q(q), b = norm_aware_k(k).

    `turned` rotates features by the position on the grid, each axis a share of the planes; the
    denominator stays without, so that it is positive.
    Shapes: q, k, v [B, *grid, H, .].
    Options: rotary_base None turns nothing.
    """
    need_grids(q, k, v)
    if k.shape[-2] != q.shape[-2]:
        raise ShapeError("k", list(k.shape), f"the {q.shape[-2]} heads of q are needed")
    grid = q.shape[1:-2]
    a, b = norm_aware_q(q), norm_aware_k(k)
    total = torch.einsum("bihd,bhd->bih", a.flatten(1, -3), b.flatten(1, -3).sum(1))
    if rotary_base is not None:
        a, b = (grid_rotary(x, rotary_base) for x in (a, b))
    o = contract(*(x.flatten(1, -3) for x in (a, b, v)), normalised=False)
    y: Tensor = (o / total.clamp(min=1e-6)[..., None].to(o.dtype)).unflatten(1, grid)
    return y


def grid_rotary(x: Tensor, base: float) -> Tensor:
    """x [B, *grid, H, D] turned in planes (i, i + D / 2); plane i by the position on axis i mod axes.

    Plane i of n turns by position times base^-(i // axes) / (n / axes).
    """
    grid, half = x.shape[1:-2], x.shape[-1] // 2
    number = torch.arange(half, device=x.device)
    step = (number // len(grid)).to(torch.float64) / max(half / len(grid), 1)
    wide = torch.promote_types(x.dtype, torch.float32)
    speeds = (base**-step).to(wide)
    angle = x.new_zeros(*grid, half, dtype=wide)
    for axis, size in enumerate(grid):
        place = torch.arange(size, device=x.device, dtype=wide)
        place = place.view(*(-1 if other == axis else 1 for other in range(len(grid))), 1)
        angle = angle + place * speeds * (number % len(grid) == axis)
    angle = angle[..., None, :]
    u, w, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = (wave.to(x.dtype) for wave in (angle.cos(), angle.sin()))
    return torch.cat([u * cos - w * sin, u * sin + w * cos, rest], dim=-1)


def need_grids(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises unless q, k and v [B, *grid, H, .] fit each other; under autocast dtypes may differ."""
    if q.is_meta or not torch.is_autocast_enabled(q.device.type):
        describe(q, k, v, False)


def _depthwise(dim: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim)


def _on_channels(net: nn.Module, x: Tensor) -> Tensor:
    """A net for [B, C, X, Y] on x [B, X, Y, C]."""
    y: Tensor = net(x.movedim(-1, 1)).movedim(1, -1)
    return y


class L2ViTAttention(MultiHead):
    """y = z + concentrate(z), z = W_o l2vit(q, k, v): depthwise 7x7, GELU, batch norm, depthwise 7x7.

    Shapes: x and y [B, X, Y, dim].
    Paper: The Linear Attention Resurrection in Vision Transformer (2501.16182).
    """

    def __init__(self, dim: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__(dim, heads, dropout=dropout)
        self.temperature = nn.Parameter(torch.full((heads,), (dim // heads) ** -0.5))
        self.concentrate = nn.Sequential(
            _depthwise(dim, 7), nn.GELU(), nn.BatchNorm2d(dim), _depthwise(dim, 7)
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ShapeError("x", list(x.shape), "[B, X, Y, dim] is needed")
        z = super().forward(x)
        return z + _on_channels(self.concentrate, z)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return l2vit(q, k, v, self.temperature)


class NaLaAttention(Projections):
    """y = W_o [silu(W_g x) * LayerNorm(nala(q, k, v) + depthwise_5x5(v))].

    Shapes: x and y [B, X, Y, dim].
    Paper: NaLaFormer (2506.21137).
    """

    def __init__(self, dim: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__(dim, heads, dropout=dropout)
        self.local = _depthwise(dim, 5)
        self.norm = nn.LayerNorm(dim)
        self.read = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ShapeError("x", list(x.shape), "[B, X, Y, dim] is needed")
        q, k, v = self.split(x)
        o = nala(q, k, v).flatten(-2) + _on_channels(self.local, v.flatten(-2))
        return self.join((F.silu(self.read(x)) * self.norm(o)).unflatten(-1, (self.heads, -1)))
