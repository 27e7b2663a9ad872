"""Gaussian-kernel attention through landmarks: SOFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._errors import ShapeError
from foveal._judged import judged_alone, need_shape


@judged_alone
def soft(
    x: Tensor,
    v: Tensor,
    landmarks: Tensor | None = None,
    *,
    ratio: int = 8,
    ridge: float = 0.01,
    iterations: int = 20,
    normalised: bool = False,
    scale: float | None = None,
) -> Tensor:
    """o = K(x, y) K(y, y)^-1 K(y, x) v, K(a, b) = exp(-scale |a - b|^2 / 2): queries are keys, no softmax.

    The inverse, of K(y, y) + ridge I, is found by Newton's iteration V <- 2 V - V P V without gradient;
    backwards dP = -V^T dV V^T.
    Shapes: x [B, *grid, H, D], v [B, *grid, H, Dv], landmarks y [B, M, H, D], by default the means of
    boxes of `ratio` tokens per axis.
    Options: normalised divides the inverse by the square roots of the row sums of K(y, y) on both
    sides; scale None is D^-1/2.
    Cost: 4 L M (D + Dv) FLOPs per head and 4 iterations M^3.  Computed in float32 at least.
    Equals: with all tokens as landmarks, no ridge and a converged inverse, K(x, x) v.
    Paper: SOFT (2110.11945); Softmax-free Linear Transformers (2207.03341).
    """
    if not 4 <= x.dim() <= 6 or v.shape[:-1] != x.shape[:-1]:
        needed = "[B, *grid, H, D] is needed for x, the same but for D for v"
        raise ShapeError("x", f"{list(x.shape)} and v {list(v.shape)}", needed)
    if landmarks is not None:
        need_shape("landmarks", landmarks, (len(x), -1, *x.shape[-2:]), like=x)
    elif ratio < 1:
        raise ShapeError("ratio", ratio, "at least 1 token is needed")
    grid, dtype = x.shape[1:-2], v.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y = box_means(x, ratio) if landmarks is None else landmarks
    factor = (x.shape[-1] ** -0.5 if scale is None else scale) ** 0.5
    x, v = (t.flatten(1, -3).transpose(1, 2).to(wide) for t in (x, v))
    x, y = x * factor, y.transpose(1, 2).to(wide) * factor
    across, among = gaussian(x, y), gaussian(y, y)
    ridged = among + ridge * torch.eye(among.shape[-1], dtype=wide, device=x.device)
    inverse: Tensor = _Inverse.apply(ridged, iterations)  # type: ignore[no-untyped-call]
    if normalised:
        roots = among.sum(-1).rsqrt()
        inverse = roots[..., :, None] * inverse * roots[..., None, :]
    o = across @ (inverse @ (across.mT @ v))
    result: Tensor = o.transpose(1, 2).unflatten(1, grid)
    return result.to(dtype)


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """exp(-|a_i - b_j|^2 / 2) of a [..., n, D] and b [..., m, D]."""
    squares = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :]
    return torch.exp((a @ b.mT - squares / 2).clamp(max=0.0))


def box_means(x: Tensor, ratio: int) -> Tensor:
    """Means [B, M, H, D] of boxes of `ratio` tokens per axis; a box at the border holds what is left."""
    for axis in range(1, x.dim() - 2):
        parts = [part.mean(axis, keepdim=True) for part in x.split(ratio, dim=axis)]
        x = torch.cat(parts, dim=axis)
    return x.flatten(1, -3)


class _Inverse(torch.autograd.Function):
    """P^-1 of symmetric positive P [..., M, M] by Newton's iteration from 1.8 P / (largest row sum)^2."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, iterations: int) -> Tensor:
        largest = p.abs().sum(-1).amax(-1)[..., None, None]
        inverse = 1.8 / largest.square() * p
        for _ in range(iterations):
            inverse = 2 * inverse - inverse @ p @ inverse
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        return -inverse.mT @ gradient @ inverse.mT, None


class SOFTAttention(nn.Module):
    """y = W_o (soft(x', v) + depthwise_5x5(v)), landmarks GELU(LayerNorm(strided convolution of x')).

    Shapes: x and y [B, X, Y, dim], X and Y multiples of `ratio`.
    Options: ratio is size and step of the convolution; normalised as for `soft`.
    Paper: Softmax-free Linear Transformers (2207.03341).
    """

    def __init__(self, dim: int, heads: int, *, ratio: int = 8, normalised: bool = True) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ShapeError("heads", heads, f"a divisor of dim, {dim}, is needed")
        self.heads = heads
        self.ratio = ratio
        self.normalised = normalised
        self.shared = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.local = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.sampled = nn.Conv2d(dim // heads, dim // heads, ratio, stride=ratio)
        self.norm = nn.LayerNorm(dim // heads)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or any(n % self.ratio for n in x.shape[1:3]):
            needed = f"[B, X, Y, dim] with multiples of {self.ratio} tokens is needed"
            raise ShapeError("x", list(x.shape), needed)
        shared, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.shared(x), self.v(x)))
        heads_first = shared.movedim(3, 1).flatten(0, 1).movedim(-1, 1)  # [B H, D, X, Y]
        sampled = self.sampled(heads_first).flatten(2).mT.unflatten(0, (len(x), self.heads))
        landmarks = F.gelu(self.norm(sampled)).transpose(1, 2)
        o = soft(shared, v, landmarks, normalised=self.normalised)
        near = self.local(v.flatten(-2).movedim(-1, 1)).movedim(1, -1)
        y: Tensor = self.out(o.flatten(-2) + near)
        return y
