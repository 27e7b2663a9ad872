"""P: keys reordered inside segments, so that what matters stands together."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal._errors import SelectionError


def by_importance(importance: Tensor, segment: int) -> Tensor:
    """Per head, the order of the keys: falling importance inside each segment, ties to the earlier key.

    importance [B, H, Lk]; returns int64 [B, H, Lk], the position of the key at each new place.
    Paper: PBS-Attn (2510.21270).
    """
    if segment < 1:
        raise SelectionError("segment", segment, "at least 1 token is needed")
    length = importance.shape[-1]
    place = torch.arange(length, device=importance.device)
    order = importance.argsort(dim=-1, descending=True, stable=True)
    return order.gather(-1, (place[order] // segment).argsort(dim=-1, stable=True))


def by_residue(length: int, stride: int, device: torch.device | None = None) -> Tensor:
    """Positions by their residue modulo `stride`, so that a comb of keys becomes one run.  int64 [length]

    Paper: the grid heads of MMInference (2504.16083).
    """
    if stride < 1:
        raise SelectionError("stride", stride, "at least 1 is needed")
    return (torch.arange(length, device=device) % stride).argsort(stable=True)


def permuted(x: Tensor, order: Tensor) -> Tensor:
    """x [B, L, H, D] with the key at place order[b, h, i] moved to place i."""
    index = order.transpose(1, 2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(1, index)
