"""A local mix by PyTorch's products on gathered windows, a bounded number of them at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveal._kept import kept
from foveal.engines.common.step import Gradients, recorded
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
    o = recorded(_Mixture(index), near, rows)
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


@dataclass(frozen=True, eq=False)
class _Mixture:
    """The step of autograd of o[b, h, i] = sum_s weights[b, h, i, s] v[b, h, index[i, s]]."""

    index: Tensor
    name = "torch"

    def forward(self, weights: Tensor, v: Tensor) -> Tensor:
        index, o = self.index, v.new_empty(v.shape)
        for rows in _pieces(index, v):
            o[:, :, rows] = (weights[:, :, rows, None] @ v[:, :, index[rows]]).squeeze(-2)
        return o

    def backward(
        self, tensors: Sequence[Tensor], above: Tensor, needed: Sequence[bool]
    ) -> Gradients:
        index, (weights, v) = self.index, tensors
        wide = torch.promote_types(v.dtype, torch.float32)
        dweights = torch.empty_like(weights)
        dv = torch.zeros(v.shape, dtype=wide, device=v.device)
        for rows in _pieces(index, v):
            dweights[:, :, rows] = (v[:, :, index[rows]] @ above[:, :, rows, :, None]).squeeze(-1)
            parts = weights[:, :, rows, :, None].to(wide) * above[:, :, rows, None].to(wide)
            dv.index_add_(2, index[rows].flatten(), parts.flatten(2, 3))
        return dweights, dv.to(v.dtype)
