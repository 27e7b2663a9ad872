"""A local mix by PyTorch's products on gathered windows, a bounded number of them at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveal._kept import kept
from foveal.engines.convolution.mix_problem import LocalMix, places

_GATHERED = 1 << 22
"""Elements of gathered values that are held at once."""


def refuses(problem: LocalMix) -> str | None:
    return None


def caveat(problem: LocalMix) -> str | None:
    return None


def mix(problem: LocalMix, weights: Tensor, v: Tensor) -> Tensor:
    """[B, *grid, H, D]"""
    index, exists = (x.to(v.device) for x in _places(problem))
    near = weights.flatten(1, -3).movedim(-2, 1).masked_fill(~exists, 0.0)  # [B, H, L, taps]
    rows = v.flatten(1, -3).movedim(-2, 1)  # [B, H, L, D]
    o: Tensor = _Mixture.apply(near, rows, index)  # type: ignore[no-untyped-call]
    found: Tensor = o.movedim(1, 2).unflatten(1, problem.grid).contiguous()
    return found


@kept(8)
def _places(problem: LocalMix) -> tuple[Tensor, Tensor]:
    return places(problem)


def _pieces(index: Tensor, v: Tensor) -> list[slice]:
    """Tokens whose gathered windows are held at once."""
    per_token = v.shape[0] * v.shape[1] * index.shape[1] * v.shape[-1]
    count = max(1, _GATHERED // max(per_token, 1))
    return [slice(start, start + count) for start in range(0, len(index), count)]


class _Mixture(torch.autograd.Function):
    """o[b, h, i] = sum_s weights[b, h, i, s] v[b, h, index[i, s]]"""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, v: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(weights, v, index)
        o = v.new_empty(v.shape)
        for rows in _pieces(index, v):
            o[:, :, rows] = (weights[:, :, rows, None] @ v[:, :, index[rows]]).squeeze(-2)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, v, index = ctx.saved_tensors
        wide = torch.promote_types(v.dtype, torch.float32)
        dweights = torch.empty_like(weights)
        dv = torch.zeros(v.shape, dtype=wide, device=v.device)
        for rows in _pieces(index, v):
            dweights[:, :, rows] = (v[:, :, index[rows]] @ do[:, :, rows, :, None]).squeeze(-1)
            parts = weights[:, :, rows, :, None].to(wide) * do[:, :, rows, None].to(wide)
            dv.index_add_(2, index[rows].flatten(), parts.flatten(2, 3))
        return dweights, dv.to(v.dtype), None
